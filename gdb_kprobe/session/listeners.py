"""Who is told of hits: all of them, or those of some probes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable

from gdb_kprobe.session.probes import Hit, Probe

Listener = Callable[[Hit], None]


class Listeners:
    """The listeners of a session. One that raises is dropped; :attr:`failed` has what it raised.

    A probe that nobody listens to is served as if there were no listener.
    """

    def __init__(self) -> None:
        self._all: list[tuple[Listener, tuple[Probe, ...] | None]] = []
        self.failed: list[str] = []

    def add(self, listener: Listener, probes: Iterable[Probe] | None) -> None:
        """Have *listener* told of the hits of *probes*; ``None``: of all probes, those that are defined later too.

        Which they are is settled here: the sites are served by it, whatever the caller does with a list later.

        :raises TypeError: *probes* is one probe; nothing is changed.
        """
        self._all.append((listener, None if probes is None else tuple(probes)))

    def remove(self, listener: Listener) -> None:
        """Do not tell *listener* any more; nothing happens when it was dropped."""
        self._all = [entry for entry in self._all if entry[0] != listener]

    def concern(self, probe: Probe) -> bool:
        """Whether a hit of *probe* is told to anyone."""
        return any(_names(probes, probe) for _, probes in self._all)

    def tell(self, hit: Hit) -> None:
        """Tell those who listen to the probe of *hit*."""
        for listener, probes in tuple(self._all):
            if not _names(probes, hit.probe):
                continue
            try:
                listener(hit)
            except Exception:
                self.failed.append(traceback.format_exc())
                self.remove(listener)


def _names(probes: Iterable[Probe] | None, probe: Probe) -> bool:
    """Whether *probe* itself is one of *probes*: two with the same values are two."""
    return probes is None or any(probe is other for other in probes)
