from __future__ import annotations

from array import array

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.model import AddressRange, Symbol, VirtAddr

BASE = 0xFFFF_FFFF_8100_0000
MODULE = 0xFFFF_FFFF_C000_0000


def table(start: int, size: int, entries: list[tuple[int, str, str]], module: str = "") -> SymbolTable:
    return SymbolTable(
        names=[name for _, _, name in entries],
        types="".join(letter for _, letter, _ in entries),
        addrs=array("Q", [addr for addr, _, _ in entries]),
        ranges=(AddressRange(VirtAddr(start), VirtAddr(start + size)),),
        module=module,
    )


CORE = table(
    BASE,
    0x1000,
    [
        (0x2000, "A", "irq_stack_backing_store"),
        (BASE, "T", "_text"),
        (BASE, "T", "_stext"),
        (BASE + 0x40, "t", "twice"),
        (BASE + 0x80, "T", "vfs_read"),
        (BASE + 0xC0, "t", "twice"),
        (BASE + 0x400, "D", "jiffies"),
    ],
)
LOOP = table(MODULE, 0x2000, [(MODULE + 0x80, "t", "loop_exit"), (MODULE, "t", "loop_add")], "loop")


@pytest.fixture
def kallsyms() -> Kallsyms:
    return Kallsyms(CORE, [LOOP])


def test_names_need_not_be_unique(kallsyms: Kallsyms) -> None:
    assert [symbol.addr for symbol in kallsyms.lookup("twice")] == [BASE + 0x40, BASE + 0xC0]
    assert kallsyms.lookup("thrice") == ()


def test_module_symbols_carry_their_module(kallsyms: Kallsyms) -> None:
    assert kallsyms.lookup("loop_add") == (Symbol("loop_add", VirtAddr(MODULE), "t", "loop"),)


def test_address_of_a_core_symbol_or_a_clear_error(kallsyms: Kallsyms) -> None:
    assert kallsyms.address("vfs_read") == BASE + 0x80
    assert kallsyms.find("loop_add") is None
    with pytest.raises(GuestStateError, match="no symbol loop_add"):
        kallsyms.address("loop_add")


def test_symbol_at_takes_the_first_of_aliases(kallsyms: Kallsyms) -> None:
    found = kallsyms.symbol_at(BASE + 0x3F)
    assert found is not None
    assert (found[0].name, found[1]) == ("_text", 0x3F)


def test_symbol_at_a_boundary(kallsyms: Kallsyms) -> None:
    found = [kallsyms.symbol_at(BASE + at) for at in (0x7F, 0x80, 0xBF, 0xC0)]
    assert [at and at[0].name for at in found] == ["twice", "vfs_read", "vfs_read", "twice"]


@pytest.mark.parametrize("addr", [0x2000, BASE - 1, BASE + 0x1000, MODULE + 0x2000])
def test_addresses_outside_kernel_and_modules_have_no_symbol(kallsyms: Kallsyms, addr: int) -> None:
    assert kallsyms.symbol_at(addr) is None


def test_symbols_of_a_module_need_not_be_sorted(kallsyms: Kallsyms) -> None:
    found = kallsyms.symbol_at(MODULE + 0x90)
    assert found is not None
    assert (found[0].name, found[1]) == ("loop_exit", 0x10)


def test_size_reaches_to_the_next_address_or_the_end_of_the_memory(kallsyms: Kallsyms) -> None:
    sizes = {symbol.name: kallsyms.size(symbol) for symbol in kallsyms}
    assert sizes["_stext"] == 0x40
    assert sizes["jiffies"] == 0xC00
    assert sizes["loop_exit"] == 0x1F80
    assert sizes["irq_stack_backing_store"] == 0


def test_section_is_between_two_symbols(kallsyms: Kallsyms) -> None:
    assert kallsyms.section("vfs_read", "jiffies") == AddressRange(VirtAddr(BASE + 0x80), VirtAddr(BASE + 0x400))
    assert kallsyms.section("jiffies", "vfs_read") is None
    assert kallsyms.section("vfs_read", "nothing") is None


def test_completion_is_sorted_and_without_duplicates(kallsyms: Kallsyms) -> None:
    assert kallsyms.complete("tw") == ["twice"]
    assert kallsyms.complete("l") == ["loop_add", "loop_exit"]


def test_globs_match_whole_names(kallsyms: Kallsyms) -> None:
    assert [symbol.name for symbol in kallsyms.match("*_e?it")] == ["loop_exit"]
    assert list(kallsyms.match("vfs")) == []


def test_other_modules_leave_the_core_as_it_is(kallsyms: Kallsyms) -> None:
    kallsyms.lookup("twice")
    without = kallsyms.with_modules([])
    assert without.lookup("loop_add") == ()
    assert without.symbol_at(MODULE) is None
    assert len(without) == len(CORE.names)
    assert len(without.lookup("twice")) == 2
