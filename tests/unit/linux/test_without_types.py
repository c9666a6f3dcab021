"""A kernel without types: what its memory proves is known, and what one word in it contradicts is not."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, NeedsTypesError, UnmappedError
from gdb_kprobe.linux.e820 import E820Entry, E820Table
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.proven_types import prove_types
from gdb_kprobe.linux.stack_areas import scan_all_stacks, unlisted_stacks
from gdb_kprobe.linux.untyped_kprobes import read_untyped_kprobes
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.paging import PageTable

TEXT, DATA, NX, W, P = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8200_0000, 1 << 63, 2, 1
TABLES = {
    "exception_table_entry": ("__start___ex_table", "__stop___ex_table"),
    "jump_entry": ("__start___jump_table", "__stop___jump_table"),
    "static_call_site": ("__start_static_call_sites", "__stop_static_call_sites"),
    "bug_entry": ("__start___bug_table", "__stop___bug_table"),
}


class Kernel:
    """Text of which the bytes may be chosen, and data with a symbol for each thing that is put there."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.text = bytearray(b"\x90" * 0x1000)
        self.data = bytearray(0x4000)
        self.symbols = {"_stext": TEXT, "_text": TEXT, "_etext": TEXT + 0x1000}
        self.end = 0x100

    def put(self, data: bytes, start: str = "", stop: str = "") -> int:
        at = self.end
        self.data[at : at + len(data)] = data
        self.end = (at + len(data) + 15) & ~15
        self.symbols |= {name: DATA + place for name, place in ((start, at), (stop, at + len(data))) if name}
        return DATA + at

    def relative(self, entries: list[tuple[object, ...]], form: str, start: str, stop: str) -> None:
        """A table; what is an address in *entries* is above 2**32, and counts from where it lies."""
        at, packed = DATA + self.end, b""
        size = struct.calcsize(form)
        for index, entry in enumerate(entries):
            words = []
            for number, value in enumerate(entry):
                assert isinstance(value, int)
                words.append(value - (at + index * size + 4 * number) if value >> 32 else value)
            packed += struct.pack(form, *words)
        self.put(packed, start, stop)

    @property
    def kallsyms(self) -> Kallsyms:
        found = sorted(self.symbols.items(), key=lambda item: item[1])
        names, addrs = [name for name, _ in found], array("Q", [addr for _, addr in found])
        letters = "".join("t" if TEXT <= addr <= TEXT + 0x1000 else "d" for addr in addrs)
        whole = AddressRange(VirtAddr(TEXT), VirtAddr(DATA + 0x4000))
        self.memory.blocks.clear()
        self.memory.add(TEXT, bytes(self.text))
        self.memory.add(DATA, bytes(self.data))
        return Kallsyms(SymbolTable(names, letters, addrs, (whole,)))

    def knows(self, type_name: str) -> bool:
        types = prove_types(self.memory, self.kallsyms)
        try:
            types.size_of(type_name)
        except NeedsTypesError:
            return False
        return True


@pytest.fixture
def kernel(memory: Any) -> Kernel:
    return Kernel(memory)


@pytest.mark.parametrize("type_name", sorted(TABLES))
def test_a_table_that_the_kernel_does_not_have_needs_no_proof(kernel: Kernel, type_name: str) -> None:
    assert kernel.knows(type_name)


EX_TABLE = [(TEXT + at, TEXT + 0x100 - at, 3) for at in range(20)]
JUMPS = [(TEXT + at, TEXT + 0x100 - at, 0) for at in range(4)]


@pytest.mark.parametrize(
    ("type_name", "form", "entries", "known"),
    [
        ("exception_table_entry", "<iii", EX_TABLE, True),
        ("exception_table_entry", "<iii", EX_TABLE[::-1], False),
        ("exception_table_entry", "<iii", EX_TABLE[:10], False),
        ("exception_table_entry", "<iii", [*EX_TABLE, (TEXT + 0x40, TEXT + 0x1090, 3)], False),
        ("exception_table_entry", "<ii", [entry[:2] for entry in (*EX_TABLE, EX_TABLE[-1])], False),
        ("jump_entry", "<iiq", JUMPS, True),
        ("jump_entry", "<iiq", JUMPS[:1], False),
        ("jump_entry", "<iiq", [*JUMPS, (DATA, TEXT, 0)], False),
        ("static_call_site", "<ii", [(TEXT + at, 8) for at in range(3)], True),
        ("static_call_site", "<iii", [(TEXT + at, 8, 8) for at in range(4)], False),
        ("bug_entry", "<ii", [(TEXT + 0x40, 1), (TEXT + 0x50, 1), (TEXT + 0x40, 1)], True),
        ("bug_entry", "<iii", [(TEXT + 0x40, DATA, 1), (TEXT + 0x50, DATA, 2)] * 2, True),
        ("bug_entry", "<iiii", [(TEXT + 0x40, DATA, DATA, 1), (TEXT + 0x50, DATA, DATA, 2)] * 2, True),
        ("bug_entry", "<iii", [(TEXT + 0x40, DATA, 1), (TEXT + 0x50, DATA, 2), (TEXT + 0x51, DATA, 2)], False),
        ("bug_entry", "<iiiii", [(TEXT + 0x40, DATA, 1, 1, 1), (TEXT + 0x50, DATA, 2, 2, 2)] * 4, False),
    ],
)
def test_a_table_is_known_if_all_its_entries_agree(
    kernel: Kernel, type_name: str, form: str, entries: list[tuple[object, ...]], known: bool
) -> None:
    kernel.text[0x40:0x42] = kernel.text[0x50:0x52] = b"\x0f\x0b"
    kernel.relative(entries, form, *TABLES[type_name])
    assert kernel.knows(type_name) == known


@pytest.mark.parametrize(("end", "known"), [(TEXT + 0x40, True), (TEXT + 0x20, False), (DATA, False)])
def test_a_list_is_known_if_all_on_it_is_what_it_should_be(kernel: Kernel, end: int, known: bool) -> None:
    head = kernel.put(bytes(16), "kprobe_blacklist")
    entry = kernel.put(struct.pack("<QQQQ", head, head, TEXT + 0x30, end))
    kernel.data[head - DATA : head - DATA + 16] = struct.pack("<QQ", entry, entry)
    assert kernel.knows("kprobe_blacklist_entry") == known


@pytest.mark.parametrize(("prefix", "known"), [(b"\xf0", True), (b"\x3e", True), (b"\x90", False)])
def test_lock_prefixes_are_known_by_symbols_and_by_what_is_there(kernel: Kernel, prefix: bytes, known: bool) -> None:
    kernel.text[0x60:0x61] = prefix
    kernel.relative([(TEXT + 0x60,)], "<i", "__smp_locks", "__smp_locks_end")
    head = kernel.put(bytes(16), "smp_alt_modules")
    locks = [kernel.symbols[name] for name in ("__smp_locks", "__smp_locks_end")]
    entry = kernel.put(struct.pack("<8Q", 0, 0, *locks, TEXT, TEXT + 0x1000, head, head))
    kernel.data[head - DATA : head - DATA + 8] = struct.pack("<Q", entry + 48)
    assert kernel.knows("smp_alt_module") == known
    kernel.symbols["_etext"] -= 0x10
    assert not kernel.knows("smp_alt_module")


@pytest.mark.parametrize(("first", "known"), [(b"\x0f", True), (b"\xe8", True), (b"\x55", False)])
def test_ftraces_records_are_known_by_what_is_at_their_places(kernel: Kernel, first: bytes, known: bool) -> None:
    kernel.text[0x100:0x105] = bytes.fromhex("0f1f440000")
    kernel.text[0x200:0x201] = first
    records = kernel.put(struct.pack("<4Q", TEXT + 0x100, 0, TEXT + 0x200, 1 << 31))
    page = kernel.put(struct.pack("<QQII", 0, records, 2, 0))
    kernel.put(struct.pack("<Q", page), "ftrace_pages_start")
    assert kernel.knows("dyn_ftrace") == known
    assert kernel.knows("ftrace_page") == known


@pytest.mark.parametrize("values", [[3], [2, 3]])
def test_the_state_of_a_kernel_that_runs_is_the_last_that_it_stores(kernel: Kernel, values: list[int]) -> None:
    state = kernel.put(struct.pack("<I", 3), "system_state")
    code = b"\x55"
    for value in values:
        code += b"\xc7\x05" + struct.pack("<iI", state - (TEXT + len(code) + 10), value)
    kernel.text[: len(code)] = code
    kernel.symbols |= {"kernel_init": TEXT, "other": TEXT + len(code)}
    assert prove_types(kernel.memory, kernel.kallsyms).enum("system_states") == {"SYSTEM_RUNNING": 3}


def test_a_kernel_whose_state_is_not_stored_so_needs_types(kernel: Kernel) -> None:
    kernel.put(struct.pack("<I", 3), "system_state")
    kernel.symbols |= {"kernel_init": TEXT, "other": TEXT + 0x10}
    with pytest.raises(NeedsTypesError, match="enum system_states cannot be read without the types"):
        prove_types(kernel.memory, kernel.kallsyms).enum("system_states")


def test_what_leads_to_memory_that_is_not_mapped_proves_nothing(kernel: Kernel) -> None:
    kernel.symbols["_etext"] = TEXT + 0x3000
    kernel.relative([(TEXT + 0x2000 + 16 * at, 0, 0) for at in range(20)], "<iii", *TABLES["bug_entry"])
    assert not kernel.knows("bug_entry")


def test_nothing_is_said_of_other_types(kernel: Kernel) -> None:
    types = prove_types(kernel.memory, kernel.kallsyms)
    with pytest.raises(NeedsTypesError):
        types.has_member("module", "list")
    with pytest.raises(NeedsTypesError):
        types.enumerator("FTRACE_FL_ENABLED")


# -- kprobes of the guest's own ----------------------------------------------------------------------------------------


def bucket(addr: int) -> int:
    """``hash_ptr`` of 6 bits, as the kernel has it."""
    return addr * 0x61C8864680B583EB % (1 << 64) // (1 << 58)


def register(kernel: Kernel, *addrs: int, wrong: int = 0) -> None:
    table = kernel.put(bytes(64 * 8), "kprobe_table")
    for addr in addrs:
        at = table - DATA + 8 * (bucket(addr) ^ wrong)
        (following,) = struct.unpack_from("<Q", kernel.data, at)
        node = kernel.put(struct.pack("<6Q", following, 0, 0, 0, 0, addr))
        struct.pack_into("<Q", kernel.data, at, node)


def test_kprobes_are_found_and_what_they_have_replaced_is_not_known(kernel: Kernel) -> None:
    kernel.text[0x20:0x25] = b"\xcc\x01\x02\x00\x00"
    addrs = [TEXT + at for at in (0x10, 0x20, 0x30, 0x40)]
    register(kernel, *addrs)
    found = read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: addr == TEXT + 0x40)
    assert [kprobe.addr for kprobe in found] == addrs
    assert [kprobe.opaque for kprobe in found] == [False, True, False, False]
    assert [kprobe.original for kprobe in found] == [b"\x90", b"", b"\x90", b""]
    assert [kprobe.leads_to for kprobe in found] == [None, TEXT + 0x25 + 0x201, None, None]


def test_without_kprobes_there_are_none(kernel: Kernel) -> None:
    assert len(read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)) == 0
    register(kernel)
    assert len(read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)) == 0


def test_a_kprobe_on_another_list_than_its_address_says_is_none_that_is_known(kernel: Kernel) -> None:
    register(kernel, TEXT + 0x10, wrong=1)
    found = read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)
    with pytest.raises(GuestStateError, match="a kprobe of the guest's own cannot be read without the types"):
        found.check_all()
    assert list(found) == []


def test_what_is_beside_a_kprobe_that_is_not_known_is_known(kernel: Kernel) -> None:
    register(kernel, TEXT + 0x10, TEXT + 0x20)
    table = kernel.symbols["kprobe_table"] - DATA
    (node,) = struct.unpack_from("<Q", kernel.data, table + 8 * bucket(TEXT + 0x10))
    for behind in (0x10, TEXT):  # a link to nowhere, and one to what is none
        struct.pack_into("<Q", kernel.data, node - DATA, behind)
        found = read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)
        assert [kprobe.addr for kprobe in found] == [TEXT + 0x10, TEXT + 0x20]
        assert isinstance(found.unread, NeedsTypesError)


def test_a_kprobe_whose_text_is_gone_is_none(kernel: Kernel) -> None:
    """It stays on its list when its module is unloaded."""
    register(kernel, TEXT + 0x10, 0xFFFF_FFFF_C000_0010)
    found = read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)
    assert [kprobe.addr for kprobe in found] == [TEXT + 0x10]
    found.check_all()


def test_a_kprobe_on_the_last_byte_of_text_is_known(kernel: Kernel) -> None:
    kernel.text[-1:] = b"\xcc"
    register(kernel, TEXT + 0xFFF)
    [found] = read_untyped_kprobes(kernel.memory, kernel.kallsyms, lambda addr: False)
    assert (found.addr, found.opaque, found.leads_to) == (TEXT + 0xFFF, True, None)


# -- stacks ------------------------------------------------------------------------------------------------------------

VMALLOC = 0xFFFF_C900_0000_0000
WANTED = AddressRange(VirtAddr(TEXT), VirtAddr(TEXT + 0x1000))
RAM = E820Table((E820Entry(PhysAddr(0), 0x200_0000, 1), E820Entry(PhysAddr(0x300_0000), 0x10_0000, 2)))


@pytest.fixture
def stacks(ram: Any, make_tables: Any) -> tuple[PageTable, dict[int, int]]:
    """Two stacks of two pages, a device, and the first task's stack; where each virtual page is."""
    tables = make_tables()
    pages = {VMALLOC: 0x80_0000, VMALLOC + 0x1000: 0x85_0000, VMALLOC + 0x4000: 0x90_0000, VMALLOC + 0x5000: 0x91_0000}
    pages |= {VMALLOC + 0x8000: 0x300_0000, DATA: 0xA0_0000, 0xFFFF_FE00_0000_1000: 0xB0_0000}
    for virt, phys in pages.items():
        tables.map(virt, phys, P | W | NX)
        ram.set_quad(phys + 0x800, TEXT + (phys >> 12))
    return PageTable(ram, PhysAddr(tables.root), 4), pages


def symbols(**more: int) -> Kallsyms:
    names = {"__start_init_stack": DATA, "__end_init_stack": DATA + 0x1000, "cached_stacks": 0x1000, **more}
    found = sorted(names.items(), key=lambda item: item[1])
    addrs = array("Q", [addr for _, addr in found])
    whole = AddressRange(VirtAddr(0), VirtAddr((1 << 64) - 1))
    return Kallsyms(SymbolTable([name for name, _ in found], "d" * len(found), addrs, (whole,)))


@pytest.mark.parametrize(
    ("pointers", "found"),
    [
        ((), {0x800, 0x850, 0x900, 0x910, 0xA00}),
        ((0x7FFF_0000_0000,), {0x800, 0x850, 0x900, 0x910, 0xA00}),
        ((VMALLOC + 0x1000,), {0x850, 0x900, 0x910, 0xA00}),
        ((VMALLOC + 0x5808, DATA + 0x808), {0x800, 0x850}),
        ((VMALLOC + 0x400, VMALLOC + 0x1400), {0x800, 0x850, 0x900, 0x910, 0xA00}),
        ((0xFFFF_FE00_0000_1400,), {0x800, 0x850, 0x900, 0x910, 0xA00, 0xB00}),
    ],
    ids=["nobody", "in user mode", "dead below", "two", "two in one mapping", "in an exception"],
)
def test_all_that_may_be_alive_on_a_stack_is_found(
    stacks: tuple[PageTable, dict[int, int]], pointers: tuple[int, ...], found: set[int]
) -> None:
    words = scan_all_stacks(stacks[0], symbols(), RAM, WANTED, pointers)
    assert words is not None
    assert {word - TEXT for word in words} == found


@pytest.mark.parametrize(
    ("size", "found"),
    [(0x3000, {0x900, 0x910, 0xA00}), (0x4000, None), (0x800, None), ((1 << 64) - 1, None)],
    ids=["its own", "another's", "less than its guard", "beyond all memory"],
)
def test_what_no_task_is_on_is_not_searched(
    stacks: tuple[PageTable, dict[int, int]], ram: Any, size: int, found: set[int] | None
) -> None:
    """The first stack is one that CPU 1, of the CPUs 1 and 2, keeps for the next task, if its size is right."""
    table, _ = stacks
    mask, offsets, area = 0x100, 0x200, 0x300
    per_cpu = {"__cpu_possible_mask": DATA + mask, "__per_cpu_offset": DATA + offsets, "cached_stacks": 0x1000}
    page = 0xA0_0000
    ram.set_quad(page + mask, 0b110)
    for cpu, copy in ((0, 0xDEAD_0000), (1, 0x400), (2, 0x500)):
        ram.set_quad(page + offsets + 8 * cpu, (DATA + copy - 0x1000) % (1 << 64))
    ram.set_quad(page + 0x408, DATA + area)
    ram.set_quad(page + area + 8, VMALLOC)
    ram.set_quad(page + area + 16, size)
    words = scan_all_stacks(table, symbols(**per_cpu, behind=DATA + mask + 8), RAM, WANTED, ())
    assert words is not None
    assert {word - TEXT for word in words} == (found or {0x800, 0x850, 0x900, 0x910, 0xA00})


def test_a_stack_that_no_task_of_the_lists_has_is_told_by_its_size(
    stacks: tuple[PageTable, dict[int, int]], ram: Any
) -> None:
    table, _ = stacks
    first, second = (AddressRange(VirtAddr(at), VirtAddr(at + 0x2000)) for at in (VMALLOC, VMALLOC + 0x4000))
    assert unlisted_stacks(table, symbols(), RAM, 0x2000, (), ()) == [first, second]
    assert unlisted_stacks(table, symbols(), RAM, 0x2000, (first,), ()) == [second]
    assert unlisted_stacks(table, symbols(), RAM, 0x4000, (), ()) == []
    without = Kallsyms(SymbolTable(["other"], "d", array("Q", [DATA]), (WANTED,)))
    assert unlisted_stacks(table, without, RAM, 0x2000, (), ()) == []


def test_a_stack_whose_task_has_called_the_last_function_is_dead_unless_a_cpu_is_on_it(
    stacks: tuple[PageTable, dict[int, int]],
) -> None:
    table, _ = stacks
    first, second = (AddressRange(VirtAddr(at), VirtAddr(at + 0x2000)) for at in (VMALLOC, VMALLOC + 0x4000))
    # The word in the first area's second page is within.
    known = symbols(do_task_dead=TEXT + 0x840, behind=TEXT + 0x860)
    assert unlisted_stacks(table, known, RAM, 0x2000, (), (VMALLOC + 0x5000,)) == [second]
    assert unlisted_stacks(table, known, RAM, 0x2000, (), (VMALLOC + 0x1000,)) == [first, second]


def test_a_device_is_not_read(stacks: tuple[PageTable, dict[int, int]], ram: Any) -> None:
    ram.reads.clear()
    scan_all_stacks(stacks[0], symbols(), RAM, WANTED, ())
    assert not [addr for addr, size in ram.reads if addr < 0x310_0000 and addr + size > 0x300_0000]


def test_where_stacks_may_be_elsewhere_nothing_is_said(stacks: tuple[PageTable, dict[int, int]]) -> None:
    table, _ = stacks
    without = Kallsyms(SymbolTable(["other"], "d", array("Q", [DATA]), (WANTED,)))
    assert scan_all_stacks(table, without, RAM, WANTED, ()) is None
    assert scan_all_stacks(table, symbols(), RAM, WANTED, (0xFFFF_8880_0000_0000,)) is None
    with pytest.raises(UnmappedError):
        scan_all_stacks(table, symbols(vmalloc_base=DATA + 0x2000), RAM, WANTED, ())
