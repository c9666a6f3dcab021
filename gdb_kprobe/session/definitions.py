"""What the probes are, in the region: so that whoever comes after a gdb that was killed can take them over.

The entries lie one behind the other, each 8-byte aligned, up to the first whose size is 0. All values are
little-endian::

    +0  u16  size of the entry in bytes; 0: the end
    +2  u8   1: in use; 0: the probe was deleted
    +3  u8   the rung that was asked for (1, 2, 3: single-step, boosted, optimized; 0: the best)
    +4  u32  the number of its counter
    +8  u8   1: it has a handler in Python, which is in the memory of its gdb alone
    +9       its definition as text, up to the end; zeros behind it

Whether the probe is enabled, its hits and its misses are in its counter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.actions.lower import ENABLE
from gdb_kprobe.errors import RegionError
from gdb_kprobe.language.spec import DEFAULT_GROUP, ProbeSpec, default_name
from gdb_kprobe.linux.strings import is_printable
from gdb_kprobe.model import Rung, VirtAddr, offset
from gdb_kprobe.session.counters import SIZE, Counter
from gdb_kprobe.session.header import Header
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.target.protocols import PhysicalMemory

_ENTRY = struct.Struct("<HBBIB")
_ALIGN = 8
_PIECE = 1 << 14
"""Bytes that are read at a time: most often there are few probes."""
_RUNGS = (None, Rung.SINGLE_STEP, Rung.BOOSTED, Rung.OPTIMIZED)
_COUNTER = struct.Struct("<QQI")
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
    """The shortest definition that means *spec*: there is room for some 40 characters of each of very many probes."""
    plain = spec.group == DEFAULT_GROUP and not spec.args and spec.condition is None
    return f"p {spec.location}" if plain and spec.name == default_name(spec.location) else str(spec)


class Definitions:
    """The entries of one region, kept in step with the probes of its session."""

    def __init__(self, memory: PhysicalMemory, header: Header) -> None:
        """Start without any; the memory may hold anything."""
        self._memory = memory
        self._header = header
        self._entries: dict[str, tuple[int, bytes]] = {}
        self._end = 0
        forget_definitions(memory, header)

    def add(self, probe: Probe) -> None:
        """Note *probe*, which has a counter, before it is armed. One that is noted is not noted twice.

        :raises RegionError: there is no room.
        """
        assert probe.counter is not None
        if probe.name in self._entries:
            return
        text = text_of(probe.spec).encode()
        size = -(-(_ENTRY.size + len(text)) // _ALIGN) * _ALIGN
        number = (probe.counter.addr - self._header.counters.start) // SIZE
        entry = _ENTRY.pack(size, 1, _RUNGS.index(probe.strategy), number, probe.needs_host) + text
        if self._end + size + _ALIGN > self._header.definitions.size:
            self._compact()
        if self._end + size + _ALIGN > self._header.definitions.size:
            raise RegionError(
                f"the region has no room for the definition of {probe.name}",
                "reserve a larger region (region.size in the profile), or delete probes",
            )
        self._append(probe.name, entry.ljust(size, b"\0"))

    def remove(self, probe: Probe) -> None:
        """Forget *probe*; nothing happens when it is not noted."""
        at, _ = self._entries.pop(probe.name, (None, b""))
        if at is not None:
            self._write(at + 2, b"\0")

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self._end = 0
        forget_definitions(self._memory, self._header)

    def _append(self, name: str, entry: bytes) -> None:
        # The end first, and the size last: cut off in between, the old end is the end.
        self._write(self._end + len(entry), bytes(_ALIGN))
        self._write(self._end + _ALIGN, entry[_ALIGN:])
        self._write(self._end, entry[:_ALIGN])
        self._entries[name] = self._end, entry
        self._end += len(entry)

    def _compact(self) -> None:
        """Write those that are in use anew, from the start."""
        entries = {name: entry for name, (_, entry) in self._entries.items()}
        self._entries.clear()
        self._end = 0
        for name, entry in entries.items():
            self._append(name, entry)

    def _write(self, at: int, data: bytes) -> None:
        start = self._header.physical(self._header.definitions.start)
        self._memory.write_physical(offset(start, at), data)


def read_definitions(memory: PhysicalMemory, header: Header) -> tuple[Definition, ...]:
    """The probes that *header*'s region has definitions of, with their counts, in the order of definition.

    An entry that cannot be one of ours, for somebody has written over it, is left out.
    """
    found = (_read(memory, header, entry) for entry in _entries(memory, header))
    return tuple(definition for definition in found if definition is not None)


def forget_definitions(memory: PhysicalMemory, header: Header) -> None:
    """Have no definitions in *header*'s region."""
    memory.write_physical(header.physical(header.definitions.start), bytes(_ALIGN))


def _entries(memory: PhysicalMemory, header: Header) -> Iterator[bytes]:
    area = header.definitions
    data = b""
    for piece in range(area.start, area.end, _PIECE):
        data += memory.read_physical(header.physical(VirtAddr(piece)), min(_PIECE, area.end - piece))
        while len(data) >= _ENTRY.size:
            size, used, *_ = _ENTRY.unpack_from(data)
            if size < _ENTRY.size or size % _ALIGN:
                return
            if size > len(data):
                break
            if used:
                yield data[:size]
            data = data[size:]


def _read(memory: PhysicalMemory, header: Header, entry: bytes) -> Definition | None:
    _, _, rung, number, had_handler = _ENTRY.unpack_from(entry)
    counter = offset(header.counters.start, number * SIZE)
    text = entry[_ENTRY.size :].rstrip(b"\0")
    if rung >= len(_RUNGS) or counter not in header.counters or not is_printable(text):
        return None
    hits, missed, enabled = _COUNTER.unpack(memory.read_physical(header.physical(counter), _COUNTER.size))
    return Definition(text.decode("ascii"), _RUNGS[rung], bool(had_handler), counter, hits, missed, bool(enabled))


def adopt(definition: Definition, spec: ProbeSpec, counter: Counter | None) -> Probe:
    """The probe of *definition*, which *spec* is parsed from: to be added to a session, with its counts.

    *counter* is where it goes on counting; ``None``: in a new one, and what the old one said is carried over.
    """
    probe = Probe(spec, enabled=definition.enabled, strategy=definition.strategy, counter=counter)
    if counter is None:
        probe.seen, probe.failures = definition.hits, definition.missed
    return probe
