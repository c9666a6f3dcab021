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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes.patch import MAX_PATCH, CodePatch, is_fill
from gdb_kprobe.kprobes.slots import INT3, Slot
from gdb_kprobe.linux.paging import PMD_SIZE
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, Rung, VirtAddr, offset
from gdb_kprobe.target.protocols import PhysicalMemory

MAGIC = b"GDBKPROB"
VERSION = 7

_HEADER = struct.Struct("<8sIIQQQ20sIQQ16sQQQQQQ")
_CHECKSUM = struct.Struct("<I")
"""CRC-32 of the header, behind it. A record has the lower half of one, over the cookie and itself."""
_HEADER_SIZE = _HEADER.size + _CHECKSUM.size
_RECORD = struct.Struct("<IBBHQQQ16s16sQ")
_RECORD_CHECKSUM = 6
"""Offset of the checksum in a record, which is made with zero there."""
_LARGEST = 1 << 30
_LARGEST_ENTRY_TEXT = 16 << 20
_MOST_ORDER = 10
_PHYSICAL_BITS = 52
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
        found = cls(
            size,
            VirtAddr(virt),
            PhysAddr(phys),
            identity,
            cookie,
            VirtAddr(high),
            records,
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
        if self.records > self.layout.record_count:
            return f"it has {self.records} records"
        if self.lent > _MOST_ORDER:
            return f"its memory was lent in blocks of order {self.lent}"
        if not self.virt <= self.code_high_water <= self.code.end:
            return f"its code ends at {self.code_high_water:#x}"
        if self.gate and self.gate not in self.code:
            return f"its gate is at {self.gate:#x}"
        if self.entry_text.size > _LARGEST_ENTRY_TEXT:
            return f"the guest's entry text is {self.entry_text}"
        return ""

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
        where our code is: else whoever forges a record chooses what is written, and over what.
        """
        addr, new = self.patch.addr, self.patch.new
        if addr + len(new) >= 1 << 64 or self.patch.range.overlaps(header.range):
            return f"{addr:#x} is no place of text"
        if not header.code.start <= self.slot.start < self.slot.start + self.slot.size <= header.code_high_water:
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


_JUMP = b"\xe9"
_CALL = b"\xe8"
_BRANCH_SIZE = 5


def sealed(data: bytes, cookie: bytes) -> bytes:
    """The record *data* with its checksum."""
    end = _RECORD_CHECKSUM + 2
    checksum = zlib.crc32(cookie + data[:_RECORD_CHECKSUM] + data[end:]) & 0xFFFF
    return data[:_RECORD_CHECKSUM] + checksum.to_bytes(2, "little") + data[end:]


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
        if self._free:
            # Cut off in between, the record is one that is counted: its slot must be, too.
            self.reach(code_high_water)
        del self._free[-1:]
        self._index[record.patch.addr] = index
        self.memory.write_physical(self._address(index), record.pack(self.header.cookie))
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
        self.memory.write_physical(self.header.phys, bytes(_HEADER_SIZE))

    def _address(self, index: int) -> PhysAddr:
        return self.header.record_address(index)


def read_header(memory: PhysicalMemory, phys: PhysAddr) -> Header | None:
    """Return the header at *phys*, or ``None``."""
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


def iter_records(memory: PhysicalMemory, header: Header) -> Iterator[Record]:
    """All records in use, in the order to restore them: the hook last, for without it a site's int3 leads nowhere.

    Those that are damaged are left out.
    """
    yield from read_records(memory, header)[0]


def read_records(memory: PhysicalMemory, header: Header) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """The records of :func:`iter_records`, and what is wrong with those that are damaged. *header* is not."""
    assert not header.damage
    data = memory.read_physical(offset(header.phys, RECORD_OFFSET), header.records * RECORD_SIZE)
    found: dict[VirtAddr, Record] = {}
    wrong = []
    for index in range(header.records):
        try:
            record = Record.unpack(data[index * RECORD_SIZE : (index + 1) * RECORD_SIZE], header.cookie)
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
