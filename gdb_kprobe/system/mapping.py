"""Plan a mapping of our own pages in the guest's kernel address space; nothing here writes.

A plan is page tables of our own, composed as images, and one 8-byte store for each place where one of them is hung
into a table of the guest. Installing an entry where there was none needs no TLB flush (Intel SDM 3, 4.10.2.3: an entry
that is not present is never cached).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr, offset
from gdb_kprobe.system.paging import (
    ACCESSED,
    DIRTY,
    ENTRIES,
    LEVEL_NAMES,
    NO_EXECUTE,
    PMD_SIZE,
    PRESENT,
    WRITABLE,
    Entry,
    PageTable,
    shift,
)
from gdb_kprobe.target.protocols import PhysicalMemory

# Accessed and dirty are set from the start, so that no CPU ever writes to our tables. No global bit: removing the
# mapping must not leave entries in a TLB that survive a reload of CR3.
TABLE_FLAGS = PRESENT | WRITABLE | ACCESSED | DIRTY
CODE_FLAGS = PRESENT | ACCESSED | DIRTY
DATA_FLAGS = PRESENT | WRITABLE | ACCESSED | DIRTY | NO_EXECUTE

_PMD_LEVEL = 2


@dataclass(frozen=True, slots=True)
class EntryWrite:
    """One store of 8 bytes to a table of the guest's; *old* must be there before, *new* is there after."""

    addr: PhysAddr
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class MappingPlan:
    """Write *tables* first, then *links*. To unmap, write the links' old values in reverse order."""

    range: AddressRange
    phys: PhysAddr
    tables: tuple[tuple[PhysAddr, bytes], ...]
    links: tuple[EntryWrite, ...]

    def undo(self) -> tuple[EntryWrite, ...]:
        """Return the stores that remove the mapping; TLBs must be flushed before the pages are used otherwise."""
        return tuple(EntryWrite(link.addr, link.new, link.old) for link in reversed(self.links))


def table_pages_needed(size: int, levels: int) -> int:
    """Return how many pages for tables a mapping of *size* bytes takes at the most."""
    pages = 0
    for level in range(1, levels):
        pages += (size - 1 >> shift(level + 1)) + 2
    return pages


def find_hole(table: PageTable, window: AddressRange, size: int, align: int = PMD_SIZE) -> VirtAddr | None:
    """Return the highest multiple of *align* in *window* with *size* bytes of empty 2 MiB slots, or None.

    Empty means that the entry is all zeros: one that is not present may still mean something to the guest.
    """
    assert align >= PMD_SIZE, f"{align:#x}"
    assert not align & align - 1, f"{align:#x}"
    addr = window.end - size & -align
    while addr >= window.start:
        last = addr + size - 1 & -PMD_SIZE
        taken = next(
            (slot for slot in range(last, addr - 1, -PMD_SIZE) if not _is_empty(table.entries(VirtAddr(slot))[-1])),
            None,
        )
        if taken is None:
            return VirtAddr(addr)
        addr = taken - size & -align
    return None


def plan_mapping(
    table: PageTable, virt: VirtAddr, phys: PhysAddr, size: int, *, tables: tuple[PhysAddr, int], data: int
) -> MappingPlan:
    """Plan 4 KiB leaves for *phys* at *virt*: the first *data* bytes for reading and writing, the others empty.

    The latter are filled by :func:`map_pages`. *virt* is a multiple of 2 MiB, the others of 4 KiB. *tables* is
    (address, size) of the memory for our own tables.

    :raises RegionError: a slot is not empty, or *tables* is too small.
    """
    assert not virt & PMD_SIZE - 1, f"{virt:#x}"
    assert not (phys | size | tables[0] | data) & PAGE_SIZE - 1
    builder = _Builder(table, tables)
    for slot in range(virt, virt + size, PMD_SIZE):
        leaves = [0] * ENTRIES
        for index in range(min(ENTRIES, (virt + size - slot) // PAGE_SIZE)):
            at = slot + index * PAGE_SIZE - virt
            leaves[index] = phys + at | DATA_FLAGS if at < data else 0
        builder.hang(VirtAddr(slot), leaves)
    return MappingPlan(
        range=AddressRange(virt, VirtAddr(virt + size)),
        phys=phys,
        tables=tuple((addr, struct.pack("<512Q", *values)) for addr, values in builder.images.items()),
        links=tuple(builder.links),
    )


def map_pages(
    table: PageTable,
    memory: PhysicalMemory,
    virt: VirtAddr,
    phys: PhysAddr,
    size: int,
    flags: int,
    tables: tuple[PhysAddr, int],
) -> None:
    """Fill the leaves of *virt* to *virt* + *size*, which are in our own tables, with *phys* on.

    Each is empty, or was filled so by an attach that was cut off then.

    No TLB flush is needed: an entry that is not present is never cached.

    :param memory: where the entries are written.
    :param tables: address and size of the memory of our own tables.
    :raises RegionError: the way to *virt* does not go by our tables, or a leaf holds something else; nothing was
        written.
    """
    runs: list[tuple[PhysAddr, bytes]] = []
    at = 0
    while at < size:
        leaf = table.entries(offset(virt, at))[-1]
        count = min(size - at, (ENTRIES - (leaf.addr % PAGE_SIZE) // 8) * PAGE_SIZE) // PAGE_SIZE
        wanted = [phys + at + n * PAGE_SIZE | flags for n in range(count)]
        is_ours = leaf.level == 1 and 0 <= leaf.addr - tables[0] < tables[1]
        found = struct.unpack(f"<{count}Q", table.memory.read_physical(leaf.addr, 8 * count)) if is_ours else ()
        wrong = [] if is_ours else [leaf]
        wrong += [
            Entry(1, offset(leaf.addr, 8 * n), value) for n, value in enumerate(found) if value not in (0, wanted[n])
        ]
        if wrong:
            raise RegionError(
                f"{offset(virt, at):#x} cannot be mapped: its {LEVEL_NAMES[wrong[0].level]} entry, at physical "
                f"{wrong[0].addr:#x}, holds {wrong[0].value:#x}",
                "the guest, or another debugger, has changed the region's page tables: detach, and attach again",
            )
        runs.append((leaf.addr, struct.pack(f"<{count}Q", *wanted)))
        at += count * PAGE_SIZE
    for addr, image in runs:
        memory.write_physical(addr, image)
    table.invalidate()


class _Builder:
    """Composes table images, and the links that hang them into the guest's tables."""

    def __init__(self, table: PageTable, tables: tuple[PhysAddr, int]) -> None:
        self.table = table
        self.start, self.size = tables
        self.images: dict[PhysAddr, list[int]] = {}
        self.links: list[EntryWrite] = []
        # Which of our tables serves which entry that the guest's tables lack, by (level, address of its first byte).
        self.ours: dict[tuple[int, int], PhysAddr] = {}

    def hang(self, slot: VirtAddr, leaves: list[int]) -> None:
        """Put *leaves* at the 2 MiB of *slot*, with new tables above them where the guest has none."""
        entry = self.table.entries(slot)[-1]
        if not _is_empty(entry):
            raise RegionError(
                f"{slot:#x} is taken in the guest: its {LEVEL_NAMES[entry.level]} entry, at physical {entry.addr:#x}, "
                f"holds {entry.value:#x}",
                "choose another place for the region, or leave the choice to the plugin (placement: auto)",
            )
        below = self._new_table(leaves)
        for level in range(_PMD_LEVEL, entry.level):
            key = (level, slot & -(1 << shift(level + 1)))
            index = slot >> shift(level) & ENTRIES - 1
            if key in self.ours:
                self.images[self.ours[key]][index] = below | TABLE_FLAGS
                return
            values = [0] * ENTRIES
            values[index] = below | TABLE_FLAGS
            below = self.ours[key] = self._new_table(values)
        self._link(entry, below)

    def _new_table(self, values: list[int]) -> PhysAddr:
        at = len(self.images) * PAGE_SIZE
        if at + PAGE_SIZE > self.size:
            raise RegionError(
                f"the {self.size // PAGE_SIZE} pages set aside for page tables do not suffice",
                "make the region larger, or place it where the guest has page tables already",
            )
        addr = PhysAddr(self.start + at)
        self.images[addr] = values
        return addr

    def _link(self, entry: Entry, table: PhysAddr) -> None:
        self.links.append(EntryWrite(entry.addr, bytes(8), struct.pack("<Q", table | TABLE_FLAGS)))


def _is_empty(entry: Entry) -> bool:
    """Say whether *entry*, the last one on the way, leaves a whole 2 MiB slot free: no PTE table, nothing in it."""
    return entry.level >= _PMD_LEVEL and entry.value == 0
