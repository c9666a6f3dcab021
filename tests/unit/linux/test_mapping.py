from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.mapping import (
    CODE_FLAGS,
    DATA_FLAGS,
    MappingPlan,
    find_hole,
    map_pages,
    plan_mapping,
    table_pages_needed,
)
from gdb_kprobe.system.paging import PageTable

P, W, U, G, NX = 1, 2, 4, 0x100, 1 << 63
MIB = 1 << 20
AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
REGION = 0x1000_0000
TABLES = 0x1800_0000
TABLES_AT, ROOM = PhysAddr(TABLES), 0x10_0000


@pytest.fixture
def ram(ram: Any) -> Any:
    ram.size = 1 << 32
    return ram


def table_of(tables: Any) -> PageTable:
    return PageTable(tables.ram, PhysAddr(tables.root), tables.levels)


def plan(tables: Any, virt: int, size: int = 4 * MIB, *, data: int = MIB, room: int = ROOM) -> MappingPlan:
    return plan_mapping(
        table_of(tables),
        VirtAddr(virt),
        PhysAddr(REGION),
        size,
        tables=(TABLES_AT, room),
        data=data,
    )


def install(tables: Any, made: MappingPlan, data: int = MIB) -> None:
    """Hang it into the tables; then fill what it leaves empty, in pieces, as code."""
    for addr, image in made.tables:
        tables.ram.write_physical(addr, image)
    for link in made.links:
        assert tables.ram.read_physical(link.addr, 8) == link.old
        tables.ram.write_physical(link.addr, link.new)
    virt, end = made.range.start, made.range.size
    table = table_of(tables)
    for start, stop in ((0x20_3000, end), (data, min(0x20_3000, end))):
        for at in range(data, end, 0x8_0000):
            assert tables.oracle(virt + at) is None or at >= start
        size = max(0, stop - start)
        map_pages(
            table, table.memory, VirtAddr(virt + start), PhysAddr(REGION + start), size, CODE_FLAGS, (TABLES_AT, ROOM)
        )


def assert_mapped(tables: Any, virt: int, size: int, data: int) -> None:
    for at in range(0, size, 0x1000):
        assert tables.oracle(virt + at) == (REGION + at, "w" if at < data else "x")
    assert tables.oracle(virt - 1) is None
    assert tables.oracle(virt + size) is None


def test_hole_is_the_highest_that_fits(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(AREA.end - 0x1000, 0x8000)
    tables.map(AREA.end - 10 * MIB, 0x9000)
    assert find_hole(table_of(tables), AREA, 4 * MIB) == AREA.end - 6 * MIB
    assert find_hole(table_of(tables), AREA, 8 * MIB) == AREA.end - 18 * MIB
    assert find_hole(table_of(tables), AREA, 4 * MIB, 16 * MIB) == AREA.end - 16 * MIB


def test_hole_of_an_odd_size_ends_inside_the_window(make_tables: Any) -> None:
    tables = make_tables()
    assert find_hole(table_of(tables), AREA, 3 * MIB) == AREA.end - 4 * MIB


def test_entry_that_is_not_present_but_holds_something_is_no_hole(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(AREA.end - 2 * MIB, 0x8000_0000, 0xF00, level=2)
    assert find_hole(table_of(tables), AREA, 2 * MIB) == AREA.end - 4 * MIB


def test_empty_page_table_that_is_there_is_no_hole(make_tables: Any) -> None:
    tables = make_tables()
    tables.map(AREA.end - 2 * MIB, 0x8000)
    tables.map(AREA.end - 2 * MIB, 0, 0)
    assert find_hole(table_of(tables), AREA, 2 * MIB) == AREA.end - 4 * MIB
    with pytest.raises(RegionError, match="its PTE entry"):
        plan(tables, AREA.end - 2 * MIB, 2 * MIB)


def test_full_window_has_no_hole(make_tables: Any) -> None:
    tables = make_tables()
    small = AddressRange(AREA.start, VirtAddr(AREA.start + 4 * MIB))
    tables.map(AREA.start + 2 * MIB, 0x8000)
    assert find_hole(table_of(tables), small, 4 * MIB) is None


@pytest.mark.parametrize("levels", [4, 5])
def test_mapping_hangs_one_entry_for_each_2_mib_into_an_existing_pmd_table(make_tables: Any, levels: int) -> None:
    tables = make_tables(levels=levels)
    tables.map(AREA.start, 0x8000)
    virt = AREA.end - 8 * MIB
    tables.map(virt + 6 * MIB, 0x9000)  # so that the PMD table of that GiB exists
    made = plan(tables, virt)
    assert (len(made.tables), len(made.links)) == (2, 2)
    install(tables, made)
    assert_mapped(tables, virt, 4 * MIB, MIB)
    assert tables.oracle(virt + 6 * MIB) == (0x9000, "wx")


@pytest.mark.parametrize(("levels", "pages"), [(4, 3), (5, 4)])
def test_missing_upper_tables_are_made_and_hung_once(make_tables: Any, levels: int, pages: int) -> None:
    tables = make_tables(levels=levels)
    made = plan(tables, AREA.end - 8 * MIB)
    # With nothing there at all: the PTE tables, a PMD table, a PUD table, and with five levels a P4D table.
    assert (len(made.tables), len(made.links)) == (pages + 1, 1)
    assert made.links[0].addr == tables.root + 8 * 511
    install(tables, made)
    assert_mapped(tables, AREA.end - 8 * MIB, 4 * MIB, MIB)


def test_mapping_may_cross_the_end_of_a_pmd_table(make_tables: Any) -> None:
    tables = make_tables()
    border = 0xFFFF_FFFF_C000_0000
    tables.map(border - (1 << 30), 0x8000)  # the lower PMD table exists, the upper one does not
    made = plan(tables, border - 2 * MIB)
    assert len(made.links) == 2
    install(tables, made)
    assert_mapped(tables, border - 2 * MIB, 4 * MIB, MIB)


def test_size_need_not_be_a_multiple_of_2_mib(make_tables: Any) -> None:
    tables = make_tables()
    made = plan(tables, AREA.end - 8 * MIB, 3 * MIB + 0x1000, data=0)
    install(tables, made, 0)
    assert_mapped(tables, AREA.end - 8 * MIB, 3 * MIB + 0x1000, 0)


def test_no_entry_of_ours_is_global_or_for_users_or_both_writable_and_executable(make_tables: Any) -> None:
    made = plan(make_tables(), AREA.end - 8 * MIB)
    leaves = 0
    for _, image in made.tables:
        for at in range(0, 4096, 8):
            value = int.from_bytes(image[at : at + 8], "little")
            assert not value & (G | U)
            if REGION <= value & 0xF_FFFF_FFFF_F000 < REGION + 4 * MIB:
                leaves += 1
                assert bool(value & W) == bool(value & NX)
    assert leaves == 256
    for flags in (CODE_FLAGS, DATA_FLAGS):
        assert not flags & (G | U)
        assert bool(flags & W) == bool(flags & NX)


def test_undo_takes_the_links_back_in_reverse(make_tables: Any) -> None:
    tables = make_tables()
    virt = AREA.end - 8 * MIB
    tables.map(virt + 6 * MIB, 0x9000)
    made = plan(tables, virt)
    install(tables, made)
    undo = made.undo()
    assert [link.addr for link in undo] == [link.addr for link in reversed(made.links)]
    for link in undo:
        assert tables.ram.read_physical(link.addr, 8) == link.old
        tables.ram.write_physical(link.addr, link.new)
    assert tables.oracle(virt) is None
    assert tables.oracle(virt + 6 * MIB) == (0x9000, "wx")


def test_taken_place_is_refused_and_names_the_entry(make_tables: Any) -> None:
    tables = make_tables()
    virt = AREA.end - 8 * MIB
    tables.map(virt + 2 * MIB, 0x40_0000, level=2)
    with pytest.raises(RegionError, match=rf"{virt + 2 * MIB:#x} is taken in the guest: its PMD entry.*holds 0x400083"):
        plan(tables, virt)


def test_too_little_room_for_tables_is_refused_with_advice(make_tables: Any) -> None:
    with pytest.raises(RegionError, match=r"the 1 pages set aside for page tables do not suffice\n.*make the region"):
        plan(make_tables(), AREA.end - 8 * MIB, room=0x1000)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("virt", [0xFFFF_FFFF_C000_0000 - 2 * MIB, AREA.end - 16 * MIB])
@pytest.mark.parametrize("size", [2 * MIB, 16 * MIB])
def test_pages_needed_are_never_fewer_than_planned(make_tables: Any, levels: int, virt: int, size: int) -> None:
    made = plan(make_tables(levels=levels), virt, size)
    assert len(made.tables) <= table_pages_needed(size, levels)


def test_only_empty_leaves_of_our_own_tables_are_filled(make_tables: Any) -> None:
    tables = make_tables()
    virt = VirtAddr(AREA.end - 8 * MIB)
    tables.map(virt + 4 * MIB, 0x9000)  # the guest's
    made = plan(tables, virt)
    for addr, image in made.tables:
        tables.ram.write_physical(addr, image)
    for link in made.links:
        tables.ram.write_physical(link.addr, link.new)
    for at, size, what in ((0, 0x1000, "holds 0x8"), (MIB, 4 * MIB, "PTE entry"), (8 * MIB, 0x1000, "entry")):
        with pytest.raises(RegionError, match=f"cannot be mapped: .*{what}"):
            map_pages(
                table_of(tables), tables.ram, VirtAddr(virt + at), PhysAddr(REGION), size, CODE_FLAGS, (TABLES_AT, ROOM)
            )
        assert tables.oracle(virt + MIB) is None
        assert tables.oracle(virt + 4 * MIB) == (0x9000, "wx")


def test_what_was_filled_so_before_a_cut_is_filled_again_and_another_leaf_in_between_is_not(make_tables: Any) -> None:
    tables = make_tables()
    virt = VirtAddr(AREA.end - 8 * MIB)
    made = plan(tables, virt)
    for addr, image in made.tables:
        tables.ram.write_physical(addr, image)
    for link in made.links:
        tables.ram.write_physical(link.addr, link.new)
    at, phys, room = VirtAddr(virt + MIB), PhysAddr(REGION + MIB), (TABLES_AT, ROOM)
    map_pages(table_of(tables), tables.ram, at, phys, 0x3000, CODE_FLAGS, room)
    map_pages(table_of(tables), tables.ram, at, phys, 0x5000, CODE_FLAGS, room)
    assert tables.oracle(at + 0x4000) == (phys + 0x4000, "x")
    with pytest.raises(RegionError, match="cannot be mapped"):
        map_pages(table_of(tables), tables.ram, at, phys, 0x7000, DATA_FLAGS, room)
    assert tables.oracle(at + 0x6000) is None
