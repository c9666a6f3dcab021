"""The reserved piece of guest memory: put in place, checked, taken away.

Physical memory comes from where the profile says; the virtual addresses are our own doing, by stores to the kernel's
page table from outside (:mod:`gdb_kprobe.linux.mapping`).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gdb_kprobe.errors import GuestResetError, RegionError
from gdb_kprobe.kprobes.slots import SlotAllocator
from gdb_kprobe.linux.mapping import find_hole, plan_mapping
from gdb_kprobe.linux.paging import ADDRESS_MASK, PMD_SIZE, PRESENT, Entry, PageTable, shift
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr, offset
from gdb_kprobe.session.counters import Counters
from gdb_kprobe.session.guest import Guest
from gdb_kprobe.session.header import Header, HeaderStore, Identity, Layout
from gdb_kprobe.session.transaction import apply_physical
from gdb_kprobe.target.protocols import Cpus, Machine, PhysicalMemory

COOKIE_SIZE = 16

WINDOW = AddressRange(VirtAddr(0xFFFF_FFFF_0000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
"""Where a region can be: in s32 reach of a kernel image, up to the end of the module area."""


@dataclass(slots=True)
class Region:
    """A region in use: its header, its page-table entries, its slots."""

    memory: PhysicalMemory
    table: PageTable
    store: HeaderStore
    links: tuple[Entry, ...]
    slots: SlotAllocator
    counters: Counters
    giving_back: Callable[[], AbstractContextManager[Callable[[], None]]] | None = None
    """Brings the guest that has lent the memory to where it can take it back; gives what has it do so."""

    @property
    def header(self) -> Header:
        return self.store.header

    def is_mapped(self, memory: PhysicalMemory) -> bool:
        """Whether the page-table entries that map us are still in *memory*. Without them nothing may be armed."""
        if not self.links:
            return True
        # They are neighbours, in one page most often: one read.
        start = min(link.addr for link in self.links)
        end = max(link.addr for link in self.links) + 8
        if end - start > PAGE_SIZE:
            return all(_holds(memory, link) for link in self.links)
        found = memory.read_physical(start, end - start)
        return all(found[link.addr - start :][:8] == link.value.to_bytes(8, "little") for link in self.links)

    def unmap(self, machine: Machine, about_to: Callable[[], None] = lambda: None) -> None:
        """Take the mapping and the header away. Only when nothing can be executing in the region any more.

        The header goes last: what is cut off in between can still be recognized. Then lent memory is given back; the
        guest runs for a moment before, so that it is known to be possible.

        :param about_to: called right before anything is written; may raise.
        :raises GuestStateError: it cannot be given back; then the region stays as it is, for the next attach.
        :raises GuestResetError: the guest's memory was exchanged in that moment.
        """
        if self.giving_back is None:
            about_to()
            self._unmap(machine)
            return
        with self.giving_back() as give_back:
            if not self.is_mapped(machine):
                raise GuestResetError(
                    "the guest was reset, or a snapshot loaded, while its memory was to be given back"
                )
            about_to()
            with machine.flushed():
                clear(self.memory, self.links)
                self._forget()
                give_back()  # the machine runs for that

    def _unmap(self, machine: Machine) -> None:
        unlink(self.memory, machine, self.links)
        self._forget()

    def _forget(self) -> None:
        self.store.erase()
        self.table.invalidate()


def unlink(memory: PhysicalMemory, machine: Cpus, links: Iterable[Entry]) -> None:
    """Clear the page-table entries *links* and have every vCPU forget what it cached of them.

    :raises GuestStateError: it would have to run for that, and cannot.
    """
    known = tuple(links)
    if not known:
        return
    must_run = not machine.quirks.flushes_at_write
    if must_run:
        machine.check_can_run()
    with machine.flushed():
        clear(memory, known)
        if must_run:
            machine.run_briefly()


def clear(memory: PhysicalMemory, links: Iterable[Entry]) -> None:
    """Clear those of the page-table entries *links* that are still ours; the first, which the header names, last."""
    for link in reversed(tuple(links)):
        if _holds(memory, link):
            memory.write_physical(link.addr, bytes(8))


def _holds(memory: PhysicalMemory, link: Entry) -> bool:
    return int.from_bytes(memory.read_physical(link.addr, 8), "little") == link.value


def links_of(table: PageTable, virt: VirtAddr, phys: PhysAddr, size: int) -> tuple[Entry, ...]:
    """The guest's page-table entries that lead from *virt* into tables lying in the region's own memory."""
    found: dict[PhysAddr, Entry] = {}
    for slot in range(virt, virt + size, PMD_SIZE):
        for entry in table.entries(VirtAddr(slot)):
            if entry.value & PRESENT and phys <= entry.value & ADDRESS_MASK < phys + size:
                if not phys <= entry.addr < phys + size:
                    found[entry.addr] = entry
                break
    return tuple(found.values())


def mapped_slots(table: PageTable) -> Iterator[tuple[VirtAddr, PhysAddr]]:
    """The 2 MiB slots of :data:`WINDOW` whose first page is mapped, from the top down."""
    at = int(WINDOW.end)
    while at > WINDOW.start:
        at -= PMD_SIZE
        last = table.entries(VirtAddr(at))[-1]
        if last.value & PRESENT:
            yield VirtAddr(at), _first_byte(last, at)
        else:
            at &= -max(1 << shift(last.level), PMD_SIZE)


def _first_byte(leaf: Entry, virt: int) -> PhysAddr:
    size = 1 << shift(leaf.level)
    return PhysAddr(leaf.value & ADDRESS_MASK & -size | virt & size - 1)


def is_mapped_anywhere(table: PageTable, phys: PhysAddr) -> bool:
    """Whether a region at *phys* is mapped where one can be."""
    return any(found == phys for _, found in mapped_slots(table))


def why_not_mapped(table: PageTable, header: Header) -> str:
    """Say why the mapping is not the one that *header* tells of; empty if it is, or what is left of it."""
    ends = (header.virt + header.layout.code_end - PAGE_SIZE, header.virt + header.layout.data_end)
    for at in (*range(header.virt, header.virt + header.size, PMD_SIZE), *ends):
        found = table.walk(VirtAddr(at))
        # An unmapping that was cut off has left the first.
        if found is None and at == header.virt:
            return f"{at:#x}, where it says that the region is mapped, is not mapped"
        if found is not None and found.phys != header.physical(VirtAddr(at)):
            return f"{at:#x} is not mapped to where it says, but to physical {found.phys:#x}"
    return ""


def create_mapped(
    memory: PhysicalMemory,
    guest: Guest,
    phys: PhysAddr,
    size: int,
    virt: VirtAddr | None,
    window: AddressRange,
    *,
    lent: int = 0,
) -> Region:
    """Map *size* bytes at *phys* into the guest's kernel and start an empty region there.

    *lent*: the order of the blocks in which the guest's allocator gave them.

    :raises RegionError: *virt* is taken, or the window has no room. Nothing was written then.
    """
    table = guest.memory
    layout = Layout(size)
    if virt is None:
        virt = find_hole(table, window, size)
        if virt is None:
            raise RegionError(
                f"no {size >> 20} MiB of empty 2 MiB slots in {window}",
                "use a smaller region, or give its place (region.virtual in the profile)",
            )
    code = AddressRange(offset(virt, layout.data_end), offset(virt, layout.code_end))
    tables = (offset(phys, layout.code_end), size - layout.code_end)
    plan = plan_mapping(table, virt, phys, layout.code_end, tables=tables, code=code)
    for addr, image in plan.tables:
        memory.write_physical(addr, image)
    links = tuple(Entry(0, link.addr, int.from_bytes(link.new, "little")) for link in plan.links)
    # The header before the links: what is cut off in between can still be recognized, and taken away.
    region = _start(memory, guest, virt, phys, size, links, lent=lent)
    with contextlib.ExitStack() as undo:
        for link in plan.links:
            apply_physical(memory, link.addr, link.old, link.new)
            undo.callback(apply_physical, memory, link.addr, link.new, link.old)
        undo.pop_all()
    table.invalidate()
    region.links = links_of(table, virt, phys, size)
    return region


def adopt_mapped(memory: PhysicalMemory, guest: Guest, header: Header) -> Region:
    """Go on with the mapping that *header* describes; slots that were ever given out there are not given out again."""
    links = links_of(guest.memory, header.virt, header.phys, header.size)
    high_water, lent = header.code_high_water, header.lent
    return _start(memory, guest, header.virt, header.phys, header.size, links, high_water, lent=lent)


def create_premapped(
    memory: PhysicalMemory, guest: Guest, virt: VirtAddr, size: int, high_water: VirtAddr | None = None
) -> Region:
    """Start an empty region in memory that the guest has mapped itself; slots below *high_water* are not given out.

    :raises RegionError: it is not mapped, not contiguous, or not writable and executable.
    """
    first = guest.memory.walk(virt)
    if first is None:
        raise RegionError(f"region.virtual {virt:#x} is not mapped in the guest", "see 'info tlb' in QEMU's monitor")
    for page in range(virt, virt + size, 0x1000):
        found = guest.memory.walk(VirtAddr(page))
        if found is None or found.phys != first.phys + page - virt or not (found.writable and found.executable):
            what = (
                "not mapped" if found is None else "not contiguous in physical memory, or not writable and executable"
            )
            raise RegionError(
                f"the premapped region {virt:#x} (+{size:#x}) is {what} at {page:#x}",
                "a premapped region must be one piece, mapped for writing and executing",
            )
    return _start(memory, guest, virt, first.phys, size, (), high_water)


def _start(
    memory: PhysicalMemory,
    guest: Guest,
    virt: VirtAddr,
    phys: PhysAddr,
    size: int,
    links: tuple[Entry, ...],
    high_water: VirtAddr | None = None,
    *,
    lent: int = 0,
) -> Region:
    first = links[0] if links else Entry(0, PhysAddr(0), 0)
    identity = Identity(guest.build_id, guest.text_base, guest.bp_entry, first.addr, first.value)
    header = Header(size, virt, phys, identity, secrets.token_bytes(COOKIE_SIZE), high_water or virt, lent=lent)
    store = HeaderStore(memory, header)
    store.create()
    area = header.code if high_water is None else AddressRange(max(high_water, header.code.start), header.code.end)
    return Region(memory, guest.memory, store, links, SlotAllocator(area), Counters(memory, header))
