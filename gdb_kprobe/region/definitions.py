"""What the probes are, in the region: so that a gdb that comes after one that was killed can take them over.

The entries of an object lie one behind the other, each 8-byte aligned, up to the first whose size is 0, or the object's
end. All values are little-endian::

    +0  u16  size of the entry in bytes; 0: the end
    +2  u8   1: in use; 0: the probe was deleted
    +3  u8   the rung that was asked for (1, 2, 3: single-step, boosted, optimized; 0: the best)
    +4  u32  its counter: the offset from the region's start
    +8  u8   1: it has a handler in Python, which is in the memory of its gdb alone
    +9       its definition as text, up to the end; zeros behind it

Whether the probe is enabled, its hits and its misses are in its counter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.actions.lower import ENABLE
from gdb_kprobe.language.spec import DEFAULT_GROUP, ProbeSpec, default_name
from gdb_kprobe.linux.strings import is_printable
from gdb_kprobe.model import Rung, VirtAddr, offset
from gdb_kprobe.region.arena import Arena
from gdb_kprobe.region.counters import SIZE
from gdb_kprobe.region.directory import Kind, RegionObject, objects_of
from gdb_kprobe.region.header import Header
from gdb_kprobe.target.protocols import PhysicalMemory

_ENTRY: Final = struct.Struct("<HBBIB")
_ALIGN: Final = 8
_MOST: Final = 0xFFF8
"""Bytes of an entry, at the most."""
_RUNGS: Final = (None, Rung.SINGLE_STEP, Rung.BOOSTED, Rung.OPTIMIZED)
_COUNTER: Final = struct.Struct("<QQI")
assert _COUNTER.size == ENABLE + 4


@dataclass(frozen=True, slots=True)
class Definition:
    """A probe of another session, as the region has it.

    :ivar text: its definition.
    :ivar strategy: the one rung that was asked for; ``None``: the best there is.
    :ivar had_handler: it had a handler in Python, which was in the memory of its gdb alone.
    :ivar counter: the address of its counter.
    :ivar hits: what that says.
    :ivar missed: the same of misses.
    :ivar enabled: whether it was enabled.
    """

    text: str
    strategy: Rung | None
    had_handler: bool
    counter: VirtAddr
    hits: int
    missed: int
    enabled: bool


def text_of(spec: ProbeSpec) -> str:
    """The shortest definition that means *spec*: there may be very many."""
    plain = spec.group == DEFAULT_GROUP and not spec.args and spec.condition is None
    return f"p {spec.location}" if plain and spec.name == default_name(spec.location) else str(spec)


@dataclass(frozen=True, slots=True)
class _Room:
    """An entry, in use or not: its offset from the region's start, and its size."""

    at: int
    size: int


class Definitions:
    """The entries of *header*'s region, in the objects that *allocate* makes, kept in step with a session's probes.

    An entry is never moved: what is cut off at any moment has all the others.
    """

    def __init__(self, memory: PhysicalMemory, header: Header, allocate: Callable[[int], RegionObject]) -> None:
        self._memory = memory
        self._header = header
        self._allocate = allocate
        self._arena = Arena(self._more)
        self._of: dict[str, _Room] = {}
        self._free: list[_Room] = []
        self._objects: list[RegionObject] = []

    def add(self, spec: ProbeSpec, strategy: Rung | None, counter: VirtAddr, *, has_handler: bool) -> None:
        """Note a probe before it is armed. One that is noted is not noted twice.

        :raises RegionError: there is no room.
        """
        if spec.name in self._of:
            return
        text = text_of(spec).encode()
        size = -(-(_ENTRY.size + len(text)) // _ALIGN) * _ALIGN
        assert size <= _MOST, "a definition that is longer is refused by its parser"
        room = self._room(size)
        entry = _ENTRY.pack(room.size, 1, _RUNGS.index(strategy), counter - self._header.virt, has_handler) + text
        entry = entry.ljust(room.size, b"\0")
        # What says that it is one last: its size, or that it is in use.
        self._write(room.at + _ALIGN, entry[_ALIGN:])
        self._write(room.at, entry[:_ALIGN])
        self._of[spec.name] = room

    def remove(self, name: str) -> None:
        """Forget the probe *name*; nothing happens when it is not noted."""
        room = self._of.pop(name, None)
        if room is not None:
            self._write(room.at + 2, b"\0")
            self._free.append(room)

    def clear(self) -> None:
        """Forget all. Those that come then are written to objects of their own."""
        for found in self._objects:
            self._write(found.start, bytes(_ALIGN))
        self._of.clear()
        self._free.clear()
        self._objects.clear()
        self._arena.leave()

    def _room(self, size: int) -> _Room:
        """:raises RegionError: there is none."""
        fitting = min((room for room in self._free if room.size >= size), key=lambda room: room.size, default=None)
        if fitting is None or (fitting.size > 2 * size and self._arena.has_room(size)):
            return _Room(self._arena.take(size), size)
        self._free.remove(fitting)
        return fitting

    def _more(self, size: int) -> RegionObject:
        found = self._allocate(size)
        self._objects.append(found)
        return found

    def _write(self, at: int, data: bytes) -> None:
        self._memory.write_physical(offset(self._header.phys, at), data)


def read_definitions(memory: PhysicalMemory, header: Header) -> tuple[Definition, ...]:
    """The probes that *header*'s region has definitions of, with their counts, in the order of definition.

    An entry that cannot be one of ours, for the guest has written over it, is left out.

    :raises RegionError: the directory is not as a gdb_kprobe writes it.
    """
    counters = [found.range(header.virt) for found in objects_of(memory, header, Kind.COUNTERS)]
    definitions = []
    for entry in _entries(memory, header):
        _, _, rung, at, had_handler = _ENTRY.unpack_from(entry)
        counter = offset(header.virt, at)
        text = entry[_ENTRY.size :].rstrip(b"\0")
        known = not at % SIZE and any(counter in area for area in counters)
        if rung >= len(_RUNGS) or not known or not is_printable(text):
            continue
        hits, missed, enabled = _COUNTER.unpack(memory.read_physical(header.physical(counter), _COUNTER.size))
        definitions.append(
            Definition(text.decode("ascii"), _RUNGS[rung], bool(had_handler), counter, hits, missed, bool(enabled))
        )
    return tuple(definitions)


def forget_definitions(memory: PhysicalMemory, header: Header) -> None:
    """Have no definitions in *header*'s region."""
    for found in objects_of(memory, header, Kind.DEFINITIONS):
        memory.write_physical(offset(header.phys, found.start), bytes(_ALIGN))


def _entries(memory: PhysicalMemory, header: Header) -> Iterator[bytes]:
    for found in objects_of(memory, header, Kind.DEFINITIONS):
        data = memory.read_physical(offset(header.phys, found.start), found.size)
        at = 0
        while at + _ENTRY.size <= len(data):
            size, used, *_ = _ENTRY.unpack_from(data, at)
            if size < _ENTRY.size or size % _ALIGN or at + size > len(data):
                break
            if used:
                yield data[at : at + size]
            at += size
