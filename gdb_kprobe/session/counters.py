"""Counters in the region's data pages: written by the guest, read by the host, also while the guest runs.

What is in one is said in :mod:`gdb_kprobe.actions.lower`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection

from gdb_kprobe.actions.lower import ENABLE, MISSED
from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.session.header import Header
from gdb_kprobe.target.protocols import LiveMemory, PhysicalMemory

SIZE = 32
"""Bytes from one counter to the next; :data:`gdb_kprobe.actions.lower.COUNTER_SIZE` of them are in use."""
_ENABLED = struct.Struct("<I")
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
        return offset(self.addr, MISSED)

    def read(self) -> tuple[int, int]:
        """Hits and misses, now.

        :raises GuestStateError: the machine runs, and its memory is not shared with the host.
        """
        hits, missed = _WORDS.unpack(self._memory.read_physical(self._header.physical(self.addr), _WORDS.size))
        return hits, missed

    def start(self) -> None:
        """Have it stand at zero, and count from now on."""
        image = bytes(ENABLE) + _ENABLED.pack(1)
        self._memory.write_physical(self._header.physical(self.addr), image.ljust(SIZE, b"\0"))

    def add(self, hits: int, missed: int) -> None:
        """Add what the host has counted. The machine must be stopped: the guest adds to it too."""
        words = self.read()
        image = _WORDS.pack(words[0] + hits, words[1] + missed)
        self._memory.write_physical(self._header.physical(self.addr), image)

    def enable(self, enabled: bool, live: LiveMemory | None = None) -> None:
        """Have it count, or not, from now on; *live* is the way to the memory of a machine that runs.

        :raises GuestStateError: there is none.
        """
        write = self._memory.write_physical if live is None else live.write_live
        write(offset(self._header.physical(self.addr), ENABLE), _ENABLED.pack(enabled))


class Counters:
    """Hands out the counters of a region."""

    def __init__(self, memory: PhysicalMemory, header: Header) -> None:
        self._memory = memory
        self._header = header
        self._next = header.counters.start
        self._free: list[Counter] = []
        self._quarantine: list[Counter] = []

    def keep(self, addrs: Collection[VirtAddr]) -> None:
        """Do not give out what lies at or below any of *addrs*: somebody may still add to those.

        Those counters are asked for by :meth:`at`.
        """
        self._next = max([self._next, *(offset(addr, SIZE) for addr in addrs)])

    def at(self, addr: VirtAddr) -> Counter:
        """The counter at *addr*, with what it says."""
        return Counter(self._memory, self._header, addr)

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
        counter.start()
        return counter

    def free(self, counter: Counter) -> None:
        """Give *counter* back; it waits for :meth:`release`, for somebody may be on the way to add to it."""
        self._quarantine.append(counter)

    def release(self) -> int:
        """Nobody is in code any more that adds to counters that were given back; returns how many there are."""
        released = len(self._quarantine)
        self._free += self._quarantine
        self._quarantine.clear()
        return released
