"""The region's first page: whose it is, and of which boot of which kernel.

Written before any text is patched, so that a later session (of a new gdb, after the old one was killed) finds out from
the guest's memory alone what was patched, with what, and whether it still is. All values are little-endian. What else
is in the region is in its directory (:mod:`gdb_kprobe.region.directory`).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr, offset
from gdb_kprobe.region.layout import FIRST_PAGE, TABLE_CELL, Layout
from gdb_kprobe.system.paging import PMD_SIZE
from gdb_kprobe.target.protocols import PhysicalMemory

MAGIC = b"GDBKPROB"
VERSION = 8

_HEADER = struct.Struct("<8sIIQQQ20sIQQ16sQQIIQQQ")
_CHECKSUM = struct.Struct("<I")
"""CRC-32 of the header, behind it."""
_HEADER_SIZE = _HEADER.size + _CHECKSUM.size
_LARGEST = 1 << 31
_LARGEST_ENTRY_TEXT = 16 << 20
_MOST_ORDER = 10
_PHYSICAL_BITS = 52

NOWHERE = VirtAddr(0)
NO_ENTRY_TEXT = AddressRange(NOWHERE, NOWHERE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which boot of which kernel the region belongs to.

    Reserved memory survives a reset, so a header alone proves nothing: the page-table entry that maps the region
    lies in the kernel's own memory, which a boot makes anew, and must still hold the same value.
    """

    build_id: bytes
    text_base: VirtAddr
    bp_entry: VirtAddr
    entry_addr: PhysAddr
    """The page-table entry that the mapping hangs on."""
    entry_value: int

    def same_boot(self, other: Identity) -> bool:
        return (self.build_id, self.text_base, self.bp_entry) == (other.build_id, other.text_base, other.bp_entry)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first page says."""

    size: int
    virt: VirtAddr
    phys: PhysAddr
    identity: Identity
    cookie: bytes
    owner: int = 1
    """The number of the session: one more for each that goes on with the region of the one before."""
    data_end: int = FIRST_PAGE
    """The first page that is not mapped for data."""
    code_start: int = 0
    """The first page that is mapped for code."""
    lent: int = 0
    """The order of the blocks in which the guest's own allocator has lent the memory; 0: it has not."""
    entry_text: AddressRange = NO_ENTRY_TEXT
    """The guest's entry text, in which a vCPU may be on its way to and from our dispatcher; empty without one."""
    gate: VirtAddr = NOWHERE
    """Where hits stop for the host; 0: there is no dispatcher."""
    damage: str = field(default="", compare=False)
    """Why nothing of it can be believed, as it was read: the guest's memory may be overwritten, or forged."""

    def pack(self) -> bytes:
        data = _HEADER.pack(
            MAGIC,
            VERSION,
            self.lent,
            self.size,
            self.virt,
            self.phys,
            self.identity.build_id,
            self.owner,
            self.identity.text_base,
            self.identity.bp_entry,
            self.cookie,
            self.identity.entry_addr,
            self.identity.entry_value,
            self.data_end,
            self.code_start,
            self.entry_text.start,
            self.entry_text.end,
            self.gate,
        )
        return data + _CHECKSUM.pack(zlib.crc32(data))

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """Return the header in *data*, or ``None`` when there is none. Look at its :attr:`damage` before all else.

        :raises RegionError: there is one, of a version that this code does not know.
        """
        (
            magic,
            version,
            lent,
            size,
            virt,
            phys,
            build_id,
            owner,
            text,
            entry,
            cookie,
            at,
            value,
            data_end,
            code_start,
            first,
            end,
            gate,
        ) = _HEADER.unpack(data[: _HEADER.size])
        if magic != MAGIC:
            return None
        if version != VERSION:
            raise RegionError(
                f"the region holds a header of version {version}; this gdb_kprobe knows version {VERSION}",
                "detach with the gdb_kprobe that made it, or reset the guest",
            )
        identity = Identity(build_id, VirtAddr(text), VirtAddr(entry), PhysAddr(at), value)
        found = cls(
            size,
            VirtAddr(virt),
            PhysAddr(phys),
            identity,
            cookie,
            owner,
            data_end,
            code_start,
            lent,
            AddressRange(VirtAddr(first), VirtAddr(end)) if first <= end else NO_ENTRY_TEXT,
            VirtAddr(gate),
        )
        (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        right = checksum == zlib.crc32(data[: _HEADER.size])
        return replace(found, damage=found._why_not() if right else "its checksum is wrong")

    def _why_not(self) -> str:
        """Say why it is none that was ever written, though its checksum is right; empty if there is no reason."""
        if not PMD_SIZE <= self.size <= _LARGEST or self.size % PMD_SIZE:
            return f"its size is {self.size:#x}"
        if (self.virt | self.phys) % PAGE_SIZE or self.virt + self.size >= 1 << 64:
            return f"it is at {self.virt:#x} (physical {self.phys:#x})"
        if self.phys + self.size > 1 << _PHYSICAL_BITS:
            return f"it is at physical {self.phys:#x}"
        if not FIRST_PAGE <= self.data_end <= self.code_start <= self.layout.pages:
            return f"its data end at page {self.data_end}, its code begins at page {self.code_start}"
        if self.lent > _MOST_ORDER:
            return f"its memory was lent in blocks of order {self.lent}"
        if self.gate and self.gate not in self.code:
            return f"its gate is at {self.gate:#x}"
        if self.entry_text.size > _LARGEST_ENTRY_TEXT:
            return f"the guest's entry text is {self.entry_text}"
        return ""

    @property
    def layout(self) -> Layout:
        return Layout(self.size)

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.virt, offset(self.virt, self.size))

    @property
    def mapped(self) -> AddressRange:
        """Where objects are, or may be."""
        return AddressRange(self.virt, offset(self.virt, self.layout.end))

    @property
    def code(self) -> AddressRange:
        """Where there is code: what executes in the region executes there."""
        return AddressRange(offset(self.virt, self.code_start * PAGE_SIZE), self.mapped.end)

    @property
    def table_cell(self) -> VirtAddr:
        """What the dispatcher in the guest reads: which table it is to search."""
        return offset(self.virt, TABLE_CELL)

    def physical(self, addr: VirtAddr) -> PhysAddr:
        """Where the byte of the region at *addr* lies in guest memory."""
        return offset(self.phys, addr - self.virt)


@dataclass(slots=True)
class HeaderStore:
    """The header in the guest's memory, kept in step with what this session knows."""

    memory: PhysicalMemory
    header: Header

    def create(self) -> None:
        """Write the header (the memory may hold anything)."""
        self.memory.write_physical(self.header.phys, self.header.pack())

    def change(self, **values: Any) -> None:
        """Have fields of the header say something else."""
        changed = replace(self.header, **values)
        if changed != self.header:
            self.header = changed
            self.create()

    def erase(self) -> None:
        """Take the magic away: the memory is nobody's again."""
        self.memory.write_physical(self.header.phys, bytes(_HEADER_SIZE))


def read_header(memory: PhysicalMemory, phys: PhysAddr) -> Header | None:
    """Return the header at *phys*, or ``None``. Look at its :attr:`~Header.damage` before all else.

    :raises RegionError: there is one, of a version that this code does not know.
    """
    found = Header.unpack(memory.read_physical(phys, _HEADER_SIZE))
    if found is not None and not found.damage and found.phys != phys:
        return replace(found, damage=f"it says that it is at physical {found.phys:#x}")
    return found


def damaged(header: Header, phys: PhysAddr) -> RegionError:
    """The error for the *header* at *phys* where its :attr:`~Header.damage` is why nothing can be done."""
    return RegionError(
        f"the region's header at physical {phys:#x} is damaged ({header.damage}), and the region is mapped: what an "
        "earlier session has left in the guest's text is not known; nothing was written",
        "reset the guest; if it was reset since, clear the first 8 bytes there",
    )
