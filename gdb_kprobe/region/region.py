"""The reserved piece of guest memory: put in place, given out, taken away.

Physical memory comes from where the profile says; the virtual addresses are our own doing, by stores to the kernel's
page table from outside (:mod:`gdb_kprobe.system.mapping`). A page is mapped when the first object needs it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from gdb_kprobe.errors import GuestResetError, RegionError, TargetError
from gdb_kprobe.kprobes.slots import SLOT_ALIGN, SlotAllocator
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr, offset
from gdb_kprobe.region.arena import Arena
from gdb_kprobe.region.counters import Counters
from gdb_kprobe.region.definitions import Definitions
from gdb_kprobe.region.directory import VERSIONS, Directory, Kind, RegionObject
from gdb_kprobe.region.header import NO_ENTRY_TEXT, NOWHERE, Header, HeaderStore, Identity
from gdb_kprobe.region.layout import FIRST_PAGE, Layout
from gdb_kprobe.region.pages import Pages, Zone
from gdb_kprobe.region.records import Record, Records
from gdb_kprobe.system.mapping import CODE_FLAGS, DATA_FLAGS, find_hole, map_pages, plan_mapping
from gdb_kprobe.system.paging import ADDRESS_MASK, PMD_SIZE, PRESENT, Entry, PageTable, shift
from gdb_kprobe.target.protocols import Cpus, Machine, PhysicalMemory

COOKIE_SIZE: Final = 16

WINDOW: Final = AddressRange(VirtAddr(0xFFFF_FFFF_0000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
"""Where a region can be: in s32 reach of a kernel image, up to the end of the module area."""

_CODE_PIECE: Final = 4 * PAGE_SIZE
_LARGEST_CODE_PIECE: Final = 64 * PAGE_SIZE
"""Bytes of code that are asked for at a time: at first, and at the most."""


class Booted(Protocol):
    """What must be known of the guest that the region is put into."""

    @property
    def memory(self) -> PageTable: ...

    @property
    def build_id(self) -> bytes: ...

    @property
    def text_base(self) -> VirtAddr: ...

    @property
    def bp_entry(self) -> VirtAddr: ...


class Region:
    """A region in use, with what gives out its memory."""

    def __init__(
        self,
        memory: PhysicalMemory,
        direct: PhysicalMemory,
        table: PageTable,
        header: Header,
        links: tuple[Entry, ...],
        pages: Pages,
    ) -> None:
        """*links* are the entries of the guest's page tables that map it; none: the guest has mapped it itself.

        :param direct: the same memory, where each write is made at once, also in a batch of *memory*'s: what says where
            what is must be there in its order, should gdb be killed.
        """
        self.memory = memory
        self._direct = direct
        self.table = table
        self.links = links
        self.giving_back: Callable[[], AbstractContextManager[Callable[[], None]]] | None = None
        """Brings the guest that has lent the memory to where it can take it back; gives what has it do so."""
        self.left: tuple[RegionObject, ...] = ()
        """What earlier sessions have made, and a task may still come back to."""
        self.changes = 0
        """How often it was changed what is where in it."""
        self._shared: tuple[RegionObject, ...] = ()
        """Code of :attr:`left` in which there are slots of this session, too."""
        self._pages = pages
        self._store = HeaderStore(direct, header)
        self._directory = Directory(direct, self._store)
        self._planned: list[tuple[int, int]] = []
        """Pages that slots may be in, and that are not written down yet: to plan changes nothing in the guest."""
        self._code_piece = _CODE_PIECE
        self.slots = SlotAllocator(header.mapped, self._more_code)
        self.records = Records(memory, self._store, Arena(self._of(Kind.RECORDS)))
        self.counters = Counters(memory, header, Arena(self._of(Kind.COUNTERS)))
        self.definitions = Definitions(memory, header, self._of(Kind.DEFINITIONS))

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        return self._store.header

    @property
    def objects(self) -> tuple[RegionObject, ...]:
        """All that is in it."""
        return tuple(self._directory)

    @property
    def free(self) -> int:
        """Bytes that are not given out."""
        return self._pages.free * PAGE_SIZE

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

    # -- what is in it ------------------------------------------------------------------------------------------

    def allocate(self, kind: Kind, size: int) -> RegionObject:
        """An object of at least *size* bytes: of zeros, mapped, and in the directory.

        :raises RegionError: there is no room.
        """
        count = -(-size // PAGE_SIZE)
        zone = Zone.CODE if kind is Kind.CODE else Zone.DATA
        first = self._pages.allocate(zone, count)
        if first is None:
            raise RegionError(
                f"the region has no {count * PAGE_SIZE >> 10} KiB left in a piece for {kind.name.lower()}",
                "reserve a larger region (region.size in the profile), or delete probes; 'kprobe info' says what "
                "fills it",
            )
        try:
            return self._write_down(kind, first, count)
        except BaseException:
            self._pages.release(zone, first, count)
            raise

    def remove(self, known: RegionObject) -> None:
        """Give *known* back: no task comes to it any more."""
        self.changes += 1
        self._directory.remove(known)
        self._pages.release(known.zone, *known.pages)

    def commit(self) -> None:
        """Before code is written to slots: have the guest, and later sessions, know of the pages that they are in.

        :raises RegionError: the directory has no room for that, or its page tables are not what they were.
        """
        while self._planned:
            self._write_down(Kind.CODE, *self._planned[0])
            del self._planned[0]

    def describe_dispatch(self, entry_text: AddressRange, gate: VirtAddr) -> None:
        """Say where a vCPU can be on its way to our dispatcher, and where hits stop. Before any text is patched."""
        self._store.change(entry_text=entry_text, gate=gate)

    def release_left(self, pointers: Sequence[int]) -> int:
        """Give back what earlier sessions have made, and none of *pointers* leads into; returns how many objects.

        Data of theirs may be in use as long as code of theirs is.
        """
        before = len(self.left)
        for known in [known for known in self.left if known.kind == Kind.CODE and known not in self._shared]:
            area = known.range(self.header.virt)
            if not any(word in area for word in pointers) and not self.slots.is_claimed(area):
                self._leave(known)
        if not any(known.kind == Kind.CODE for known in self.left):
            for known in self.left:
                self._leave(known)
        return before - len(self.left)

    def _leave(self, known: RegionObject) -> None:
        self.remove(known)
        self.left = tuple(other for other in self.left if other != known)

    def use_rest(self) -> None:
        """Use what an earlier session has not used of its pieces of code: it is all zeros.

        For guests of which it is never known whether a task is in the rest.
        """
        for known in [known for known in self.left if known.kind == Kind.CODE and known not in self._shared]:
            data = self.memory.read_physical(offset(self.header.phys, known.start), known.size)
            used = -(-len(data.rstrip(b"\0")) // SLOT_ALIGN) * SLOT_ALIGN
            area = known.range(self.header.virt)
            self.slots.give(AddressRange(offset(area.start, used), area.end))
            self._shared += (known,)

    # -- its life -----------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Write header and directory (the memory may hold anything)."""
        self._directory.create()
        self._store.create()

    def go_on(self, saved: Iterable[Record]) -> None:
        """Take over what the directory has: of the records those that are *saved*, no definitions, all the rest.

        :raises RegionError: the directory cannot be one of ours.
        """
        self._directory.load()
        for known in self._directory:
            zone = self._pages.claim(*known.pages)
            is_odd = known.known is not None and (known.version != VERSIONS[known.known] or zone is not known.zone)
            if is_odd:
                raise RegionError(
                    f"the region has {known.name} of version {known.version} in memory for {zone.name.lower()}",
                    "detach with the gdb_kprobe that made it, or reset the guest",
                )
        self.records.take_over(saved)
        # The dispatcher of the session before is not this one's: its gate may be a slot one day.
        self._store.change(owner=self.header.owner + 1, gate=NOWHERE, entry_text=NO_ENTRY_TEXT)
        for known in self._directory.of(Kind.DEFINITIONS):
            self.remove(known)
        kept = (Kind.DIRECTORY, Kind.RECORDS, Kind.COUNTERS)
        self.left = tuple(known for known in self._directory if known.kind not in kept)

    def keep_counters(self, in_use: Sequence[VirtAddr]) -> None:
        """Go on with the counters of the session before; those *in_use* keep what they say."""
        counters = self._directory.of(Kind.COUNTERS)
        for known in counters:
            self._directory.hand_over(known, self.header.owner)
        self.counters.take_over(counters, in_use)

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
            unlink(self.memory, machine, self.links)
            self._forget()
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

    # -- private ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._store.erase()
        self.table.invalidate()

    def _of(self, kind: Kind) -> Callable[[int], RegionObject]:
        return lambda size: self.allocate(kind, size)

    def _more_code(self, size: int) -> AddressRange | None:
        """At least *size* bytes for slots; written down by :meth:`commit`."""
        for count in dict.fromkeys(-(-most // PAGE_SIZE) for most in (max(size, self._code_piece), size)):
            first = self._pages.allocate(Zone.CODE, count)
            if first is not None:
                self._planned.append((first, count))
                self._code_piece = min(2 * self._code_piece, _LARGEST_CODE_PIECE)
                start = offset(self.header.virt, first * PAGE_SIZE)
                return AddressRange(start, offset(start, count * PAGE_SIZE))
        return None

    def _write_down(self, kind: Kind, first: int, count: int) -> RegionObject:
        """Have an object of *kind* in *count* pages from *first* on, which are given out.

        :raises RegionError: the page tables are not what they were.
        """
        self.changes += 1
        if self._directory.is_almost_full and kind is not Kind.DIRECTORY:
            self.allocate(Kind.DIRECTORY, PAGE_SIZE)
        pages, header = self._pages, self.header
        self._map(header.data_end, pages.data_end, DATA_FLAGS)
        self._map(pages.code_start, header.code_start, CODE_FLAGS)
        self._store.change(data_end=pages.data_end, code_start=pages.code_start)
        new = RegionObject(kind, VERSIONS[kind], header.owner, first * PAGE_SIZE, count * PAGE_SIZE)
        self._clear(new)
        self._directory.add(new)
        return new

    def _map(self, first: int, end: int, flags: int) -> None:
        if first < end and self.links:
            header = self.header
            tables = offset(header.phys, header.layout.end), header.size - header.layout.end
            at = first * PAGE_SIZE
            virt, phys = offset(header.virt, at), offset(header.phys, at)
            map_pages(self.table, self._direct, virt, phys, end * PAGE_SIZE - at, flags, tables)

    def _clear(self, new: RegionObject) -> None:
        """The memory may hold anything; most often it is zero already, which is told faster than written."""
        start = offset(self.header.phys, new.start)
        found = self.memory.read_physical(start, new.size)
        for at in range(0, new.size, PAGE_SIZE):
            if any(found[at : at + PAGE_SIZE]):
                self._direct.write_physical(offset(start, at), bytes(PAGE_SIZE))


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
    ends = (header.mapped.end - PAGE_SIZE, header.code.start)
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
    direct: PhysicalMemory,
    guest: Booted,
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
    end = Layout(size).end
    if virt is None:
        virt = find_hole(table, window, size)
        if virt is None:
            raise RegionError(
                f"no {size >> 20} MiB of empty 2 MiB slots in {window}",
                "use a smaller region, or give its place (region.virtual in the profile)",
            )
    plan = plan_mapping(table, virt, phys, end, tables=(offset(phys, end), size - end), data=FIRST_PAGE * PAGE_SIZE)
    for addr, image in plan.tables:
        memory.write_physical(addr, image)
    links = tuple(Entry(0, link.addr, int.from_bytes(link.new, "little")) for link in plan.links)
    # The header before the links: what is cut off in between can still be recognized, and taken away.
    region = _start(memory, direct, guest, virt, phys, size, links, lent)
    with contextlib.ExitStack() as undo:
        for link in plan.links:
            _exchange(memory, link.addr, link.old, link.new)
            undo.callback(_exchange, memory, link.addr, link.new, link.old)
        undo.pop_all()
    table.invalidate()
    region.links = links_of(table, virt, phys, size)
    return region


def adopt(
    memory: PhysicalMemory, direct: PhysicalMemory, guest: Booted, header: Header, saved: Iterable[Record] = ()
) -> Region:
    """Go on with the region that *header* describes; what there was is not given out again while a task is in it.

    :param saved: the records that stay: of jumps that kprobes of the guest's own have saved.

    :raises RegionError: its directory cannot be one of ours.
    """
    links = links_of(guest.memory, header.virt, header.phys, header.size) if header.identity.entry_addr else ()
    pages = Pages(FIRST_PAGE, header.layout.pages, header.data_end, header.code_start)
    region = Region(memory, direct, guest.memory, header, links, pages)
    region.go_on(saved)
    return region


def create_premapped(
    memory: PhysicalMemory, direct: PhysicalMemory, guest: Booted, virt: VirtAddr, size: int
) -> Region:
    """Start an empty region in memory that the guest has mapped itself.

    :raises RegionError: it is not mapped, not contiguous, or not writable and executable.
    """
    first = guest.memory.walk(virt)
    if first is None:
        raise RegionError(f"region.virtual {virt:#x} is not mapped in the guest", "see 'info tlb' in QEMU's monitor")
    for page in range(virt, virt + size, PAGE_SIZE):
        found = guest.memory.walk(VirtAddr(page))
        if found is None or found.phys != first.phys + page - virt or not (found.writable and found.executable):
            what = (
                "not mapped" if found is None else "not contiguous in physical memory, or not writable and executable"
            )
            raise RegionError(
                f"the premapped region {virt:#x} (+{size:#x}) is {what} at {page:#x}",
                "a premapped region must be one piece, mapped for writing and executing",
            )
    return _start(memory, direct, guest, virt, first.phys, size, ())


def _start(
    memory: PhysicalMemory,
    direct: PhysicalMemory,
    guest: Booted,
    virt: VirtAddr,
    phys: PhysAddr,
    size: int,
    links: tuple[Entry, ...],
    lent: int = 0,
) -> Region:
    first = links[0] if links else Entry(0, PhysAddr(0), 0)
    identity = Identity(guest.build_id, guest.text_base, guest.bp_entry, first.addr, first.value)
    pages = Pages(FIRST_PAGE, Layout(size).pages)
    cookie = secrets.token_bytes(COOKIE_SIZE)
    header = Header(size, virt, phys, identity, cookie, code_start=pages.code_start, lent=lent)
    region = Region(memory, direct, guest.memory, header, links, pages)
    region.create()
    return region


def _exchange(memory: PhysicalMemory, addr: PhysAddr, old: bytes, new: bytes) -> None:
    """Have *new* in place of *old* in a page table of the guest's.

    :raises TargetError: the place holds something else than *old*, or the write did not take.
    """
    found = memory.read_physical(addr, len(old))
    if found != old:
        raise TargetError(
            f"physical {addr:#x} holds {found.hex(' ')}, expected {old.hex(' ')}; it was not written",
            "the guest has changed its page tables meanwhile; try again",
        )
    memory.write_physical(addr, new)
    if memory.read_physical(addr, len(new)) != new:
        raise TargetError(f"physical {addr:#x} cannot be written", "is there RAM? see 'info mtree' in QEMU's monitor")
