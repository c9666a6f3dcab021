"""Counters in the region's data pages: written by the guest, read by the host, also while the guest runs.

Each is two words of 8 bytes: hits, and misses.
"""

from __future__ import annotations

import struct

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.session.header import Header
from gdb_kprobe.target.protocols import PhysicalMemory

SIZE = 16
_WORDS = struct.Struct("<QQ")


class Counter:
    """The counter at *addr* in the guest."""

    __slots__ = ("_header", "_memory", "addr")

    def __init__(self, memory: PhysicalMemory, header: Header, addr: VirtAddr) -> None:
        self._memory = memory
        self._header = header
        self.addr = addr

    @property
    def missed_addr(self) -> VirtAddr:
        return offset(self.addr, 8)

    def read(self) -> tuple[int, int]:
        """Hits and misses, now.

        :raises GuestStateError: the machine runs, and its memory is not shared with the host.
        """
        hits, missed = _WORDS.unpack(self._memory.read_physical(self._header.physical(self.addr), SIZE))
        return hits, missed

    def clear(self) -> None:
        self._memory.write_physical(self._header.physical(self.addr), bytes(SIZE))


class Counters:
    """Hands out the counters of a region."""

    def __init__(self, memory: PhysicalMemory, header: Header) -> None:
        self._memory = memory
        self._header = header
        self._next = header.counters.start
        self._free: list[Counter] = []

    def allocate(self) -> Counter:
        """A counter that stands at zero.

        :raises RegionError: all are in use.
        """
        if self._free:
            counter = self._free.pop()
        else:
            area = self._header.counters
            if self._next + SIZE > area.end:
                raise RegionError(
                    f"all {area.size // SIZE} counters of the region are in use",
                    "reserve a larger region (region.size in the profile), or delete probes",
                )
            counter = Counter(self._memory, self._header, self._next)
            self._next = offset(self._next, SIZE)
        counter.clear()
        return counter

    def free(self, counter: Counter) -> None:
        """Give *counter* back. No vCPU may be on its way to add to it."""
        self._free.append(counter)
