"""Run the guest for a time, or until a probe was hit so often, and come back with it stopped."""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.counters import need_live
from gdb_kprobe.gdbext.link import Link
from gdb_kprobe.gdbext.ticker import Ticker
from gdb_kprobe.session.probes import Probe, State

_INTERVAL = 0.01
"""Seconds between two looks at a counter."""


@dataclass(frozen=True, slots=True)
class Run:
    """How far a run of the guest has come.

    :ivar is_over: the guest is stopped again; ``False``: it runs, for the front end does not wait for it.
    :ivar is_reached: the hits were counted; of a run without a probe: the time has passed.
    :ivar hits: those of the probe since the guest was resumed; 0 without a probe.
    """

    is_over: bool
    is_reached: bool
    hits: int


class Until:
    """An end to come to: *seconds* have passed, or *probe* was hit *hits* times more."""

    def __init__(self, link: Link, seconds: float | None, probe: Probe | None, hits: int) -> None:
        self._link = link
        self._seconds = seconds
        self._probe = probe
        self._hits = hits
        self._before = 0
        self._is_reached = False
        most = seconds or _INTERVAL
        self._ticker = Ticker(link, most if probe is None else min(most, _INTERVAL), self._look)

    def run(self) -> Run:
        """Have the guest run until then, or until something else stops it.

        :raises GuestStateError: the guest runs already; or the probe is not armed, or its counter cannot be read while
            the guest runs.
        :raises KprobeError: the guest was reset meanwhile, or is gone.
        """
        if self._probe is not None:
            if self._link.session.state_of(self._probe) is not State.ARMED:
                raise GuestStateError(f"{self._probe.name} is not armed: it is never hit", "see 'kprobe list'")
            need_live(self._link, (self._probe,), "give a time instead, 'kprobe until SECONDS'")
            with self._link.stopped():
                self._before = self._probe.hits
        self._ticker.run()
        return Run(False, False, 0) if is_running() else Run(True, self._is_reached, self._seen)

    @property
    def _seen(self) -> int:
        return 0 if self._probe is None else self._probe.hits - self._before

    def _look(self) -> bool:
        if self._probe is not None:
            self._link.session.check_live(self._link.memory)
            self._is_reached = self._seen >= self._hits
            if self._is_reached:
                return True
        is_late = self._seconds is not None and self._ticker.elapsed >= self._seconds
        self._is_reached = is_late and self._probe is None
        return is_late
