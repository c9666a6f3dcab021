"""Counters in the region: written by the guest, read by the host, also while the guest runs.

What is in one is said in :mod:`gdb_kprobe.actions.lower`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from typing import Final

from gdb_kprobe.actions.lower import ENABLE, MISSED
from gdb_kprobe.model import PhysAddr, VirtAddr, offset
from gdb_kprobe.region.arena import Arena
from gdb_kprobe.region.directory import RegionObject
from gdb_kprobe.region.header import Header
from gdb_kprobe.target.protocols import LiveMemory, PhysicalMemory

SIZE: Final = 32
"""Bytes from one counter to the next; :data:`gdb_kprobe.actions.lower.COUNTER_SIZE` of them are in use."""
_ENABLED: Final = struct.Struct("<I")
_WORDS: Final = struct.Struct("<QQ")
_GIVEN: Final = b"\1".rjust(SIZE - ENABLE - _ENABLED.size, b"\0")
"""At the end of a counter that was ever given out."""
_GAP: Final = 1 << 12
"""Bytes between two counters that are read along."""


class Counter:
    """The counter at *addr* in the guest, which is at *phys* of its memory."""

    __slots__ = ("_memory", "addr", "phys")

    def __init__(self, memory: PhysicalMemory, addr: VirtAddr, phys: PhysAddr) -> None:
        self._memory = memory
        self.addr = addr
        self.phys = phys

    @property
    def missed_addr(self) -> VirtAddr:
        return offset(self.addr, MISSED)

    def read(self) -> tuple[int, int]:
        """Hits and misses, now.

        :raises GuestStateError: the machine runs, and its memory is not shared with the host.
        """
        hits, missed = _WORDS.unpack(self._memory.read_physical(self.phys, _WORDS.size))
        return hits, missed

    def start(self) -> None:
        """Have it stand at zero, and count from now on."""
        self._memory.write_physical(self.phys, bytes(ENABLE) + _ENABLED.pack(1) + _GIVEN)

    def add(self, hits: int, missed: int) -> None:
        """Add what the host has counted. The machine must be stopped: the guest adds to it too."""
        words = self.read()
        image = _WORDS.pack(words[0] + hits, words[1] + missed)
        self._memory.write_physical(self.phys, image)

    def enable(self, enabled: bool, live: LiveMemory | None = None) -> None:
        """Have it count, or not, from now on; *live* is the way to the memory of a machine that runs.

        :raises GuestStateError: there is none.
        """
        write = self._memory.write_physical if live is None else live.write_live
        write(offset(self.phys, ENABLE), _ENABLED.pack(enabled))


def read_counters(memory: PhysicalMemory, counters: Iterable[Counter]) -> dict[VirtAddr, tuple[int, int]]:
    """Hits and misses by address of the counter, now. What lies in one piece is read at once.

    :raises GuestStateError: the machine runs, and its memory is not shared with the host.
    """
    runs: list[list[Counter]] = []
    for counter in sorted(counters, key=lambda counter: counter.addr):
        if runs and counter.addr - runs[-1][-1].addr <= _GAP:
            runs[-1].append(counter)
        else:
            runs.append([counter])
    found = {}
    for run in runs:
        first = run[0].phys
        data = memory.read_physical(first, run[-1].phys + SIZE - first)
        for counter in run:
            hits, missed = _WORDS.unpack_from(data, counter.phys - first)
            found[counter.addr] = hits, missed
    return found


class Counters:
    """Hands out the counters of *header*'s region, from what *arena* gives."""

    def __init__(self, memory: PhysicalMemory, header: Header, arena: Arena) -> None:
        self._memory = memory
        self._header = header
        self._arena = arena
        self._free: list[Counter] = []
        self._quarantine: list[Counter] = []

    def take_over(self, objects: Collection[RegionObject], in_use: Collection[VirtAddr]) -> None:
        """Go on with the *objects* of an earlier session: those *in_use* are asked for by :meth:`at`.

        Others that were ever given out wait for :meth:`release`: a task may still add to them.
        """
        for found in objects:
            area = found.range(self._header.virt)
            data = self._memory.read_physical(self._header.physical(area.start), found.size)
            for at in range(0, found.size - SIZE + 1, SIZE):
                counter = self.at(offset(area.start, at))
                if not data[at : at + SIZE].endswith(_GIVEN):
                    self._free.append(counter)
                elif counter.addr not in in_use:
                    self._quarantine.append(counter)

    def at(self, addr: VirtAddr) -> Counter:
        """The counter at *addr*, with what it says."""
        return Counter(self._memory, addr, self._header.physical(addr))

    def allocate(self) -> Counter:
        """A counter that stands at zero.

        :raises RegionError: there is no room.
        """
        counter = self._free.pop() if self._free else self.at(offset(self._header.virt, self._arena.take(SIZE)))
        counter.start()
        return counter

    def free(self, counter: Counter) -> None:
        """Give *counter* back; it waits for :meth:`release`, for a task may be on the way to add to it."""
        self._quarantine.append(counter)

    def release(self) -> int:
        """No task is in code any more that adds to counters that were given back; returns how many there are."""
        released = len(self._quarantine)
        self._free += self._quarantine
        self._quarantine.clear()
        return released
