"""A broken or hostile guest: counts, lengths, pointers and lists that cannot be are errors that name what was read."""

from __future__ import annotations

import struct
import time
from array import array
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux import proven_types
from gdb_kprobe.linux.btf import Btf
from gdb_kprobe.linux.ftrace import read_ftrace_records, read_hash
from gdb_kprobe.linux.guest_kprobes import read_guest_kprobes
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.modules import read_module_symbols, read_modules
from gdb_kprobe.linux.percpu import possible_cpus
from gdb_kprobe.linux.structs import Struct, for_each_list_entry
from gdb_kprobe.linux.tasks import read_tasks
from gdb_kprobe.linux.text_tables import read_text_tables
from gdb_kprobe.linux.types import KnownTypes, Layout, Member, Types
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.bounds import Steps, Visited, guest_range, read_array
from gdb_kprobe.system.paging import PageTable

EVERYWHERE = AddressRange(VirtAddr(0), VirtAddr((1 << 64) - 1))
TEXT = 0xFFFF_FFFF_8100_0000


def kallsyms_of(**symbols: int) -> Kallsyms:
    return Kallsyms(SymbolTable(list(symbols), "d" * len(symbols), array("Q", symbols.values()), (EVERYWHERE,)))


def quads(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


class TestLists:
    def test_one_that_comes_back_behind_its_head_has_no_end(self, memory: Any) -> None:
        """Without a cycle it would be followed for its longest, and each node read on the way."""
        memory.add(0x1000, quads(0x2000, 0))
        memory.add(0x2000, quads(0x3000, 0))
        memory.add(0x3000, quads(0x2000, 0))
        reads: list[int] = []
        read = memory.read

        def counted(addr: VirtAddr, size: int) -> bytes:
            reads.append(addr)
            data: bytes = read(addr, size)
            return data

        memory.read = counted
        with pytest.raises(GuestStateError, match="the list at 0x1000 has no end: it comes back to 0x2000"):
            list(for_each_list_entry(memory, VirtAddr(0x1000), 0))
        assert len(reads) < 5

    def test_lists_in_a_list_share_their_steps(self, memory: Any) -> None:
        """Each of N leaders with the same N threads would be N * N."""
        types = KnownTypes(
            {
                "task_struct": lambda: Layout(64, {name: Member(at, 8) for name, at in (
                    ("tasks", 0), ("signal", 16), ("thread_node", 24), ("pid", 40), ("tgid", 40), ("comm", 40),
                    ("stack", 48), ("thread.sp", 48))}),
                "signal_struct": lambda: Layout(16, {"thread_head": Member(0, 8)}),
            },
            {},
        )  # fmt: skip
        number, first, signal = 1000, 0x10_0000, 0x8000
        at = [first + 64 * index for index in range(number)]
        tasks = b"".join(
            quads(
                at[(index + 1) % number], 0, signal, signal if index == number - 1 else at[index + 1] + 24, 0, 0, 0, 0
            )
            for index in range(number)
        )
        memory.add(first, tasks)
        memory.add(signal, quads(first + 64 + 24, 0))
        started = time.process_time()
        with pytest.raises(GuestStateError, match="the list of the guest's tasks has no end"):
            read_tasks(memory, kallsyms_of(init_task=first), types)
        assert time.process_time() - started < 5

    def test_a_list_is_followed_for_a_number_of_steps(self) -> None:
        visited = Visited("the list of x", Steps("the search for x", 3))
        for node in range(3):
            visited.visit(node)
        with pytest.raises(GuestStateError, match="the search for x has no end"):
            visited.visit(3)

    def test_ftrace_pages_in_a_circle(self, memory: Any) -> None:
        layouts = {
            "dyn_ftrace": lambda: Layout(16, {"ip": Member(0, 8), "flags": Member(8, 8)}),
            "ftrace_page": lambda: Layout(
                24, {"next": Member(0, 8), "records": Member(8, 8), "index": Member(16, 4)}
            ),
        }  # fmt: skip
        memory.add(0x1000, quads(0x2000))
        memory.add(0x2000, quads(0x2000, 0x3000, 1))
        memory.add(0x3000, quads(TEXT, 0))
        with pytest.raises(GuestStateError, match="ftrace_pages_start has no end"):
            read_ftrace_records(memory, kallsyms_of(ftrace_pages_start=0x1000), KnownTypes(layouts, {}))

    def test_without_types_ftrace_pages_in_a_circle_prove_nothing(self, memory: Any) -> None:
        memory.add(0x1000, quads(0x2000))
        memory.add(0x2000, quads(0x2000, 0x3000, 0))
        memory.add(0x3000, quads(0))
        memory.add(TEXT, bytes(64))
        kallsyms = kallsyms_of(ftrace_pages_start=0x1000, _stext=TEXT, _etext=TEXT + 64)
        known = proven_types.prove_types(memory, kallsyms)
        with pytest.raises(GuestStateError, match="struct dyn_ftrace cannot be read"):
            known.size_of("dyn_ftrace")

    def test_a_chain_of_kprobes_in_a_circle_is_why_not_all_are_read(self, memory: Any) -> None:
        members = {"hlist": Member(0, 16), "hlist.next": Member(0, 8), "addr": Member(16, 8), "opcode": Member(24, 1),
                   "flags": Member(28, 4)}  # fmt: skip
        memory.add(0x1000, quads(0x2000, *[0] * 63))
        memory.add(0x2000, quads(0x2000, 0, TEXT, 0x55))
        types = KnownTypes({"kprobe": lambda: Layout(32, members), "optimized_kprobe": lambda: Layout(0, {})}, {})
        found = read_guest_kprobes(memory, kallsyms_of(kprobe_table=0x1000), types)
        assert [kprobe.addr for kprobe in found] == [TEXT]
        with pytest.raises(GuestStateError, match="a chain of kprobe_table has no end"):
            found.check_all()

    def test_a_kprobe_that_is_for_no_text_is_not_known(self, memory: Any) -> None:
        """Its range would go beyond the last address."""
        members = {"hlist": Member(0, 16), "hlist.next": Member(0, 8), "addr": Member(16, 8), "opcode": Member(24, 1),
                   "flags": Member(28, 4)}  # fmt: skip
        memory.add(0x1000, quads(0x2000, *[0] * 63))
        memory.add(0x2000, quads(0, 0, (1 << 64) - 1, 0x55))
        types = KnownTypes({"kprobe": lambda: Layout(32, members), "optimized_kprobe": lambda: Layout(0, {})}, {})
        with pytest.raises(GuestStateError, match="is for 0xffffffffffffffff, where no kernel text can be"):
            read_guest_kprobes(memory, kallsyms_of(kprobe_table=0x1000), types).check_all()


class TestCounts:
    @pytest.mark.parametrize("count", [-1, 1 << 32])
    def test_more_than_there_can_be_is_not_read(self, memory: Any, count: int) -> None:
        with pytest.raises(GuestStateError, match=f"the table at 0x1000 has {count} entries of 24 bytes"):
            read_array(memory, "the table", VirtAddr(0x1000), count, 24)

    @pytest.mark.parametrize(("start", "end"), [(2, 1), (-1, 1), (0, (1 << 64) + 1)])
    def test_a_range_that_cannot_be(self, start: int, end: int) -> None:
        with pytest.raises(GuestStateError, match="the stack goes from"):
            guest_range("the stack", start, end)

    def test_a_hash_of_ftrace_has_no_two_to_the_four_billion_lists(self, memory: Any) -> None:
        layout = Layout(24, {"size_bits": Member(0, 8), "buckets": Member(8, 8), "count": Member(16, 8)})
        memory.add(0x1000, quads(0xFFFF_FFFF, 0x2000, 1))
        with pytest.raises(GuestStateError, match="hash of ftrace's at 0x1000 has 4294967295 bits"):
            read_hash(memory, KnownTypes({"ftrace_hash": lambda: layout}, {}), VirtAddr(0x1000))

    def test_there_is_a_cpu(self, memory: Any) -> None:
        memory.add(0x1000, bytes(8))
        types = KnownTypes({"cpumask": lambda: Layout(8, {})}, {})
        with pytest.raises(GuestStateError, match="no CPU in __cpu_possible_mask"):
            possible_cpus(memory, kallsyms_of(__cpu_possible_mask=0x1000), types)

    def test_lock_prefixes_that_end_before_they_begin(self, memory: Any) -> None:
        layout = Layout(48, {"locks": Member(0, 8), "locks_end": Member(8, 8), "next": Member(16, 8),
                             "next.next": Member(16, 8)})  # fmt: skip
        memory.add(0x1000, quads(0x2010))
        memory.add(0x2000, quads(0x9000, 0x8000, 0x1000, 0, 0, 0))
        types = KnownTypes({"smp_alt_module": lambda: layout}, {})
        with pytest.raises(GuestStateError, match="lock prefixes at 0x2000 goes from 0x9000 to 0x8000"):
            read_text_tables(memory, kallsyms_of(smp_alt_modules=0x1000), types, ())


MODULE = {"list": Member(0, 16), "list.next": Member(0, 8), "state": Member(16, 4), "name": Member(20, 20),
           "core_layout.base": Member(40, 8), "core_layout.size": Member(48, 4),
           "core_layout.text_size": Member(52, 4), "init_layout.base": Member(56, 8),
           "init_layout.size": Member(64, 4), "init_layout.text_size": Member(68, 4), "kallsyms": Member(72, 8),
           "num_syms": Member(80, 4), "syms": Member(88, 8)}  # fmt: skip
MOD_KALLSYMS = {"num_symtab": Member(0, 4), "symtab": Member(8, 8), "typetab": Member(16, 8), "strtab": Member(24, 8)}


class TestModules:
    def types(self) -> Types:
        return KnownTypes(
            {
                "module": lambda: Layout(96, MODULE),
                "mod_kallsyms": lambda: Layout(32, MOD_KALLSYMS),
                "kernel_symbol": lambda: Layout(
                    12, {"value_offset": Member(0, 4), "name_offset": Member(4, 4)}
                ),
            },
            {},
        )  # fmt: skip

    def put(self, memory: Any, name: bytes = b"ext4", base: int = 0xFFFF_FFFF_C000_0000, count: int = 2) -> None:
        memory.add(0x1000, quads(0x2000))
        data = quads(0x1000, 0) + struct.pack("<I20sQII", 0, name, base, 0x1000, 0x800) + quads(0, 0, 0x3000, 0, 0)
        memory.add(0x2000, data)
        memory.add(0x3000, quads(count, 0x4000, 0x5000, 0x6000))
        memory.add(
            0x4000,
            struct.pack("<IBBHQQ", 1, 0, 0, 0, base, 0)
            + struct.pack("<IBBHQQ", 8, 0, 0, 0, base + 8 & (1 << 64) - 1, 0),
        )
        memory.add(0x5000, b"t\x1b")
        memory.add(0x6000, b"\0\x1b[31mx\0plain\0".ljust(600, b"\0"))
        memory.add(0, bytes(12))

    def test_names_and_symbols_are_shown_escaped(self, memory: Any) -> None:
        self.put(memory, b"ev\x1bil")
        [module] = read_modules(memory, self.types(), VirtAddr(0x1000))
        assert module.name == r"ev\x1bil"
        table = read_module_symbols(memory, module)
        assert (table.names, table.types) == ([r"\x1b[31mx", "plain"], "t?")

    def test_memory_beyond_the_last_address(self, memory: Any) -> None:
        self.put(memory, base=(1 << 64) - 8)
        with pytest.raises(GuestStateError, match="memory of the module at 0x2000 goes from"):
            read_modules(memory, self.types(), VirtAddr(0x1000))

    def test_four_billion_symbols(self, memory: Any) -> None:
        self.put(memory, count=0xFFFF_FFFF)
        [module] = read_modules(memory, self.types(), VirtAddr(0x1000))
        with pytest.raises(GuestStateError, match="symbol table of module ext4 at 0x4000 has 4294967295 entries"):
            read_module_symbols(memory, module)


class TestTypes:
    def test_an_integer_of_four_thousand_bytes(self) -> None:
        types = KnownTypes({"x": lambda: Layout(4096, {"y": Member(0, 4096)})}, {})
        with pytest.raises(GuestStateError, match=r"x\.y is an integer of 4096 bytes"):
            Struct(types, "x", VirtAddr(0), bytes(4096)).uint("y")

    def test_a_member_behind_its_structure(self) -> None:
        types = KnownTypes({"x": lambda: Layout(8, {"y": Member(8, 8)})}, {})
        with pytest.raises(GuestStateError, match=r"x\.y ends at 16, beyond the 8 bytes"):
            Struct(types, "x", VirtAddr(0), bytes(8)).uint("y")

    @staticmethod
    def btf(types: bytes, strings: bytes = b"\0x\0y\0", cut: int = 0) -> Btf:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
        data = header + types + strings
        return Btf(data[: len(data) - cut])

    STRUCT, TYPEDEF, ARRAY, INT = 4 << 24, 8 << 24, 3 << 24, 1 << 24

    def test_a_typedef_of_itself(self) -> None:
        btf = self.btf(struct.pack("<6I", 1, self.STRUCT | 1, 8, 3, 2, 0) + struct.pack("<3I", 0, self.TYPEDEF, 2))
        with pytest.raises(GuestStateError, match=r"BTF\) is damaged: the search for x.y has no end"):
            btf.find_member("x", "y")

    def test_an_array_of_itself(self) -> None:
        btf = self.btf(
            struct.pack("<6I", 1, self.STRUCT | 1, 8, 3, 2, 0) + struct.pack("<6I", 0, self.ARRAY, 0, 2, 2, 9)
        )
        with pytest.raises(GuestStateError, match=r"the search for x\.y has no end"):
            btf.find_member("x", "y")

    def test_an_anonymous_structure_in_itself(self) -> None:
        btf = self.btf(struct.pack("<6I", 1, self.STRUCT | 1, 8, 0, 1, 0))
        with pytest.raises(GuestStateError, match="y is looked for in structures that contain themselves"):
            btf.find_member("x", "y")

    @pytest.mark.parametrize(
        "words",
        [(1, STRUCT | 1, 8, 3, 77, 0), (1, STRUCT | 1, 8, 999, 1, 0), (1, STRUCT | 9, 8, 99, 1, 0), (1, STRUCT | 1, 8)],
        ids=["a type that is not there", "a name that is not there", "members that are not there", "nothing more"],
    )
    def test_what_leads_out_of_it(self, words: tuple[int, ...]) -> None:
        btf = self.btf(struct.pack(f"<{len(words)}I", *words))
        with pytest.raises(GuestStateError, match=r"BTF\) is damaged: a part of it leads out of it"):
            btf.find_member("x", "y")

    @pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
    def test_a_structure_of_four_gigabytes_or_of_nothing(self, size: int) -> None:
        btf = self.btf(struct.pack("<3I", 1, self.STRUCT, size))
        with pytest.raises(GuestStateError, match=f"x has {size} bytes"):
            btf.size_of("x")


class TestPageTables:
    def test_a_table_that_leads_to_itself_ends(self, ram: Any) -> None:
        """Each level has 512 entries, all of them to the same table: 512 to the fourth leaves."""
        for index in range(512):
            ram.set_quad(0x1000 + 8 * index, 0x1000 | 3)
        table = PageTable(ram, PhysAddr(0x1000), 4)
        started = time.process_time()
        with pytest.raises(GuestStateError, match=r"page tables for 0xffff800000000000-.* has no end"):
            for _ in table.mappings(AddressRange(VirtAddr(0xFFFF_8000_0000_0000), VirtAddr(0xFFFF_FFFF_0000_0000))):
                pass
        assert time.process_time() - started < 20

    def test_more_than_any_kernel_speaks_of_is_not_read(self, ram: Any) -> None:
        table = PageTable(ram, PhysAddr(0x1000), 4)
        with pytest.raises(GuestStateError, match="speaks of 1099511627776 bytes at 0x0"):
            table.read(VirtAddr(0), 1 << 40)

    @pytest.mark.parametrize("addr", [-8, 1 << 64, 1 << 70, 0x0000_8000_0000_0000])
    def test_what_is_no_address_is_not_mapped(self, ram: Any, addr: int) -> None:
        with pytest.raises(UnmappedError):
            PageTable(ram, PhysAddr(0x1000), 4).read(VirtAddr(addr), 8)
