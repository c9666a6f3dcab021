"""Dispatch through the stub: what happens when a vCPU stops because of an int3 of ours.

A hit is: read the interrupted context, run the handlers, and send the vCPU to the probe's slot with all registers as
they were. The exception is undone; the guest never sees it. Where the vCPU stops, and where its context is then, is
the business of a :class:`~gdb_kprobe.session.traps.Gate`.

We may be killed between any two requests, and somebody may let the guest run then who knows nothing of us. So registers
are written at once, after what they need on the stack, and a slot leads back by itself: a vCPU goes on right from
whatever has been done to it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from enum import Enum, auto

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.model import CpuId, Rung, VirtAddr, offset
from gdb_kprobe.session.context import Handler, HitContext, Registers
from gdb_kprobe.session.guest import Guest
from gdb_kprobe.session.probes import Hit, Probe, Site
from gdb_kprobe.session.traps import Gate, Trap
from gdb_kprobe.target.protocols import Cpus
from gdb_kprobe.x86 import step
from gdb_kprobe.x86.relocate import StepCopy, copy_for_step

MAX_STEPS = 64
"""Steps that may come back with the program counter unmoved before we give up. One in 500 does."""

MAX_ITERATIONS = 4096
"""Iterations of a repeated instruction that are stepped at one hit; in between, a Ctrl-C is heard."""


_Key = tuple[VirtAddr, int]
_Called = tuple[Probe, ...]
_Memory = tuple[tuple[int, bytes], ...]


class Outcome(Enum):
    """What a stop at the #BP entry was."""

    FOREIGN = auto()
    """Not a probe of ours: the guest goes its own way."""
    HANDLED = auto()
    """A hit; the vCPU may go on."""
    STOP = auto()
    """A hit whose handler asked for the prompt; the vCPU stands at the probe point."""


class StubDispatcher:
    """Handles hits of the sites in *sites* on the stopped vCPUs of *machine*.

    *sites* is the session's own table, by address. *on_hit* is told of every hit. *way_to* says where a vCPU is to be
    resumed so that it gets to an address. *gate* is where hits stop. *interruptible* is the adapter's: it is around a
    user's handler, within a dispatch that is not interrupted.
    """

    def __init__(
        self,
        machine: Cpus,
        guest: Guest,
        sites: Mapping[VirtAddr, Site],
        on_hit: Callable[[Hit], None],
        way_to: Callable[[CpuId, VirtAddr], VirtAddr],
        gate: Gate,
        interruptible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._machine = machine
        self._guest = guest
        self._sites = sites
        self._on_hit = on_hit
        self._way_to = way_to
        self._gate = gate
        self._interruptible = interruptible
        # Hits that are not through: the instruction faulted, or the user got the prompt before it. The same task comes
        # back to the int3 later, maybe on another vCPU. (address, RSP) -> the probes that were called.
        self._faulted: dict[_Key, _Called] = {}
        self._stopped: dict[_Key, _Called] = {}
        self._arrived: list[VirtAddr] = []
        # What is being written to a vCPU and its stack, and the step that is being made: for who must finish it.
        self._writing: tuple[CpuId, _Memory, dict[str, int]] | None = None
        self._stepping: tuple[CpuId, Site, dict[str, int], _Called] | None = None
        self.failed: list[Probe] = []
        """Probes whose handler raised; the session takes them away."""

    def trap_of(self, cpu: CpuId) -> Trap | None:
        """The trap that *cpu* stands at, or ``None`` when it does not stand at the gate."""
        return self._gate.trap_of(self._machine, cpu)

    def site_of(self, trap: Trap) -> Site | None:
        """The site of ours that *trap* hit."""
        site = self._sites.get(trap.rip)
        return site if site is not None and site.armed and not trap.from_user else None

    def dispatch(self, cpu: CpuId) -> Outcome | None:
        """Handle the trap that *cpu* stands at; ``None`` when it stands somewhere else."""
        trap = self.trap_of(cpu)
        if trap is None:
            return None
        site = self.site_of(trap)
        if site is None:
            return Outcome.FOREIGN
        try:
            return self._hit(cpu, trap, site)
        except ConnectionLostError:
            raise
        except BaseException:
            # Left alone it would count as missed, or the guest's own handler would run, which knows nothing of it.
            self.undo_trap(cpu)
            raise

    def arrive(self, cpu: CpuId, site: Site) -> tuple[bool, _Called]:
        """*cpu* is at the instruction of *site*, without a trap: a hit, unless it is one that has rested there.

        Returns whether to stop for the user, and the probes whose condition held.
        """
        values = self._machine.read_registers(cpu)
        called = self._stopped.pop((site.addr, values["rsp"]), None)
        if called is not None:
            return False, called
        regs = Registers(values)
        stop, called = self._run_handlers(cpu, site, regs)
        if regs.changed:
            self._write(cpu, {name: values[name] for name in regs.changed})
        return stop, called

    def rest(self, site: Site, rsp: int, called: _Called) -> None:
        """A vCPU stays at the instruction of *site*, at the hit that :meth:`arrive` has made of *called*.

        What was only counted is taken back; a handler has run, and is not to run again.
        """
        if any(probe.needs_host for probe in called):
            self._stopped[site.addr, rsp] = called
            return
        for probe in called:
            probe.count(hits=-1)

    def undo_trap(self, cpu: CpuId) -> bool:
        """Send a vCPU that stands at the #BP entry because of a site of ours back to the probed instruction.

        For when the site's text is about to be restored: no handler runs, nothing is counted.
        """
        trap = self.trap_of(cpu)
        if trap is None or self.site_of(trap) is None:
            return False
        self._write(cpu, trap.context)
        return True

    def complete(self) -> None:
        """Bring a dispatch to its end that the loss of the connection cut off; no handler runs."""
        if self._writing is not None:
            cpu, memory, registers = self._writing
            self._write(cpu, registers, memory)
        if self._stepping is not None:
            cpu, site, before, called = self._stepping
            self._machine.drop_trap_flag(cpu)
            after = self._machine.read_registers(cpu)
            self._fix_up(cpu, site, before, after if step.stepped(_copy_at(site), after) else None, called)

    def awaits(self, addr: VirtAddr) -> bool:
        """Whether a hit at *addr* has stopped for the user: its vCPU comes to the int3 again, which is the same hit."""
        return any(at == addr for at, _ in self._stopped)

    def take_arrived(self) -> list[VirtAddr]:
        """Where hits have come that were awaited, since the last call."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def forget_stopped(self) -> None:
        """The user has moved the program counter: a stopped probe's instruction is not what is executed next."""
        self._stopped.clear()

    def forget_all(self) -> None:
        """The machine is at another moment: nothing that was under way is."""
        self._faulted.clear()
        self._stopped.clear()
        self._arrived.clear()
        self._writing = self._stepping = None

    def forget(self, site: Site) -> None:
        """The int3 of *site* is gone: nobody comes back to it."""
        for table in (self._faulted, self._stopped):
            for key in [key for key in table if key[0] == site.addr]:
                del table[key]

    # -- private ------------------------------------------------------------------------------------------------

    def _hit(self, cpu: CpuId, trap: Trap, site: Site) -> Outcome:
        values = self._machine.read_registers(cpu)
        values.update(trap.context, cs=trap.cs)
        regs = Registers(values)
        key = (trap.rip, trap.rsp)
        called = self._faulted.pop(key, None)
        if key in self._stopped:
            called = self._stopped.pop(key)
            self._arrived.append(trap.rip)
        for watcher in site.watchers:
            # The fault was fixed up: the instruction is not executed again.
            self._faulted.pop((watcher, trap.rsp), None)

        stop = False
        if called is None:
            stop, called = self._run_handlers(cpu, site, regs)
        frame = {name: values[name] for name in (*trap.context, *regs.changed)}
        if "rip" in regs.changed:
            # The handler chose where to go on: the instruction is skipped, and no post-handler runs.
            if not stop:
                frame["rip"] = self._way_to(cpu, VirtAddr(frame["rip"]))
            self._write(cpu, frame)
            return Outcome.STOP if stop else Outcome.HANDLED
        if stop:
            self._stopped[trap.rip, frame["rsp"]] = called
            self._write(cpu, frame)
            return Outcome.STOP

        frame["rip"] = site.plan.slot.code
        if site.plan.rung is Rung.SINGLE_STEP:
            values.update(frame)
            # Known before the vCPU is in the slot: who finishes this must not take the hit for another one.
            self._stepping = cpu, site, values, called
            self._write(cpu, frame)
            return Outcome.STOP if self._single_step(cpu, site, values, called) else Outcome.HANDLED
        self._write(cpu, frame)
        return Outcome.HANDLED

    def _write(self, cpu: CpuId, registers: dict[str, int], memory: _Memory = ()) -> None:
        """Write to the stack and to the registers of *cpu*; cut off, it can be done again by :meth:`complete`."""
        self._writing = cpu, memory, registers
        for addr, data in memory:
            if not self._machine.write_current(cpu, VirtAddr(addr), data):
                raise TargetError(
                    f"vCPU {cpu}: cannot write the stack at {addr:#x} after a single step",
                    "'kprobe detach', and look at the guest's stack pointer",
                )
        self._machine.write_registers(cpu, registers)
        self._writing = None

    def _run_handlers(self, cpu: CpuId, site: Site, regs: Registers) -> tuple[bool, _Called]:
        """Call what is to be called; whether to stop for the user, and the probes whose condition held."""
        stop = False
        called: list[Probe] = []
        next_ip = offset(site.addr, site.plan.insn.length)
        for probe in tuple(site.probes):
            condition = probe.spec.condition
            with regs.shown_at(site.addr if probe.place is None else probe.place.addr):
                if not probe.enabled or (condition is not None and not condition.evaluate(regs)):
                    continue
                called.append(probe)
                probe.count(hits=1)
                self._on_hit(Hit(probe, cpu, tuple((arg, regs[arg.register]) for arg in probe.spec.args)))
                if probe.pre is not None:
                    stop |= self._call(
                        probe, probe.pre, HitContext(probe.name, probe.hits, cpu, regs, next_ip, self._machine)
                    )
        return stop, tuple(called)

    def _call(self, probe: Probe, handler: Handler, context: HitContext) -> bool:
        """Run a user's handler. When it raises, what it did to the registers is undone, and the guest goes on."""
        before = context.regs.save()
        try:
            with self._interruptible():
                returned = handler(context)
        except KeyboardInterrupt:
            context.regs.restore(before)
            return True
        except Exception:
            context.regs.restore(before)
            probe.last_error = traceback.format_exc()
            probe.count(missed=1)
            self.failed.append(probe)
            return False
        return context.stop_requested or returned is True

    def _single_step(self, cpu: CpuId, site: Site, before: dict[str, int], called: _Called) -> bool:
        """Step the copy in the slot and put right what it did relative to the slot; whether to stop for the user."""
        after = self._fix_up(cpu, site, *self._step(cpu, site, before), called)
        if after is None:
            return False
        stop = site.needs_post and self._run_post(cpu, after, called)
        rip = VirtAddr(after["rip"])
        if not stop and self._way_to(cpu, rip) != rip:
            self._write(cpu, {"rip": self._way_to(cpu, rip)})
        return stop

    def _fix_up(
        self, cpu: CpuId, site: Site, before: dict[str, int], after: dict[str, int] | None, called: _Called
    ) -> dict[str, int] | None:
        """Put right what the step left in *after* (``None``: the instruction is not through).

        Returns the registers after the instruction; ``None`` when it is not through: not executed, or it has faulted.
        """
        copy = _copy_at(site)

        def read_stack(addr: int, size: int) -> bytes:
            data = self._machine.read_current(cpu, VirtAddr(addr), size)
            if data is None:
                raise TargetError(f"the stack at {addr:#x} is not mapped after the single step at {site.addr:#x}")
            return data

        key = (site.addr, before["rsp"])
        if after is None:
            # The guest takes the int3 again, which is the same hit and not another one.
            fix, faulted = step.StepFixup({"rip": site.addr}), True
        elif step.outcome(copy, before, after, self._is_exception_entry) is step.StepOutcome.FAULTED:
            # The guest's handler sees the fault where the instruction really is, so that its exception table works.
            # When it returns, the instruction runs into the int3 again, which is the same hit and not another one,
            # or goes on at the fixup, where a site of its own tells us.
            fix, faulted = step.fix_up_fault(copy, after, read_stack), True
        else:
            fix, faulted = step.fix_up(copy, after, read_stack), False
        # From here on it is not the step that is to be finished, but these writes.
        self._writing, self._stepping = (cpu, fix.memory, fix.registers), None
        if faulted:
            self._faulted[key] = called
        self._write(cpu, fix.registers, fix.memory)
        return None if after is None or faulted else {**after, **fix.registers}

    def _run_post(self, cpu: CpuId, values: dict[str, int], called: _Called) -> bool:
        stop = False
        regs = Registers(values)
        for probe in called:
            if probe.enabled and probe.post is not None:
                stop |= self._call(
                    probe, probe.post, HitContext(probe.name, probe.hits, cpu, regs, VirtAddr(regs.ip), self._machine)
                )
        if regs.changed:
            self._write(cpu, {name: values[name] for name in regs.changed})
        return stop

    def _step(self, cpu: CpuId, site: Site, before: dict[str, int]) -> tuple[dict[str, int], dict[str, int] | None]:
        """Step until the instruction is through; the registers before the last step, and after it.

        ``None`` instead of the latter: nothing was executed, or a repeated instruction has very many iterations left.
        """
        copy = _copy_at(site)
        iterations = min(step.most_steps(copy.insn, before), MAX_ITERATIONS)
        unmoved = 0
        while iterations and unmoved < MAX_STEPS:
            self._machine.step(cpu)
            after = self._machine.read_registers(cpu)
            if step.stepped(copy, after):
                return before, after
            if step.is_repeating(copy, before, after):
                iterations -= 1
            else:
                unmoved += 1
            before = after
        return before, None

    def _is_exception_entry(self, addr: int) -> bool:
        return addr in self._guest.gates


def _copy_at(site: Site) -> StepCopy:
    """What the slot of *site*, of the single-step rung, holds."""
    return copy_for_step(site.plan.insn, site.plan.slot.code)
