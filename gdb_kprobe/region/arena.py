"""Room for many small things of a kind: objects of the region that are asked for as it fills, each twice the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

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
        if self._next + size > self._end:
            self.use(self._more(size))
        at = self._next
        self._next += size
        return at

    def use(self, found: RegionObject, used: int = 0) -> None:
        """Give out what is in *found*, an object of zeros from *used* bytes on; what is left of the last one is not."""
        self._next, self._end = found.start + used, found.end

    def _more(self, size: int) -> RegionObject:
        found = self._allocate(max(self._size, size))
        self._size = min(2 * self._size, _MOST)
        return found
