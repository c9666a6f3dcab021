"""Which moment of which session the guest's memory is of: a mark in the region that is never the same twice.

A snapshot of a machine brings all its memory back as it was: other sites may be armed in it than the session knows of,
with other code in their slots. Nothing in the machine tells that one was loaded. So every act of a session leaves a new
random mark in the region's first page, and a session that finds another one there than it has written last writes
nothing.

But a snapshot of this session, with the same sites as now, is one that it can go on from. What may differ then is the
text: at the user's prompt it is the guest's own (:meth:`gdb_kprobe.session.session.Session.disarm_all`), else ours.

A mark has two halves. An act writes the first when it begins, and the second when it is over; each time it sees whether
the other half is still there, for the snapshot may have been loaded since it has looked last. So all of that goes
through the stub, one request after another: while QEMU loads, its answers wait, but what is read past it, from a file
that QEMU shares, is of no moment at all.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Final

from gdb_kprobe.errors import ConnectionLostError, GuestResetError, KprobeError, TargetError
from gdb_kprobe.model import PhysAddr, offset
from gdb_kprobe.region.layout import MARK_OFFSET, MARK_SIZE
from gdb_kprobe.region.region import Region
from gdb_kprobe.target.protocols import LiveMemory, PhysicalMemory

_HALF: Final = MARK_SIZE // 2

_KEPT = 4096
"""Moments of the same sites that are remembered."""


class MemoryState(Enum):
    """What guest memory is of."""

    NOW = auto()
    """This session's last act."""
    DISARMED = auto()
    """An earlier moment of the same sites, with the guest's own text."""
    ARMED = auto()
    """An earlier moment of the same sites, armed."""
    OTHER = auto()
    """Sites that this session has not, or no session's."""


class Generation:
    """The mark of the region at physical *start*; *is_disarmed* says how the text is. *memory* is that of the stub."""

    def __init__(self, memory: PhysicalMemory, start: PhysAddr, is_disarmed: Callable[[], bool]) -> None:
        self._memory = memory
        self._addr = offset(start, MARK_OFFSET)
        self._is_disarmed = is_disarmed
        self._mark = b""
        # The mark before, while memory may hold either: the connection can be lost at any packet.
        self._before = b""
        self._same: dict[bytes, bool] = {}
        self._depth = 0
        self._changed = False
        self._over = False
        self._lost = False

    @contextlib.contextmanager
    def act(self, *, changes: bool = True) -> Iterator[None]:
        """Around all that writes to the region or to text. *changes*: no earlier snapshot is of the same sites then.

        What is in between has a mark of its own, which is never gone on from.

        :raises GuestResetError: a snapshot was loaded right before, and nothing was done; or right in the middle, and
            another error came of it.
        """
        if not self._depth:
            self._open()
            if self._lost:
                raise was_loaded()
        self._depth += 1
        self._changed |= changes
        try:
            yield
        except KprobeError as error:
            if self.is_lost():
                raise was_loaded() from error
            raise
        finally:
            self._depth -= 1
            if not self._depth and not self._over and not self.is_lost():
                self._close()

    def change(self) -> None:
        """The sites are not the same any more."""
        with self.act():
            pass

    def go_on(self) -> None:
        """Memory is of an earlier moment of the same sites, and that is now."""
        found = self._memory.read_physical(self._addr, MARK_SIZE)
        if found in self._same:
            self._mark = found
        with self.act(changes=False):
            pass

    def change_live(self, memory: LiveMemory) -> None:
        """The same while the machine runs.

        :raises GuestStateError: its memory cannot be reached then.
        """
        self._same.clear()
        half = secrets.token_bytes(_HALF)
        memory.write_live(offset(self._addr, _HALF), half)
        self._mark = self._mark[:_HALF] + half

    def end(self) -> None:
        """The region is nobody's any more: write nothing there."""
        self._over = True

    def look(self, memory: PhysicalMemory | None = None) -> MemoryState:
        """Compare the mark in memory with the last one; while the machine runs, in a *memory* that can be read then.

        :raises TargetError: memory cannot be read.
        """
        if self._lost:
            return MemoryState.OTHER
        found = (memory or self._memory).read_physical(self._addr, MARK_SIZE)
        if found == self._mark or (self._before and found == self._before):
            return MemoryState.NOW
        disarmed = self._same.get(found)
        if disarmed is None:
            return MemoryState.OTHER
        return MemoryState.DISARMED if disarmed else MemoryState.ARMED

    @property
    def was_lost(self) -> bool:
        """Whether :meth:`is_lost` was found to be so."""
        return self._lost

    def is_lost(self) -> bool:
        """Whether the memory was exchanged in the middle of this act, or of an earlier one.

        Then some of it was written to what came.
        """
        with contextlib.suppress(TargetError, ConnectionLostError):  # no answer: the next look will see
            self._lost |= self._memory.read_physical(self._addr, MARK_SIZE) not in (self._mark, self._before)
        return self._lost

    def _open(self) -> None:
        if self._mark:
            self._write(0)
        else:
            self._mark = secrets.token_bytes(MARK_SIZE)
            self._memory.write_physical(self._addr, self._mark)

    def _close(self) -> None:
        if self._changed:
            self._same.clear()
            self._changed = False
        self._write(_HALF)
        self._same[self._mark] = self._is_disarmed()
        if len(self._same) > _KEPT:
            del self._same[next(iter(self._same))]

    def _write(self, at: int) -> None:
        """Write the half at *at* anew, and see that the other is the last one."""
        half = secrets.token_bytes(_HALF)
        self._before, self._mark = self._mark, self._mark[:at] + half + self._mark[at + _HALF :]
        self._memory.write_physical(offset(self._addr, at), half)
        self._before = b""
        self.is_lost()


_AGAIN = "'kprobe attach' again; the definitions are kept, and armed anew"


def was_reset() -> GuestResetError:
    """For a machine that has another boot's memory, or this one's from before the attach."""
    return GuestResetError(
        "the guest was reset (or another one loaded) since the attach; its probes are gone with its text", _AGAIN
    )


def was_loaded() -> GuestResetError:
    """For a region that holds another moment than the session's last one."""
    return GuestResetError(
        "the guest's memory is not as this session left it: a snapshot with other probes was loaded, or another gdb "
        "uses the same region; nothing is written",
        "'kprobe attach' again restores what the snapshot has armed, and arms your definitions anew; 'kprobe adopt' "
        "goes on with the snapshot's probes and their counts",
    )


def check_live(region: Region, generation: Generation, memory: LiveMemory) -> None:
    """Before *region* is read or written while the machine runs: is it still the session's of *moment*?

    A reset leaves the region's own bytes as they were. So the page-table entries that map it are looked at too, where
    *memory* has them. (What is read here may be of a moment in between: it is looked at again at the next stop.)

    :raises GuestResetError: it is not.
    """
    if all(memory.is_live(link.addr, 8) for link in region.links) and not region.is_mapped(region.memory):
        raise was_reset()
    if generation.look(region.memory) is MemoryState.OTHER:
        raise was_loaded()
