"""The records of a region: the patched places, each written down before its text is patched."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes.patch import MAX_PATCH, CodePatch, is_fill
from gdb_kprobe.kprobes.slots import INT3, Slot
from gdb_kprobe.model import PhysAddr, Rung, VirtAddr, offset
from gdb_kprobe.region.arena import Arena
from gdb_kprobe.region.directory import Kind, RegionObject, objects_of
from gdb_kprobe.region.header import Header, HeaderStore
from gdb_kprobe.target.protocols import PhysicalMemory

_RECORD: Final = struct.Struct("<IBBHQQQ16s16sQ")
RECORD_SIZE: Final = 72
_CHECKSUM: Final = 6
"""Offset of the checksum in a record: the lower half of a CRC-32, of the cookie and the rest of the record."""
_JUMP: Final = b"\xe9"
_CALL: Final = b"\xe8"
_BRANCH_SIZE: Final = 5
_RUNGS: Final = (Rung.SINGLE_STEP, Rung.BOOSTED, Rung.OPTIMIZED)


class RecordKind(IntEnum):
    """What a patched place is."""

    SITE = 1
    """A probed instruction."""
    HOOK = 2
    """The call in the guest's #BP path that leads to our dispatcher; the slot is the gate's."""


@dataclass(frozen=True, slots=True)
class Record:
    """One patched place: the patch, its slot and its rung.

    *borrowed* is the record of the guest's ftrace that is marked for it, a ``struct dyn_ftrace``, if there is one.
    """

    patch: CodePatch
    slot: Slot
    rung: Rung
    kind: RecordKind = RecordKind.SITE
    borrowed: VirtAddr | None = None

    def pack(self, cookie: bytes) -> bytes:
        """The bytes of it in the region of that *cookie*."""
        old, new = self.patch.old, self.patch.new
        assert len(old) <= MAX_PATCH
        body = _RECORD.pack(
            self.kind,
            len(old),
            _RUNGS.index(self.rung),
            0,
            self.patch.addr,
            self.slot.start,
            self.slot.size,
            old,
            new,
            self.borrowed or 0,
        )
        return sealed(body.ljust(RECORD_SIZE, b"\0"), cookie)

    @classmethod
    def unpack(cls, data: bytes, cookie: bytes) -> Record | None:
        """Return the record in *data*, in the region of that *cookie*; ``None``: it is not in use.

        :raises RegionError: it is damaged.
        """
        kind, length, rung, _, addr, slot, size, old, new, borrowed = _RECORD.unpack(data[: _RECORD.size])
        if not any(data):
            return None
        if data != sealed(data, cookie):
            raise RegionError("its checksum is wrong")
        if kind not in (RecordKind.SITE, RecordKind.HOOK) or rung >= len(_RUNGS) or not 0 < length <= MAX_PATCH:
            raise RegionError(f"it is of kind {kind}, rung {rung} and {length} bytes")
        patch = CodePatch(VirtAddr(addr), old[:length], new[:length])
        return cls(
            patch, Slot(VirtAddr(slot), size), _RUNGS[rung], RecordKind(kind), VirtAddr(borrowed) if borrowed else None
        )

    def why_not(self, header: Header) -> str | None:
        """Say why it is no record of *header*'s region, whatever its checksum is; or None.

        What undoes a record writes *old* where there is *new*. So *new* must be what is put over text, and lead to
        where our code is: else the forger of a record chooses what is written, and over what.
        """
        addr, new = self.patch.addr, self.patch.new
        if addr + len(new) >= 1 << 64 or self.patch.range.overlaps(header.range):
            return f"{addr:#x} is no place of text"
        if not header.code.start <= self.slot.start < self.slot.start + self.slot.size <= header.code.end:
            return f"its slot is at {self.slot.start:#x} (+{self.slot.size:#x})"
        target = None
        if len(new) >= _BRANCH_SIZE:
            target = offset(addr, _BRANCH_SIZE + int.from_bytes(new[1:_BRANCH_SIZE], "little", signed=True))
        if self.kind is RecordKind.HOOK:
            is_ours = (
                new.startswith(_CALL) and target is not None and target in header.code and len(new) == _BRANCH_SIZE
            )
        elif self.rung is Rung.OPTIMIZED:
            is_ours = new.startswith(_JUMP) and target == self.slot.code and is_fill(new[_BRANCH_SIZE:])
        else:
            is_ours = new.startswith(INT3) and is_fill(new[1:])
        return None if is_ours else f"{new.hex(' ')} at {addr:#x} is no patch of ours"


def sealed(data: bytes, cookie: bytes) -> bytes:
    """The record *data* with its checksum."""
    end = _CHECKSUM + 2
    checksum = zlib.crc32(cookie + data[:_CHECKSUM] + data[end:]) & 0xFFFF
    return data[:_CHECKSUM] + checksum.to_bytes(2, "little") + data[end:]


class Records:
    """The records of one session, in the region of *store*'s header."""

    def __init__(self, memory: PhysicalMemory, store: HeaderStore, arena: Arena) -> None:
        self._memory = memory
        self._store = store
        self._arena = arena
        self._at: dict[VirtAddr, PhysAddr] = {}
        self._free: list[PhysAddr] = []

    def take_over(self, kept: Iterable[Record]) -> None:
        """Go on with the records of the session before: those *kept* stay, all others are cleared."""
        wanted = {record.patch.addr: record for record in kept}
        cookie = self._store.header.cookie
        for at, data in record_cells(self._memory, self._store.header):
            if not any(data):
                continue  # it may be the rest of an object that is given out yet
            found = next((record for record in wanted.values() if record.pack(cookie) == data), None)
            if found is None:
                self._memory.write_physical(at, bytes(RECORD_SIZE))
                self._free.append(at)
            else:
                self._at[found.patch.addr] = at

    def add(self, record: Record) -> None:
        """Write *record*, before its site is patched. That of the same place is replaced.

        :raises RegionError: there is no room.
        """
        at = self._at.get(record.patch.addr)
        if at is None:
            at = self._free.pop() if self._free else offset(self._store.header.phys, self._arena.take(RECORD_SIZE))
        self._at[record.patch.addr] = at
        self._memory.write_physical(at, record.pack(self._store.header.cookie))

    def remove(self, addr: VirtAddr) -> None:
        """Clear the record of the site *addr*, after its text was restored."""
        at = self._at.pop(addr)
        self._memory.write_physical(at, bytes(RECORD_SIZE))
        self._free.append(at)


def iter_records(memory: PhysicalMemory, header: Header) -> Iterator[Record]:
    """All records in use, in the order to restore them: the hook last, for without it a site's int3 leads nowhere.

    Those that are damaged are left out.

    :raises RegionError: the directory is damaged.
    """
    yield from read_records(memory, header)[0]


def read_records(memory: PhysicalMemory, header: Header) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """The records of :func:`iter_records`, and what is wrong with those that are damaged. *header* is not.

    :raises RegionError: the directory is damaged.
    """
    assert not header.damage
    found: dict[VirtAddr, Record] = {}
    wrong = []
    for index, (_, data) in enumerate(record_cells(memory, header)):
        try:
            record = Record.unpack(data, header.cookie)
        except RegionError as error:
            wrong.append(f"record {index} of the region is damaged: {error.message}")
            continue
        if record is None:
            continue
        why = record.why_not(header)
        if why is None and record.patch.addr in found:
            why = f"{record.patch.addr:#x} has another one"
        if why is None:
            found[record.patch.addr] = record
        else:
            wrong.append(f"record {index} of the region is damaged: {why}")
    return tuple(sorted(found.values(), key=lambda record: record.kind)), tuple(wrong)


def clear_records(memory: PhysicalMemory, header: Header) -> None:
    """Have no records in *header*'s region."""
    for at, data in record_cells(memory, header):
        if any(data):
            memory.write_physical(at, bytes(RECORD_SIZE))


def record_cells(memory: PhysicalMemory, header: Header) -> Iterator[tuple[PhysAddr, bytes]]:
    """Where in *header*'s region there is room for a record, and what is there.

    :raises RegionError: the directory is damaged.
    """
    for found in objects_of(memory, header, Kind.RECORDS):
        yield from _cells_of(memory, header, found)


def _cells_of(memory: PhysicalMemory, header: Header, found: RegionObject) -> Iterator[tuple[PhysAddr, bytes]]:
    start = offset(header.phys, found.start)
    data = memory.read_physical(start, found.size)
    for at in range(0, found.size - RECORD_SIZE + 1, RECORD_SIZE):
        yield offset(start, at), data[at : at + RECORD_SIZE]
