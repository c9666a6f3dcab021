"""The region's own description of itself, in its first pages.

Written before any text is patched, so that whoever comes later (a new gdb after the old one was killed) finds out from
the guest's memory alone what was patched, with what, and whether it still is. All values are little-endian::

    +0x0000  header (one page)
    +0x1000  records, one of 72 bytes for each patched place
    4/16     the table of dispatch inside the guest
    5/16     counters, 32 bytes for each probe
    7/16     definitions of the probes (session/definitions.py)
    9/16     code: slots, handlers, the dispatcher
    tables   the page tables that map the region (not mapped themselves)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes.patch import MAX_PATCH, CodePatch
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.linux.paging import PMD_SIZE
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, Rung, VirtAddr, offset
from gdb_kprobe.target.protocols import PhysicalMemory

MAGIC = b"GDBKPROB"
VERSION = 6

_HEADER = struct.Struct("<8sIIQQQ20sIQQ16sQQQQQQ")
_RECORD = struct.Struct("<IBBHQQQ16s16sQ")
RECORD_SIZE = 72
RECORD_OFFSET = PAGE_SIZE

NOWHERE = VirtAddr(0)
NO_ENTRY_TEXT = AddressRange(NOWHERE, NOWHERE)

_RUNGS = (Rung.SINGLE_STEP, Rung.BOOSTED, Rung.OPTIMIZED)


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets, from the region's start, of its parts. Code and data never share a page."""

    size: int

    @property
    def record_count(self) -> int:
        return (self.table_start - RECORD_OFFSET) // RECORD_SIZE

    @property
    def table_start(self) -> int:
        """Start of the table of probed addresses, and end of the records."""
        return self.size // 16 * 4

    @property
    def counters_start(self) -> int:
        """Start of the counters, and end of the table."""
        return self.size // 16 * 5

    @property
    def definitions_start(self) -> int:
        """Start of the probes' definitions, and end of the counters."""
        return self.size // 16 * 7

    @property
    def data_end(self) -> int:
        """End of header, records and data, and start of the code."""
        return self.size // 16 * 9

    @property
    def code_end(self) -> int:
        """End of the code, and start of the page tables: a PTE page for each 2 MiB, one for each level above."""
        return self.size - (self.size // PMD_SIZE + 4) * PAGE_SIZE


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
    code_high_water: VirtAddr
    records: int = 0
    """Records from the first up to the last that was ever in use; what lies behind was never written."""
    lent: int = 0
    """The order of the blocks in which the guest's own allocator has lent the memory; 0: it has not."""
    entry_text: AddressRange = NO_ENTRY_TEXT
    """The guest's entry text, in which a vCPU may be on its way to and from our dispatcher; empty without one."""
    gate: VirtAddr = NOWHERE
    """Where hits stop for the host; 0: there is no dispatcher."""

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.lent,
            self.size,
            self.virt,
            self.phys,
            self.identity.build_id,
            self.records,
            self.identity.text_base,
            self.identity.bp_entry,
            self.cookie,
            self.identity.entry_addr,
            self.identity.entry_value,
            self.code_high_water,
            self.entry_text.start,
            self.entry_text.end,
            self.gate,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """Return the header in *data*, or ``None`` when there is none.

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
            records,
            text,
            entry,
            cookie,
            at,
            value,
            high,
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
        return cls(
            size,
            VirtAddr(virt),
            PhysAddr(phys),
            identity,
            cookie,
            VirtAddr(high),
            records,
            lent,
            AddressRange(VirtAddr(first), VirtAddr(end)),
            VirtAddr(gate),
        )

    @property
    def layout(self) -> Layout:
        return Layout(self.size)

    @property
    def code(self) -> AddressRange:
        return AddressRange(offset(self.virt, self.layout.data_end), offset(self.virt, self.layout.code_end))

    @property
    def table(self) -> AddressRange:
        """The table of probed addresses that the guest looks its int3s up in."""
        return AddressRange(offset(self.virt, self.layout.table_start), offset(self.virt, self.layout.counters_start))

    @property
    def counters(self) -> AddressRange:
        layout = self.layout
        return AddressRange(offset(self.virt, layout.counters_start), offset(self.virt, layout.definitions_start))

    @property
    def definitions(self) -> AddressRange:
        return AddressRange(offset(self.virt, self.layout.definitions_start), offset(self.virt, self.layout.data_end))

    def physical(self, addr: VirtAddr) -> PhysAddr:
        """Where the byte of the region at *addr* lies in guest memory."""
        return offset(self.phys, addr - self.virt)

    def record_address(self, index: int) -> PhysAddr:
        return offset(self.phys, RECORD_OFFSET + index * RECORD_SIZE)

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.virt, offset(self.virt, self.size))


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

    def pack(self) -> bytes:
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
        return body.ljust(RECORD_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Record | None:
        kind, length, rung, _, addr, slot, size, old, new, borrowed = _RECORD.unpack(data[: _RECORD.size])
        if not kind:
            return None
        patch = CodePatch(VirtAddr(addr), old[:length], new[:length])
        return cls(
            patch, Slot(VirtAddr(slot), size), _RUNGS[rung], RecordKind(kind), VirtAddr(borrowed) if borrowed else None
        )


@dataclass(slots=True)
class HeaderStore:
    """The header and the records in the guest's memory, kept in step with what this session knows."""

    memory: PhysicalMemory
    header: Header
    _index: dict[VirtAddr, int] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def create(self) -> None:
        """Write the header (the memory may hold anything)."""
        self.memory.write_physical(self.header.phys, self.header.pack())

    def add(self, record: Record, code_high_water: VirtAddr) -> None:
        """Write *record*, before its site is patched.

        :raises RegionError: all records are in use.
        """
        index = self._free[-1] if self._free else self.header.records
        if index == self.header.layout.record_count:
            raise RegionError(
                f"all {self.header.layout.record_count} records of the region are in use",
                "reserve a larger region (region.size in the profile), or delete probes",
            )
        del self._free[-1:]
        self._index[record.patch.addr] = index
        self.memory.write_physical(self._address(index), record.pack())
        changed = replace(self.header, records=max(self.header.records, index + 1), code_high_water=code_high_water)
        if changed != self.header:
            self.header = changed
            self.create()

    def reach(self, code_high_water: VirtAddr) -> None:
        """Say that all code up to there was given out: whoever comes later may find somebody in it."""
        if code_high_water != self.header.code_high_water:
            self.header = replace(self.header, code_high_water=code_high_water)
            self.create()

    def describe_dispatch(self, entry_text: AddressRange, gate: VirtAddr) -> None:
        """Say where a vCPU can be on its way to our dispatcher, and where hits stop. Before any text is patched."""
        self.header = replace(self.header, entry_text=entry_text, gate=gate)
        self.create()

    def remove(self, addr: VirtAddr) -> None:
        """Clear the record of the site *addr*, after its text was restored."""
        index = self._index.pop(addr)
        self.memory.write_physical(self._address(index), bytes(RECORD_SIZE))
        self._free.append(index)

    def erase(self) -> None:
        """Take the magic away: the memory is nobody's again."""
        self.memory.write_physical(self.header.phys, bytes(_HEADER.size))

    def _address(self, index: int) -> PhysAddr:
        return self.header.record_address(index)


def read_header(memory: PhysicalMemory, phys: PhysAddr) -> Header | None:
    """Return the header at *phys*, or ``None``."""
    return Header.unpack(memory.read_physical(phys, _HEADER.size))


def iter_records(memory: PhysicalMemory, header: Header) -> Iterator[Record]:
    """All records in use, in the order to restore them: the hook last, for without it a site's int3 leads nowhere."""
    data = memory.read_physical(offset(header.phys, RECORD_OFFSET), header.records * RECORD_SIZE)
    found = (Record.unpack(data[start : start + RECORD_SIZE]) for start in range(0, len(data), RECORD_SIZE))
    yield from sorted((record for record in found if record is not None), key=lambda record: record.kind)
