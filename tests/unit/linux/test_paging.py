from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.paging import CR4_LA57, PageTable, kernel_root, loaded_table

P, W, U, G, NX = 1, 2, 4, 0x100, 1 << 63
TEXT = 0xFFFF_FFFF_8100_0000


def table_of(tables: Any) -> PageTable:
    return PageTable(tables.ram, PhysAddr(tables.root), tables.levels)


def window(start: int, end: int) -> AddressRange:
    return AddressRange(VirtAddr(start), VirtAddr(end))


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("level", "size"), [(1, 1 << 12), (2, 1 << 21), (3, 1 << 30)])
def test_every_page_size_translates_as_the_oracle_does(make_tables: Any, levels: int, level: int, size: int) -> None:
    tables = make_tables(levels=levels)
    virt = TEXT & -size
    tables.map(virt, 0x40_0000_0000, P | W | G, level=level)
    table = table_of(tables)
    for at in (0, 1, 0xFFF, size // 2 + 5, size - 1):
        found = table.walk(VirtAddr(virt + at))
        assert found is not None
        assert (found.phys, "wx") == tables.oracle(virt + at)
        assert (found.page_size, found.writable, found.executable, found.user) == (size, True, True, False)
    assert table.walk(VirtAddr(virt - 1)) is None
    assert len(table.entries(VirtAddr(virt))) == levels - level + 1


def test_five_levels_reach_where_four_do_not(make_tables: Any) -> None:
    tables = make_tables(levels=5)
    virt = 0xFF11_0000_0000_0000
    tables.map(virt, 0x5000)
    assert table_of(tables).translate(VirtAddr(virt + 7)) == 0x5007
    assert not PageTable(tables.ram, PhysAddr(tables.root), 4).is_canonical(virt)


@pytest.mark.parametrize("addr", [0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63])
def test_non_canonical_addresses_are_unmapped(make_tables: Any, addr: int) -> None:
    assert table_of(make_tables()).walk(VirtAddr(addr)) is None


@pytest.mark.parametrize(
    ("flags", "upper", "rights"),
    [
        (P | W | U, P | W | U, "uwx"),
        (P | U, P | W | U, "ux"),
        (P | W | U | NX, P | W | U, "uw"),
        (P | W | U, P | W | U | NX, "uw"),
        (P | W | U, P | U, "ux"),
        (P | W | U, P | W, "wx"),
    ],
)
def test_permissions_are_those_of_all_levels(make_tables: Any, flags: int, upper: int, rights: str) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x7000, flags, upper=upper)
    found = table_of(tables).walk(VirtAddr(TEXT))
    assert found is not None
    assert (found.user, found.writable, found.executable) == tuple(letter in rights for letter in "uwx")
    assert tables.oracle(TEXT) == (0x7000, rights)
    (run,) = table_of(tables).mappings(window(TEXT, TEXT + 0x1000))
    assert (run.user, run.writable, run.executable) == tuple(letter in rights for letter in "uwx")


def test_pat_bit_of_a_large_page_is_no_address_bit(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x60_0000 | 0x1000, level=2)
    assert table_of(tables).translate(VirtAddr(TEXT + 0x1234)) == 0x60_1234


def test_read_merges_physically_contiguous_pages(make_tables: Any) -> None:
    tables = make_tables()
    for page, phys in enumerate((0x8000, 0x9000, 0x5000)):
        tables.map(TEXT + 0x1000 * page, phys)
        tables.ram.write_physical(PhysAddr(phys), bytes([page]) * 0x1000)
    table = table_of(tables)
    table.translate(VirtAddr(TEXT))
    tables.ram.reads.clear()
    assert table.read(VirtAddr(TEXT + 0x800), 0x2000) == b"\0" * 0x800 + b"\1" * 0x1000 + b"\2" * 0x800
    assert tables.ram.reads == [(0x8800, 0x1800), (0x5000, 0x800)]


def test_read_of_an_unmapped_page_names_it(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x8000)
    with pytest.raises(UnmappedError) as caught:
        table_of(tables).read(VirtAddr(TEXT + 0xFF0), 0x20)
    assert caught.value.addr == TEXT + 0x1000


def test_write_that_meets_an_unmapped_page_writes_nothing(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x8000)
    table = table_of(tables)
    with pytest.raises(UnmappedError):
        table.write(VirtAddr(TEXT + 0xFF0), b"x" * 0x20)
    assert table.read(VirtAddr(TEXT + 0xFF0), 0x10) == bytes(0x10)


def test_write_crosses_pages(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x8000)
    tables.map(TEXT + 0x1000, 0x3000)
    table_of(tables).write(VirtAddr(TEXT + 0xFFE), b"abcd")
    assert tables.ram.read_physical(PhysAddr(0x8FFE), 2) + tables.ram.read_physical(PhysAddr(0x3000), 2) == b"abcd"


def test_entries_are_remembered_until_invalidated(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x8000)
    table = table_of(tables)
    assert table.translate(VirtAddr(TEXT)) == 0x8000
    tables.map(TEXT, 0x9000)
    assert table.translate(VirtAddr(TEXT)) == 0x8000
    table.invalidate()
    assert table.translate(VirtAddr(TEXT)) == 0x9000


def test_mappings_merge_equal_permissions_and_clip_to_the_window(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x40_0000, P, level=2)
    tables.map(TEXT + 0x20_0000, 0x9000, P)
    tables.map(TEXT + 0x20_1000, 0x3000, P | W)
    tables.map(TEXT + 0x20_3000, 0x4000, P | W)
    tables.map(0xFFFF_FFFF_FFFF_F000, 0x2000, P | NX)
    table = table_of(tables)
    found = [(run.range.start, run.range.end, run.writable, run.executable)
             for run in table.mappings(window(TEXT + 0x1000, 1 << 64))]  # fmt: skip
    assert found == [
        (TEXT + 0x1000, TEXT + 0x20_1000, False, True),
        (TEXT + 0x20_1000, TEXT + 0x20_2000, True, True),
        (TEXT + 0x20_3000, TEXT + 0x20_4000, True, True),
        (0xFFFF_FFFF_FFFF_F000, 1 << 64, False, False),
    ]
    assert list(table.mappings(window(TEXT - 0x1000, TEXT))) == []


def test_mappings_reach_the_lower_half_too(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(0x40_0000, 0x9000, P | U)
    assert [run.range for run in table_of(tables).mappings(window(0, 1 << 64))] == [window(0x40_0000, 0x40_1000)]


# -- the kernel's table, from whatever is loaded ------------------------------------------------------------------


def test_pcid_and_the_no_flush_bit_are_no_address(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(TEXT, 0x8000)
    cr3 = 1 << 63 | tables.root | 0x123
    assert loaded_table(tables.ram, cr3, 0).root == tables.root
    assert kernel_root(tables.ram, cr3, 0, VirtAddr(TEXT)).root == tables.root


def test_levels_come_from_cr4(make_tables: Any) -> None:
    tables = make_tables(levels=5)
    tables.map(TEXT, 0x8000)
    assert kernel_root(tables.ram, tables.root, CR4_LA57, VirtAddr(TEXT)).levels == 5


def test_user_table_under_pti_leads_to_the_kernels(make_tables: Any) -> None:
    kernel, user = make_tables(), make_tables(root=0x10_1000, pool=0x30_0000)
    for tables in (kernel, user):
        tables.map(TEXT, 0x8000)
    kernel.map(TEXT + 0x1000, 0x9000)
    assert kernel_root(kernel.ram, user.root | 0x801, 0, VirtAddr(TEXT)).root == kernel.root


def test_root_that_has_bit_12_by_chance_is_kept(make_tables: Any, ram: Any) -> None:
    tables = make_tables(root=0x10_1000)
    tables.map(TEXT, 0x8000)
    assert kernel_root(ram, 0x10_1000, 0, VirtAddr(TEXT)).root == 0x10_1000


def test_neighbour_that_translates_to_elsewhere_is_no_sibling(make_tables: Any) -> None:
    neighbour, tables = make_tables(), make_tables(root=0x10_1000, pool=0x30_0000)
    neighbour.map(TEXT, 0xA000)
    tables.map(TEXT, 0x8000)
    assert kernel_root(tables.ram, tables.root, 0, VirtAddr(TEXT)).root == tables.root


def test_neighbour_that_is_no_table_at_all_is_survived(make_tables: Any) -> None:
    tables = make_tables(root=0x10_1000)
    tables.map(TEXT, 0x8000)
    tables.ram.write_physical(PhysAddr(0x10_0000), b"\xff" * 0x1000)
    assert kernel_root(tables.ram, tables.root, 0, VirtAddr(TEXT)).root == tables.root


def test_tables_without_the_kernel_are_refused_with_advice(make_tables: Any) -> None:
    with pytest.raises(GuestStateError, match=r"does not map 0xffffffff81000000.*\n.*hint: .*let it run"):
        kernel_root(make_tables().ram, 0x10_0000, 0, VirtAddr(TEXT))
