"""The directory of a region: which objects are in it, written down in guest memory.

A later session (of a new gdb, after the old one was killed) finds all objects by it, of whichever kind: what is whose,
which memory is in use, and where to look for what. An entry is little-endian::

    +0   u16  kind; 0: the entry is free
    +2   u16  version of that kind's format
    +4   u32  owner: the number of the session that made the object
    +8   u32  offset of the object from the region's start, a multiple of the page size
    +12  u32  its size in bytes, likewise
    +16  u32  CRC-32 of the region's addresses and the entry up to here
    +20  u32  0

The first page of entries has a fixed place; further ones are objects of a kind of their own.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import PAGE_SIZE, AddressRange, VirtAddr, offset
from gdb_kprobe.region.header import Header, HeaderStore
from gdb_kprobe.region.layout import DIRECTORY_OFFSET
from gdb_kprobe.region.pages import Zone
from gdb_kprobe.target.protocols import PhysicalMemory

_ENTRY: Final = struct.Struct("<HHIII")
_CHECKSUM: Final = struct.Struct("<I4x")
ENTRY_SIZE: Final = _ENTRY.size + _CHECKSUM.size
_PER_PAGE: Final = PAGE_SIZE // ENTRY_SIZE

_FORGED = "the guest has written over it: reset the guest, then attach again"


class Kind(IntEnum):
    """What an object is. Numbers are never used again for something else."""

    DIRECTORY = 1
    """More entries."""
    RECORDS = 2
    """The patched places (:mod:`gdb_kprobe.region.records`)."""
    COUNTERS = 3
    """(:mod:`gdb_kprobe.region.counters`)."""
    DEFINITIONS = 4
    """What the probes are (:mod:`gdb_kprobe.region.definitions`)."""
    TABLE = 5
    """The probed addresses that the dispatcher in the guest looks up (:mod:`gdb_kprobe.kprobes.guest_dispatch`)."""
    CODE = 6
    """Slots, detours, handlers, the gate and the dispatcher."""


VERSIONS: Final = dict.fromkeys(Kind, 1)
"""The format of each kind that this code writes and reads."""
_KINDS: Final = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class RegionObject:
    """*size* bytes at *start*, an offset from the region's start. *kind* may be one that only a later version knows."""

    kind: int
    version: int
    owner: int
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def pages(self) -> tuple[int, int]:
        """Its first page, and how many it has."""
        return self.start // PAGE_SIZE, self.size // PAGE_SIZE

    @property
    def known(self) -> Kind | None:
        """Its kind; ``None``: one that this code does not know."""
        return _KINDS.get(self.kind)

    @property
    def zone(self) -> Zone:
        """What its pages are mapped for."""
        return Zone.CODE if self.kind == Kind.CODE else Zone.DATA

    @property
    def name(self) -> str:
        """What the user reads."""
        return f"kind {self.kind}" if self.known is None else self.known.name.lower()

    def range(self, virt: VirtAddr) -> AddressRange:
        """Where it is, in a region that is mapped at *virt*."""
        return AddressRange(offset(virt, self.start), offset(virt, self.end))

    def pack(self, header: Header) -> bytes:
        """The entry of it in the region of *header*."""
        data = _ENTRY.pack(self.kind, self.version, self.owner, self.start, self.size)
        return data + _CHECKSUM.pack(zlib.crc32(data, zlib.crc32(struct.pack("<QQ", header.virt, header.phys))))

    @classmethod
    def unpack(cls, data: bytes, header: Header) -> RegionObject | None:
        """The object of the entry *data* in the region of *header*; ``None``: it is free.

        :raises RegionError: it is none that was ever written.
        """
        found = cls(*_ENTRY.unpack_from(data))
        if not any(data):
            return None
        if data != found.pack(header):
            raise RegionError("the checksum of an entry of the region's directory is wrong", _FORGED)
        return found


class Directory:
    """The entries of the region of *store*'s header, kept in step with what is given out."""

    def __init__(self, memory: PhysicalMemory, store: HeaderStore) -> None:
        """Start without any, and write nothing yet; see :meth:`create` and :meth:`load`."""
        self._memory = memory
        self._store = store
        self._pages: list[int] = [DIRECTORY_OFFSET]
        self._at: dict[int, RegionObject] = {}
        self._free = list(range(_PER_PAGE))

    def create(self) -> None:
        """Have an empty first page (the memory may hold anything)."""
        self._memory.write_physical(offset(self._store.header.phys, DIRECTORY_OFFSET), bytes(PAGE_SIZE))

    def load(self) -> None:
        """Go on with what is there.

        :raises RegionError: it cannot be a directory of ours.
        """
        for index, found in _entries(self._memory, self._store.header, self._pages):
            self._at[index] = found
        self._free = [index for index in range(len(self._pages) * _PER_PAGE) if index not in self._at]

    def __iter__(self) -> Iterator[RegionObject]:
        return iter(tuple(self._at.values()))

    def of(self, kind: Kind) -> tuple[RegionObject, ...]:
        """Those of *kind*, in the order of their entries."""
        return tuple(found for _, found in sorted(self._at.items()) if found.kind == kind)

    @property
    def is_almost_full(self) -> bool:
        """Whether the next entry must be one for more entries."""
        return len(self._free) == 1

    def add(self, new: RegionObject) -> None:
        """Write *new* down; its memory is ready to be used as what it is."""
        index = min(self._free)
        self._write(index, new.pack(self._store.header))
        self._free.remove(index)
        self._at[index] = new
        if new.kind == Kind.DIRECTORY:
            self._extend(new)

    def remove(self, known: RegionObject) -> None:
        """Forget *known*. Pages of entries stay until the region goes."""
        assert known.kind != Kind.DIRECTORY
        index = self._index(known)
        self._write(index, bytes(ENTRY_SIZE))
        del self._at[index]
        self._free.append(index)

    def hand_over(self, known: RegionObject, owner: int) -> None:
        """Have *known* belong to *owner*."""
        index = self._index(known)
        self._at[index] = replace(known, owner=owner)
        self._write(index, self._at[index].pack(self._store.header))

    def _index(self, known: RegionObject) -> int:
        return next(index for index, other in self._at.items() if other == known)

    def _extend(self, more: RegionObject) -> None:
        count = len(self._pages) * _PER_PAGE
        self._pages += range(more.start, more.end, PAGE_SIZE)
        self._free += range(count, len(self._pages) * _PER_PAGE)

    def _write(self, index: int, data: bytes) -> None:
        page, at = divmod(index, _PER_PAGE)
        self._memory.write_physical(offset(self._store.header.phys, self._pages[page] + at * ENTRY_SIZE), data)


def read_directory(memory: PhysicalMemory, header: Header) -> tuple[RegionObject, ...]:
    """The objects of *header*'s region, in the order of their entries.

    :raises RegionError: what is there cannot be a directory of ours.
    """
    return tuple(found for _, found in _entries(memory, header, [DIRECTORY_OFFSET]))


def why_damaged(memory: PhysicalMemory, header: Header) -> str:
    """Say why the directory of *header*'s region is none that was ever written; empty if there is no reason."""
    try:
        read_directory(memory, header)
    except RegionError as error:
        return error.message
    return ""


def objects_of(memory: PhysicalMemory, header: Header, kind: Kind) -> tuple[RegionObject, ...]:
    """Those of *kind*.

    :raises RegionError: what is there cannot be a directory of ours, or one is of a format that is not known here.
    """
    found = tuple(one for one in read_directory(memory, header) if one.kind == kind)
    for one in found:
        if one.version != VERSIONS[kind]:
            raise RegionError(
                f"the region has {one.name} of version {one.version}; this gdb_kprobe knows version {VERSIONS[kind]}",
                "detach with the gdb_kprobe that made it, or reset the guest",
            )
    return found


def _entries(memory: PhysicalMemory, header: Header, pages: list[int]) -> Iterator[tuple[int, RegionObject]]:
    """The entries in use, by index; *pages* is added to as more are found."""
    most = header.layout.pages
    taken: set[int] = set()
    number = 0
    while number < len(pages):
        data = memory.read_physical(offset(header.phys, pages[number]), PAGE_SIZE)
        for at in range(_PER_PAGE):
            found = RegionObject.unpack(data[at * ENTRY_SIZE : (at + 1) * ENTRY_SIZE], header)
            if found is None:
                continue
            _check(found, header)
            first, count = found.pages
            own = set(range(first, first + count))
            if own & taken:
                raise RegionError(f"two objects of the region have its page {min(own & taken)}", _FORGED)
            taken |= own
            if found.kind == Kind.DIRECTORY:
                pages += range(found.start, found.end, PAGE_SIZE)
            yield number * _PER_PAGE + at, found
        number += 1
        assert number <= most, "no page is taken twice"


def _check(found: RegionObject, header: Header) -> None:
    if found.start % PAGE_SIZE or found.size % PAGE_SIZE or not found.size:
        raise RegionError(
            f"{found.name} of the region at +{found.start:#x} has {found.size:#x} bytes: no whole pages", _FORGED
        )
    if found.start < DIRECTORY_OFFSET + PAGE_SIZE or found.end > header.layout.end:
        raise RegionError(
            f"{found.name} of the region, +{found.start:#x} to +{found.end:#x}, is not within its {header.size:#x} "
            "bytes",
            _FORGED,
        )
