"""The guest's page tables, walked by ourselves over physical memory, and the mapping of new pages into them.

Nothing here goes through the CR3 of the current vCPU: under page-table isolation a vCPU that was stopped in user mode
has a table loaded that does not map the kernel. Source of the formats: Intel SDM volume 3, "4-level paging and 5-level
paging".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError, TargetError, UnmappedError
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.bounds import Steps, damaged
from gdb_kprobe.target.protocols import PhysicalMemory

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
NO_EXECUTE = 1 << 63
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000

CR4_LA57 = 1 << 12

ENTRIES = 512
PMD_SIZE = 1 << 21

LEVEL_NAMES = {1: "PTE", 2: "PMD", 3: "PUD", 4: "PGD", 5: "PGD"}
"""Linux's name of a level's entries, for messages (with five levels, level 4 is the P4D)."""

_PTI_USER_BIT = 0x1000

_MOST_BYTES = 256 << 20
"""What is read at once, at the most: all text of a kernel, or all memory that its stacks may be in."""
_MOST_ENTRIES = 1 << 20
"""Entries that are looked at for one window: 4 GiB of small pages. A table that leads to itself has no end."""


def shift(level: int) -> int:
    """Return the lowest address bit that selects the entry of *level* (1 is the PTE)."""
    return 12 + 9 * (level - 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One page-table entry: its level (1 is the PTE), where it lies and what it holds."""

    level: int
    addr: PhysAddr
    value: int


@dataclass(frozen=True, slots=True)
class Translation:
    """Where one virtual address is, and what the tables allow there.

    *writable*, *executable* and *user* are over all levels. *entries* are the entries passed, the root's first.
    """

    phys: PhysAddr
    page_size: int
    writable: bool
    executable: bool
    user: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """A run of mapped virtual addresses with equal permissions (not necessarily contiguous physically)."""

    range: AddressRange
    writable: bool
    executable: bool
    user: bool


class PageTable:
    """One address space, by the physical address of its root table.

    Tables that were read are kept until :meth:`invalidate`: call that whenever the guest has run, or a table was
    written.
    """

    def __init__(self, memory: PhysicalMemory, root: PhysAddr, levels: int) -> None:
        assert levels in (4, 5), levels
        assert not root & 0xFFF, f"{root:#x}"
        self.memory = memory
        self.root = root
        self.levels = levels
        self._tables: dict[int, tuple[int, ...]] = {}

    def invalidate(self) -> None:
        """Forget the tables read so far."""
        self._tables.clear()

    def is_canonical(self, addr: int) -> bool:
        """Say whether *addr* is one that this number of levels can translate at all."""
        top = addr >> (shift(self.levels + 1) - 1)
        return top in (0, (1 << (64 - shift(self.levels + 1) + 1)) - 1)

    def entries(self, addr: VirtAddr) -> tuple[Entry, ...]:
        """Return the entries on the way to *addr*, the root's first, down to a leaf or to one that is not present.

        :raises TargetError: a table lies where there is no RAM.
        """
        assert self.is_canonical(addr), f"{addr:#x}"
        found = []
        table = int(self.root)
        for level in range(self.levels, 0, -1):
            index = addr >> shift(level) & ENTRIES - 1
            value = self._table(table)[index]
            found.append(Entry(level, PhysAddr(table + 8 * index), value))
            if not value & PRESENT or _is_leaf(level, value):
                break
            table = value & ADDRESS_MASK
        return tuple(found)

    def walk(self, addr: VirtAddr) -> Translation | None:
        """Return the translation of *addr*, or None where nothing is mapped."""
        if not self.is_canonical(addr):
            return None
        entries = self.entries(addr)
        leaf = entries[-1]
        if not leaf.value & PRESENT:
            return None
        everywhere = nowhere = ~0
        for entry in entries:
            everywhere &= entry.value
            nowhere &= ~entry.value
        size = 1 << shift(leaf.level)
        # Bit 12 of a large leaf is its PAT bit, and the bits below its size are not address bits.
        phys = leaf.value & ADDRESS_MASK & -size | addr & size - 1
        return Translation(
            phys=PhysAddr(phys),
            page_size=size,
            writable=bool(everywhere & WRITABLE),
            executable=bool(nowhere & NO_EXECUTE),
            user=bool(everywhere & USER),
            entries=entries,
        )

    def translate(self, addr: VirtAddr) -> PhysAddr:
        """Return the physical address of *addr*.

        :raises UnmappedError: nothing is mapped there.
        """
        found = self.walk(addr)
        if found is None:
            raise UnmappedError(addr)
        return found.phys

    def read(self, addr: VirtAddr, size: int) -> bytes:
        """Read *size* bytes, with one physical read for each physically contiguous run.

        :raises UnmappedError: a page of the range has no translation.
        :raises GuestStateError: it is more than anything has that a kernel would speak of.
        """
        if not 0 <= size <= _MOST_BYTES:
            raise damaged(f"the guest's memory speaks of {size} bytes at {addr:#x}")
        return b"".join([self.memory.read_physical(phys, count) for phys, count in self._runs(addr, size)])

    def write(self, addr: VirtAddr, data: bytes) -> None:
        """Write *data* whatever the protection is; every page is looked up before the first byte is written.

        :raises UnmappedError: a page of the range has no translation; then nothing was written.
        """
        done = 0
        for phys, count in self._runs(addr, len(data)):
            self.memory.write_physical(phys, data[done : done + count])
            done += count

    def mappings(self, window: AddressRange) -> Iterator[Mapping]:
        """Yield what is mapped in *window*, as maximal runs of equal permissions, in ascending order.

        :raises TargetError: a table lies where there is no RAM.
        :raises GuestStateError: there are more entries than any guest has: a table leads to itself.
        """
        current: Mapping | None = None
        steps = Steps(f"the guest's page tables for {window}", _MOST_ENTRIES)
        for leaf in self._leaves(int(self.root), self.levels, 0, WRITABLE | USER, window, steps):
            start, end, rights = leaf
            mapping = Mapping(
                AddressRange(VirtAddr(max(start, window.start)), VirtAddr(min(end, window.end))),
                writable=bool(rights & WRITABLE),
                executable=not rights & NO_EXECUTE,
                user=bool(rights & USER),
            )
            if current is not None and _continues(current, mapping):
                mapping = Mapping(
                    AddressRange(current.range.start, mapping.range.end),
                    mapping.writable,
                    mapping.executable,
                    mapping.user,
                )
            elif current is not None:
                yield current
            current = mapping
        if current is not None:
            yield current

    def _runs(self, addr: VirtAddr, size: int) -> list[tuple[PhysAddr, int]]:
        """Split a virtual range into physically contiguous (address, size) pairs."""
        runs: list[tuple[PhysAddr, int]] = []
        end = addr + size
        while addr < end:
            found = self.walk(addr)
            if found is None:
                raise UnmappedError(addr)
            count = min(end - addr, found.page_size - (addr & found.page_size - 1))
            if runs and runs[-1][0] + runs[-1][1] == found.phys:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((found.phys, count))
            addr = VirtAddr(addr + count)
        return runs

    def _leaves(
        self, table: int, level: int, base: int, rights: int, window: AddressRange, steps: Steps
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, rights) of each leaf under *table*; *rights* collects what the levels above allow."""
        size = 1 << shift(level)
        values = self._table(table)
        upper_half = 1 << (shift(self.levels + 1) - 1)
        for index in range(ENTRIES):
            value = values[index]
            if not value & PRESENT:
                continue
            steps.take()
            start = base + index * size
            if level == self.levels and start & upper_half:
                start |= -upper_half & 0xFFFF_FFFF_FFFF_FFFF
            if start >= window.end or start + size <= window.start:
                continue
            below = rights & value | (rights | value) & NO_EXECUTE
            if _is_leaf(level, value):
                yield start, start + size, below
            else:
                yield from self._leaves(value & ADDRESS_MASK, level - 1, start, below, window, steps)

    def _table(self, table: int) -> tuple[int, ...]:
        values = self._tables.get(table)
        if values is None:
            values = struct.unpack("<512Q", self.memory.read_physical(PhysAddr(table), PAGE_SIZE))
            self._tables[table] = values
        return values


def _is_leaf(level: int, value: int) -> bool:
    return level == 1 or (level in (2, 3) and bool(value & LARGE))


def _continues(run: Mapping, more: Mapping) -> bool:
    return (
        run.range.end == more.range.start
        and run.writable == more.writable
        and run.executable == more.executable
        and run.user == more.user
    )


def loaded_table(memory: PhysicalMemory, cr3: int, cr4: int) -> PageTable:
    """Return the page table that a vCPU has loaded: enough to read its IDT, but it may be a user's (see below)."""
    return PageTable(memory, PhysAddr(cr3 & ADDRESS_MASK), 5 if cr4 & CR4_LA57 else 4)


def kernel_root(memory: PhysicalMemory, cr3: int, cr4: int, probe_addr: VirtAddr) -> PageTable:
    """Return the kernel's page table, found from the CR3 of any vCPU.

    Bits 0-11 (the PCID) and 63 of CR3 are no address. Under page-table isolation the user's table is the kernel's with
    bit 12 set (``PTI_USER_PGTABLE_BIT``); without it a root may have that bit for no reason but where it was allocated.
    So the table with the bit cleared is taken only when it translates *probe_addr*, an address that both tables must
    map (the handler of an exception), to the same place.

    :raises GuestStateError: no candidate maps *probe_addr*.
    """
    as_loaded = loaded_table(memory, cr3, cr4)
    here = _try_translate(as_loaded, probe_addr)
    if as_loaded.root & _PTI_USER_BIT:
        sibling = loaded_table(memory, cr3 & ~_PTI_USER_BIT, cr4)
        there = _try_translate(sibling, probe_addr)
        if there is not None and here in (None, there):
            return sibling
    if here is None:
        raise GuestStateError(
            f"the page table at {as_loaded.root:#x} (CR3 {cr3:#x}) does not map {probe_addr:#x}",
            "the guest is in its firmware or booting; let it run until its kernel is up",
        )
    return as_loaded


def _try_translate(table: PageTable, addr: VirtAddr) -> PhysAddr | None:
    # A candidate that is no page table may point anywhere, also where there is no RAM.
    try:
        found = table.walk(addr)
    except TargetError:
        return None
    return found.phys if found else None
