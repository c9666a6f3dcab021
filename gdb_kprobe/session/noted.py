"""Probes that are noted: defined while there is no guest, or of a guest that is no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from gdb_kprobe.errors import KprobeError, NameTakenError
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.session import Session


class NotedProbes:
    """They are armed in the next guest, in the order in which they were noted."""

    def __init__(self) -> None:
        self._probes: list[Probe] = []

    def __iter__(self) -> Iterator[Probe]:
        return iter(tuple(self._probes))

    def __len__(self) -> int:
        return len(self._probes)

    def add(self, probe: Probe) -> None:
        """Note *probe*.

        :raises NameTakenError: one of that name is noted.
        """
        if any(other.name == probe.name for other in self._probes):
            raise NameTakenError(f"there is a probe named {probe.name} already", f"'kprobe delete {probe.name}' first")
        self._probes.append(probe)

    def remove(self, probes: Iterable[Probe]) -> None:
        """Forget *probes*, as far as they are noted: those themselves, and not others of their names."""
        gone = {id(probe) for probe in probes}
        self._probes = [probe for probe in self._probes if id(probe) not in gone]

    def keep(self, session: Session) -> None:
        """Note all probes of *session*, whose guest is no more."""
        for probe in session.probes:
            probe.place, probe.gone, probe.counter = None, False, None
            self._probes.append(probe)

    def arm(self, add: Callable[[Probe], object]) -> tuple[tuple[Probe, KprobeError], ...]:
        """Have *add* arm each; returns those that cannot be, with the reason. They are still noted.

        What else *add* raises ends it; those that were not tried are still noted, too.
        """
        refused: list[tuple[Probe, KprobeError]] = []
        waiting, self._probes = self._probes, []
        for number, probe in enumerate(waiting):
            try:
                add(probe)
            except KprobeError as error:
                self._probes.append(probe)
                refused.append((probe, error))
            except BaseException:
                self._probes += waiting[number:]
                raise
        return tuple(refused)
