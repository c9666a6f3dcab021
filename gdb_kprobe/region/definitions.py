"""What the probes are, in the region: so that whoever comes after a gdb that was killed can take them over.

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
from dataclasses import dataclass, field
from typing import Final

from gdb_kprobe.actions.lower import ENABLE
from gdb_kprobe.errors import RegionError
from gdb_kprobe.language.spec import DEFAULT_GROUP, ProbeSpec, default_name
from gdb_kprobe.linux.strings import is_printable
from gdb_kprobe.model import PAGE_SIZE, Rung, VirtAddr, offset
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
    """A probe of another session: *text* as it is parsed, the address of its *counter*, and what that says."""

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


@dataclass(slots=True)
class _Chunk:
    """One object with entries: by name of the probe, where its entry is, and what it is."""

    place: RegionObject
    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    end: int = 0

    @property
    def live(self) -> int:
        """Bytes of the entries in use."""
        return sum(len(entry) for _, entry in self.entries.values())


class Definitions:
    """The entries of *header*'s region, in the objects that *allocate* makes, kept in step with a session's probes."""

    def __init__(self, memory: PhysicalMemory, header: Header, allocate: Callable[[int], RegionObject]) -> None:
        self._memory = memory
        self._header = header
        self._allocate = allocate
        self._chunks: list[_Chunk] = []
        self._of: dict[str, _Chunk] = {}

    def add(self, spec: ProbeSpec, strategy: Rung | None, counter: VirtAddr, *, has_handler: bool) -> None:
        """Note a probe before it is armed. One that is noted is not noted twice.

        :raises RegionError: there is no room.
        """
        if spec.name in self._of:
            return
        text = text_of(spec).encode()
        size = -(-(_ENTRY.size + len(text)) // _ALIGN) * _ALIGN
        assert size <= _MOST, "a definition that is longer is refused by its parser"
        entry = _ENTRY.pack(size, 1, _RUNGS.index(strategy), counter - self._header.virt, has_handler) + text
        chunk = self._with_room(size)
        self._append(chunk, spec.name, entry.ljust(size, b"\0"))
        self._of[spec.name] = chunk

    def remove(self, name: str) -> None:
        """Forget the probe *name*; nothing happens when it is not noted."""
        chunk = self._of.pop(name, None)
        if chunk is not None:
            at, _ = chunk.entries.pop(name)
            self._write(chunk, at + 2, b"\0")

    def clear(self) -> None:
        """Forget all."""
        self._of.clear()
        for chunk in self._chunks:
            chunk.entries.clear()
            chunk.end = 0
            self._write(chunk, 0, bytes(_ALIGN))

    def _with_room(self, size: int) -> _Chunk:
        """:raises RegionError: there is none."""
        for chunk in reversed(self._chunks):
            if chunk.end + size <= chunk.place.size:
                return chunk
        for chunk in self._chunks:
            # Not for a few bytes each time.
            if chunk.live + size <= chunk.place.size // 2:
                self._compact(chunk)
                return chunk
        largest = max((chunk.place.size for chunk in self._chunks), default=PAGE_SIZE // 2)
        try:
            self._chunks.append(_Chunk(self._allocate(max(size, min(2 * largest, 16 * PAGE_SIZE)))))
        except RegionError:
            for chunk in self._chunks:
                if chunk.live + size <= chunk.place.size:
                    self._compact(chunk)
                    return chunk
            raise
        return self._chunks[-1]

    def _append(self, chunk: _Chunk, name: str, entry: bytes) -> None:
        # The end first, and the size last: cut off in between, the old end is the end.
        if chunk.end + len(entry) < chunk.place.size:
            self._write(chunk, chunk.end + len(entry), bytes(_ALIGN))
        self._write(chunk, chunk.end + _ALIGN, entry[_ALIGN:])
        self._write(chunk, chunk.end, entry[:_ALIGN])
        chunk.entries[name] = chunk.end, entry
        chunk.end += len(entry)

    def _compact(self, chunk: _Chunk) -> None:
        """Write those that are in use anew, from the start."""
        entries = {name: entry for name, (_, entry) in chunk.entries.items()}
        chunk.entries.clear()
        chunk.end = 0
        for name, entry in entries.items():
            self._append(chunk, name, entry)

    def _write(self, chunk: _Chunk, at: int, data: bytes) -> None:
        self._memory.write_physical(offset(self._header.phys, chunk.place.start + at), data)


def read_definitions(memory: PhysicalMemory, header: Header) -> tuple[Definition, ...]:
    """The probes that *header*'s region has definitions of, with their counts, in the order of definition.

    An entry that cannot be one of ours, for somebody has written over it, is left out.

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
