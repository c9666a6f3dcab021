"""Probes under the user's own steps: ``stepi`` executes one instruction of the guest's text, whatever is probed there.

A debugger steps by the stub, several times for one command, and says nothing in between. Stepped, a jump of ours would
lead into its detour, and an int3 to the #BP entry. So the places that the steps may come to keep the guest's own text
while it is stepped, and have a breakpoint of the debugger's instead, which tells of each arrival. The debugger steps
over it as over any other; the host does what a hit does.

A hit counts when its instruction is executed. A vCPU that comes to rest *at* a place has not executed it: its hit is
taken back, and made by whatever resumes it. A handler in Python has run by then; that hit stays, and is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gdb_kprobe.guest.guest import GuestSymbols
from gdb_kprobe.model import CpuId, VirtAddr
from gdb_kprobe.session.hits.stub import StubDispatcher
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.target.protocols import Breakpoints, Cpus

MOST_PLACES = 64
"""Places that are told of wherever they are; where more are armed, those of the functions that are being executed."""


@dataclass(frozen=True, slots=True)
class Step:
    """How the user is about to step: vCPU *cpu*, and no other one if *alone*.

    *frames* are the innermost program counters of its stack: the steps stay in these functions, but for whole calls.
    """

    cpu: CpuId
    alone: bool
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A vCPU is at the instruction of *site*, with *registers*; *called* are the probes whose condition held."""

    site: Site
    registers: Mapping[str, int]
    called: tuple[Probe, ...]


class Stepping:
    """What is told of while the user steps. *sites* are the session's."""

    def __init__(
        self,
        machine: Cpus,
        guest: GuestSymbols,
        breakpoints: Breakpoints,
        sites: SiteTable,
        dispatcher: StubDispatcher,
    ) -> None:
        self._machine = machine
        self._guest = guest
        self._breakpoints = breakpoints
        self._sites = sites
        self._dispatcher = dispatcher
        self._arrivals: dict[CpuId, _Arrival] = {}
        self._step: Step | None = None
        self.watched: frozenset[VirtAddr] = frozenset()
        """The sites that keep the guest's own text while the machine runs."""

    def prepare(self, step: Step) -> None:
        """The user is about to make *step*: choose what is told of.

        The debugger must know of it before: it steps over what it knows of where the vCPU stands.
        """
        self._step = step
        self.watched = frozenset(self._chosen(step))
        self._breakpoints.watch(self.watched)

    @property
    def is_prepared(self) -> bool:
        """Whether the machine is about to run, or has run, for a step of the user's."""
        return self._step is not None

    def start(self) -> None:
        """The machine is about to run. Where the stepped vCPU stands is its first arrival: no breakpoint tells of that.

        That a handler asks for the prompt is no reason not to step: the user has it.
        """
        step = self._step
        if step is None:
            return
        rip = VirtAddr(self._machine.read_register(step.cpu, "rip"))
        if rip in self.watched:
            self.arrive(step.cpu, rip)

    def arrive(self, cpu: CpuId, addr: VirtAddr) -> bool:
        """*cpu* has come to *addr* and not executed it: a hit, if it is one; whether the user gets the prompt."""
        site = self._sites.get(addr)
        if site is None or not site.armed or addr not in self.watched:
            return False
        before = self._arrivals.get(cpu)
        registers = self._machine.read_registers(cpu)
        if before is not None and before.site is site and _is_still_at(site, before.registers, registers):
            return False
        stop, called = self._dispatcher.arrive(cpu, site)
        self._arrivals[cpu] = _Arrival(site, self._machine.read_registers(cpu), called)
        return stop

    def end(self) -> None:
        """The machine has stopped for the user: take hits back whose instruction was not executed."""
        self._step = None
        arrivals, self._arrivals = self._arrivals, {}
        for cpu, arrival in arrivals.items():
            if self._machine.read_register(cpu, "rip") == arrival.site.addr:
                self._dispatcher.rest(arrival.site, self._machine.read_register(cpu, "rsp"), arrival.called)
        self._breakpoints.watch(frozenset())

    def forget(self) -> None:
        """The machine is at another moment."""
        self._arrivals.clear()

    def restored(self) -> None:
        """All text is the guest's own."""
        self.watched = frozenset()

    def _chosen(self, step: Step) -> Iterator[VirtAddr]:
        armed = [site for site in self._sites.values() if site.armed and _may_be_told(site)]
        if not step.alone or len(armed) > MOST_PLACES:
            functions = [self._guest.place_of(VirtAddr(addr)) for addr in step.frames]
            ranges = [range(function.start, function.end) for function in functions]
            armed = [site for site in armed if any(site.addr in code or site.plan.patch.range.end - 1 in code
                                                   for code in ranges)]  # fmt: skip
        if not step.alone:
            # A debugger steps over the breakpoint that another vCPU stands at, and does not tell of it.
            others = {self._machine.read_register(cpu, "rip") for cpu in self._machine.cpus() if cpu != step.cpu}
            armed = [site for site in armed if site.addr not in others]
        for site in armed:
            yield site.addr


def _may_be_told(site: Site) -> bool:
    """Whether a hit is all there is to it: nothing happens after the instruction, and no fault of it is followed."""
    return not site.needs_post and site.fixup is None and not site.watchers and not site.saved


def _is_still_at(site: Site, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether a step has left the vCPU at the same hit: it executed nothing, or one of several iterations."""
    if before["rsp"] != after["rsp"]:
        return False
    return before == after or site.plan.insn.has_repeat_prefix
