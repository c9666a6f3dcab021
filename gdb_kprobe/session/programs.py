"""The programs that probes run inside the guest, each made once."""

from __future__ import annotations

from collections.abc import Iterable

from gdb_kprobe.bpf.check import check
from gdb_kprobe.handlers import filter as filters
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
        self._filters: dict[Condition, Program] = {}

    def handler(self, condition: Condition | None, counter: VirtAddr, place: Place | None) -> Handler:
        """What counts in *counter* the hits at *place* for which *condition* holds."""
        program = self._known.get(condition)
        if program is None:
            program = self._known[condition] = Program(check(lower(condition), REGIONS), COUNTER)
        return Handler(program, counter, _seen_at(place))

    def handlers(self, probes: list[Probe]) -> tuple[Handler, ...]:
        """What the hits of *probes* run; those that have no counter run nothing."""
        return tuple(
            self.handler(probe.spec.condition, probe.counter.addr, probe.place)
            for probe in probes
            if probe.counter is not None
        )

    def filters(self, probes: Iterable[Probe]) -> tuple[Handler, ...]:
        """What tells in the guest whether a hit is one of *probes*, for the host; empty when each hit may be one."""
        found = []
        for probe in probes:
            condition = probe.spec.condition
            if condition is None or probe.counter is None:
                return ()
            program = self._filters.get(condition)
            if program is None:
                checked = check(filters.lower(condition), REGIONS)
                program = self._filters[condition] = Program(checked, COUNTER, returns=True)
            found.append(Handler(program, probe.counter.addr, _seen_at(probe.place)))
        return tuple(found)


def _seen_at(place: Place | None) -> VirtAddr | None:
    """What a program of a probe at *place* sees as ``ip``, if not the address that is patched."""
    return None if place is None or not place.behind else place.addr
