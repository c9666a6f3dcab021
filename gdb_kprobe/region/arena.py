"""Room for many small things of a kind: objects of the region that are asked for as it fills, each twice the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import PAGE_SIZE
from gdb_kprobe.region.directory import RegionObject

_MOST: Final = 16 * PAGE_SIZE
"""Bytes that are asked for at a time, at the most."""


class Arena:
    """Gives out memory from the objects that *allocate* makes, of zeros, of at least as many bytes as it is told."""

    def __init__(self, allocate: Callable[[int], RegionObject]) -> None:
        self._allocate = allocate
        self._next = 0
        self._end = 0
        self._size = PAGE_SIZE

    def take(self, size: int) -> int:
        """*size* bytes of zeros, all in one object: their offset in the region.

        :raises RegionError: there is no room.
        """
        if not self.has_room(size):
            found = self._more(size)
            self._next, self._end = found.start, found.end
        at = self._next
        self._next += size
        return at

    def has_room(self, size: int) -> bool:
        """Whether *size* bytes can be taken without another object."""
        return self._next + size <= self._end

    def leave(self) -> None:
        """Take nothing more from the objects there are: what is taken next is in another one."""
        self._next = self._end = 0

    def _more(self, size: int) -> RegionObject:
        try:
            found = self._allocate(max(self._size, size))
        except RegionError:
            found = self._allocate(size)  # in an almost full region
        self._size = min(2 * self._size, _MOST)
        return found
