"""The one breakpoint at the guest's #BP entry, as gdb breakpoints go."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection

import gdb

from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.model import VirtAddr

_OF_THE_PROCESSOR = (
    gdb.BP_HARDWARE_BREAKPOINT,
    gdb.BP_HARDWARE_WATCHPOINT,
    gdb.BP_READ_WATCHPOINT,
    gdb.BP_ACCESS_WATCHPOINT,
)


class EntryBreakpoint(gdb.Breakpoint):
    """Internal, so that the user's list stays theirs; of the hardware kind, so that gdb writes no guest memory."""

    def __init__(self, addr: VirtAddr, on_stop: Callable[[], bool]) -> None:
        super().__init__(f"*{addr:#x}", type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)
        self._on_stop = on_stop

    def stop(self) -> bool:
        """Called by gdb at each stop there; ``True`` gives the user the prompt.

        A Ctrl-C that came meanwhile is not lost: it ends the run. What was not dispatched then is, when the machine
        is settled for the prompt.
        """
        try:
            with uninterrupted():
                return self._on_stop()
        except KeyboardInterrupt:
            return True


class PlaceBreakpoint(gdb.Breakpoint):
    """Tells of each arrival at a place while the user steps; internal, and of the hardware kind, as the other."""

    def __init__(self, addr: VirtAddr, on_arrival: Callable[[VirtAddr], bool]) -> None:
        super().__init__(f"*{addr:#x}", type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)
        self._addr = addr
        self._on_arrival = on_arrival

    def stop(self) -> bool:
        """Called by gdb when a vCPU is there; ``True`` gives the user the prompt."""
        try:
            with uninterrupted():
                return self._on_arrival(self._addr)
        except KeyboardInterrupt:
            return True


class GdbBreakpoints:
    """:class:`~gdb_kprobe.target.protocols.Debugger`: gdb's own breakpoints, and its Ctrl-C."""

    def __init__(
        self,
        on_stop: Callable[[], bool],
        on_arrival: Callable[[VirtAddr], bool] = lambda addr: False,
        interruptible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._interruptible = interruptible
        self._on_stop = on_stop
        self._on_arrival = on_arrival
        self._breakpoint: EntryBreakpoint | None = None
        self._kept = False
        self._places: dict[VirtAddr, PlaceBreakpoint] = {}

    def insert(self, addr: VirtAddr) -> None:
        if self._breakpoint is None or not self._breakpoint.is_valid():
            self._breakpoint = EntryBreakpoint(addr, self._on_stop)
        self._kept = True

    def remove(self, addr: VirtAddr) -> None:
        """gdb allows no deleting inside ``stop()``; then the breakpoint goes at the next :meth:`tidy`."""
        self._kept = False

    def tidy(self) -> None:
        """Delete the breakpoint if it is not wanted any more. Not from inside ``stop()``."""
        if not self._kept and self._breakpoint is not None:
            if self._breakpoint.is_valid():
                self._breakpoint.delete()
            self._breakpoint = None

    @property
    def any_inserted(self) -> bool:
        """Whether QEMU has breakpoints while the guest runs: ours, or the user's."""
        return self._kept or bool(self._places) or any(mine.enabled for mine in gdb.breakpoints())

    def is_taken(self, addr: VirtAddr) -> bool:
        return addr in user_breakpoints()

    def taken(self) -> set[int]:
        return user_breakpoints()

    def watch(self, addrs: Collection[VirtAddr]) -> None:
        for addr in [addr for addr in self._places if addr not in addrs]:
            place = self._places.pop(addr)
            if place.is_valid():
                place.delete()
        for addr in addrs:
            if addr not in self._places:
                self._places[addr] = PlaceBreakpoint(addr, self._on_arrival)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        return self._interruptible()

    def hardware_taken(self) -> int:
        return len(self._places) + sum(
            max(1, sum(location.enabled for location in mine.locations))
            for mine in gdb.breakpoints()
            if mine.enabled and mine.number > 0 and mine.type in _OF_THE_PROCESSOR
        )


def user_breakpoints() -> set[int]:
    """The addresses of the user's enabled code breakpoints, those of ``until`` and its like included."""
    return _momentary() | {
        location.address
        for mine in gdb.breakpoints()
        if mine.enabled and mine.number > 0 and mine.type in (gdb.BP_BREAKPOINT, gdb.BP_HARDWARE_BREAKPOINT)
        for location in mine.locations
        if location.enabled and location.address is not None
    }


_MOMENTARY = re.compile(r"^\S+\s+(?:until|finish)\s+\S+\s+y\s+(0x[0-9a-f]+)", re.MULTILINE)
"""A line of ``maintenance info breakpoints``: what ``until``, ``advance`` and ``finish`` make, for one stop."""


def _momentary() -> set[int]:
    text = gdb.execute("maintenance info breakpoints", to_string=True) or ""
    return {int(addr, 16) for addr in _MOMENTARY.findall(text)}
