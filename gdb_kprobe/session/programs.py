"""The programs that probes run inside the guest, each made once."""

from __future__ import annotations

from gdb_kprobe.bpf.check import check
from gdb_kprobe.handlers.count import COUNTER, REGIONS, lower
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.guest import Place
from gdb_kprobe.session.probes import Probe


class Programs:
    """Makes handlers of definitions."""

    def __init__(self) -> None:
        self._known: dict[Condition | None, Program] = {}

    def handler(self, condition: Condition | None, counter: VirtAddr, place: Place | None) -> Handler:
        """What counts in *counter* the hits at *place* for which *condition* holds."""
        program = self._known.get(condition)
        if program is None:
            program = self._known[condition] = Program(check(lower(condition), REGIONS), COUNTER)
        return Handler(program, counter, None if place is None or not place.behind else place.addr)

    def handlers(self, probes: list[Probe]) -> tuple[Handler, ...]:
        """What the hits of *probes* run; those that have no counter run nothing."""
        return tuple(
            self.handler(probe.spec.condition, probe.counter.addr, probe.place)
            for probe in probes
            if probe.counter is not None
        )
