"""What the region has of each probe, whether or not there is a site for it: its counter, and its definition."""

from __future__ import annotations

from gdb_kprobe.errors import RegionError
from gdb_kprobe.language.spec import ProbeSpec
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.sites.quarantine import Quarantine


class ProbeStore:
    """The probes that *region* knows of."""

    def __init__(self, region: Region, quarantine: Quarantine) -> None:
        self._counters = region.counters
        self._definitions = region.definitions
        self._quarantine = quarantine

    def enter(self, probe: Probe) -> None:
        """Give *probe* a counter, if it does not bring its own, and write down what it is.

        :raises RegionError: there is no room.
        """
        try:
            self._enter(probe)
        except RegionError:
            if not self.make_room():
                raise
            self._enter(probe)

    def strike(self, probe: Probe) -> None:
        """Undo that; nothing happens when it was not done. What the counter said stays counted."""
        self._definitions.remove(probe.name)
        counter = probe.take_counter()
        if counter is not None:
            self._counters.free(counter)

    def retire(self, probe: Probe) -> Counter | None:
        """Undo that, but do not give the counter back yet: code that leads to it stays. It counts no more."""
        self._definitions.remove(probe.name)
        counter = probe.take_counter()
        if counter is not None:
            counter.enable(False)
        return counter

    def make_room(self) -> bool:
        """Give what no task can come back to any more free for use; whether there was any."""
        return self._quarantine.end()

    def clear(self) -> None:
        """Forget all definitions."""
        self._definitions.clear()

    def _enter(self, probe: Probe) -> None:
        if probe.counter is None:
            probe.counter = self._counters.allocate()
            probe.counter.enable(probe.enabled)
        if probe.is_the_users:
            self._definitions.add(probe.spec, probe.strategy, probe.counter.addr, has_handler=probe.needs_host)


def adopt(definition: Definition, spec: ProbeSpec, counter: Counter | None) -> Probe:
    """The probe of *definition*, which *spec* is parsed from: to be added to a session, with its counts.

    *counter* is where it goes on counting; ``None``: in a new one, and what the old one said is carried over.
    """
    probe = Probe(spec, enabled=definition.enabled, strategy=definition.strategy, counter=counter)
    if counter is None:
        probe.seen, probe.failures = definition.hits, definition.missed
    return probe
