"""What the host does at a hit: count it, tell who listens, call the handlers in Python."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable

from gdb_kprobe.errors import SessionOverError
from gdb_kprobe.model import CpuId, VirtAddr, offset
from gdb_kprobe.session.hit_context import Handler, HitContext, Registers
from gdb_kprobe.session.listeners import Listeners
from gdb_kprobe.session.probes import Hit, Probe, Site
from gdb_kprobe.target.protocols import Cpus

Called = tuple[Probe, ...]
"""The probes of a hit whose condition held."""


class HandlerCalls:
    """Calls what is to be called at hits on *machine*.

    *interruptible* is the adapter's: it is around a user's handler, within a dispatch that is not interrupted.
    """

    def __init__(
        self,
        machine: Cpus,
        listeners: Listeners,
        interruptible: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._machine = machine
        self._listeners = listeners
        self._interruptible = interruptible
        self.failed: list[Probe] = []
        """Probes whose handler raised; the session takes them away."""

    def before(self, cpu: CpuId, site: Site, probes: Iterable[Probe], regs: Registers) -> tuple[bool, Called]:
        """Do what *probes*, of *site*, want of a hit; whether to stop for the user, and those whose condition held."""
        stop = False
        called: list[Probe] = []
        next_ip = offset(site.addr, site.plan.insn.length)
        for probe in tuple(probes):
            if not any(probe is other for other in site.probes):
                continue  # it has gone since its program has run
            condition = probe.spec.condition
            with regs.shown_at(site.addr if probe.place is None else probe.place.addr):
                if not probe.enabled or (condition is not None and not condition.evaluate(regs)):
                    continue
                called.append(probe)
                probe.count(hits=1)
                if probe.is_the_users:
                    args = tuple((arg, regs[arg.register]) for arg in probe.spec.args)
                    self._listeners.tell(Hit(probe, cpu, args))
                if probe.watch is not None:
                    probe.watch(regs)
                stop |= probe.stop
                if probe.pre is not None:
                    stop |= self._call(probe, probe.pre, self._context(probe, cpu, regs, next_ip))
        return stop, tuple(called)

    def after(self, cpu: CpuId, called: Called, regs: Registers) -> bool:
        """The instruction was executed: call the post-handlers of *called*; whether to stop for the user."""
        stop = False
        for probe in called:
            if probe.enabled and probe.post is not None:
                stop |= self._call(probe, probe.post, self._context(probe, cpu, regs, VirtAddr(regs.ip)))
        return stop

    def _context(self, probe: Probe, cpu: CpuId, regs: Registers, next_ip: VirtAddr) -> HitContext:
        return HitContext(probe.spec, probe.hits, cpu, regs, next_ip, self._machine)

    def _call(self, probe: Probe, handler: Handler, context: HitContext) -> bool:
        """Run a user's handler. When it raises, what it did to the registers is undone, and the guest goes on."""
        before = context.regs.save()
        try:
            with self._interruptible():
                returned = handler(context)
        except KeyboardInterrupt:
            context.regs.restore(before)
            return True
        except SessionOverError:
            raise  # what the handler asked for showed it: that is no fault of the handler's
        except Exception:
            context.regs.restore(before)
            probe.last_error = traceback.format_exc()
            probe.count(missed=1)
            self.failed.append(probe)
            return False
        return context.stop_requested or returned is True
