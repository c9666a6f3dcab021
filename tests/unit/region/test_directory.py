"""The directory: what is given out is found again from memory alone, of whichever kind; a forged one is an error."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.region.directory import ENTRY_SIZE, Kind, RegionObject, read_directory
from gdb_kprobe.region.layout import DIRECTORY_OFFSET
from gdb_kprobe.region.region import Region
from tests.unit.region.conftest import MIB, PHYS, VIRT, Ram, again, plain_region

_MADE = (Kind.RECORDS, Kind.COUNTERS, Kind.DEFINITIONS, Kind.TABLE, Kind.CODE)
PAGE = 0x1000


class Life(RuleBasedStateMachine):
    """Objects come and go in a region that is small for them. Checked against what memory alone says."""

    def __init__(self) -> None:
        super().__init__()
        self.region, self.ram = plain_region()
        self.made: list[RegionObject] = []
        self.of_slots: list[RegionObject] = []

    @rule(kind=st.sampled_from(_MADE), size=st.integers(1, 60 * PAGE))
    def allocate(self, kind: Kind, size: int) -> None:
        try:
            self.made.append(self.region.allocate(kind, size))
        except RegionError:
            return
        found = self.made[-1]
        assert found.size >= size
        assert not any(self.ram.data[found.start : found.end]), "of zeros"
        self.ram.data[found.start : found.end] = b"\x5a" * found.size

    @rule(size=st.integers(1, 8 * PAGE))
    def code_for_slots(self, size: int) -> None:
        """Planned first, and written down then."""
        before = self.region.objects
        if self.region.slots.allocate(size) is None:
            return
        with contextlib.suppress(RegionError):  # the directory has no room for another page of its own
            self.region.commit()
        new = [one for one in self.region.objects if one not in before and one.kind != Kind.DIRECTORY]
        for one in new:
            assert one.kind == Kind.CODE
            self.ram.data[one.start : one.end] = b"\x5a" * one.size
        self.made += new
        self.of_slots += new

    @rule(count=st.integers(1, 200))
    def many_small(self, count: int) -> None:
        """More than a page of entries in the end."""
        for _ in range(count):
            self.allocate(Kind.COUNTERS, 1)

    @precondition(lambda self: self.made)
    @rule(pick=st.randoms(use_true_random=False))
    def remove(self, pick: random.Random) -> None:
        found = pick.choice(self.made)
        if found not in self.of_slots:
            self.region.remove(found)
            self.made.remove(found)

    @invariant()
    def memory_tells_all(self) -> None:
        found = [one for one in read_directory(self.ram, self.region.header) if one.kind != Kind.DIRECTORY]
        assert sorted(found, key=lambda one: one.start) == sorted(self.made, key=lambda one: one.start)
        for one in self.made:
            assert (one.start >= self.region.header.code_start * PAGE) == (one.kind == Kind.CODE)
            if one.kind != Kind.CODE:
                assert one.end <= self.region.header.data_end * PAGE


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_slots_that_are_only_planned_change_nothing(made: tuple[Region, Ram]) -> None:
    region, ram = made
    ram.log.clear()
    slot = region.slots.allocate(100)
    assert slot is not None
    assert (ram.log, region.objects) == ([], ())
    region.commit()
    [code] = region.objects
    assert slot.start in code.range(VIRT)
    assert slot.code in region.header.code
    region.commit()
    assert region.objects == (code,)


def test_another_session_goes_on_behind_what_is_in_use(made: tuple[Region, Ram]) -> None:
    region, ram = made
    slot = region.slots.allocate(100)
    assert slot is not None
    region.commit()
    counters = [region.counters.allocate().addr for _ in range(3)]
    table = region.allocate(Kind.TABLE, PAGE)
    region.allocate(Kind.DEFINITIONS, PAGE)
    later = again(ram)
    assert later.header.owner == region.header.owner + 1
    assert {known.kind for known in later.left} == {Kind.CODE, Kind.TABLE}
    later.keep_counters(counters[:2])
    assert later.counters.allocate().addr not in counters
    other = later.slots.allocate(100)
    assert other is not None
    later.commit()
    assert not other.range.overlaps(region.objects[0].range(VIRT))
    # Whoever is in the old slot still looks into the old table.
    assert later.release_left([slot.code]) == 0
    assert table in later.objects
    assert later.release_left([other.code]) == 2
    assert (later.left, table in later.objects) == ((), False)
    given = {later.counters.allocate().addr for _ in range(PAGE // 32 - 4)}
    assert not set(counters) & given, "there are others in the page that were never given out"
    assert later.counters.release() == 1
    assert later.counters.allocate().addr == counters[2], "nobody adds to it any more"


def test_where_it_is_never_known_who_is_in_code_what_was_not_used_is(made: tuple[Region, Ram]) -> None:
    region, ram = made
    used = region.free
    for count in range(300):
        slot = region.slots.allocate(24)
        assert slot is not None
        region.commit()
        ram.write_physical(region.header.physical(slot.start), slot.image(VirtAddr(count + 1), b"\x90"))
        region.counters.allocate()
        region = again(ram)
        region.keep_counters([])
        region.use_rest()
    assert used - region.free < 300 * 64 + 0x8000


def test_what_a_kprobe_of_the_guests_leads_to_stays(made: tuple[Region, Ram]) -> None:
    region, ram = made
    slot = region.slots.allocate(100)
    assert slot is not None
    region.commit()
    later = again(ram)
    later.slots.claim(Slot(slot.start, slot.size))
    assert later.release_left([]) == 0
    later.slots.free(slot)
    later.slots.release([])
    assert later.release_left([]) == 1


def test_an_object_of_a_kind_that_is_not_known_stays(made: tuple[Region, Ram]) -> None:
    region, ram = made
    known = region.allocate(Kind.TABLE, PAGE)
    forge(region, ram, DIRECTORY_OFFSET, replace(known, kind=99))
    later = again(ram)
    assert [found.name for found in later.objects] == ["kind 99"]
    assert later.allocate(Kind.TABLE, PAGE).start != known.start


def forge(region: Region, ram: Ram, at: int, found: RegionObject) -> None:
    """Write an entry that says that there is *found*, checksum and all, to offset *at*."""
    ram.write_physical(PhysAddr(PHYS + at), found.pack(region.header))


@pytest.mark.parametrize("bit", range(0, 8 * ENTRY_SIZE, 3))
def test_a_bit_of_an_entry_that_is_another_one_is_noticed(made: tuple[Region, Ram], bit: int) -> None:
    region, ram = made
    region.counters.allocate()
    ram.data[DIRECTORY_OFFSET + bit // 8] ^= 1 << bit % 8
    with pytest.raises(RegionError, match="the checksum of an entry of the region's directory is wrong"):
        read_directory(ram, region.header)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((6, 1, 1, 0x3800, PAGE), "no whole pages"),
        ((6, 1, 1, 0x4000, 0), "no whole pages"),
        ((6, 1, 1, 0x1000, PAGE), "not within"),
        ((6, 1, 1, 0x4000, 0xFFFF_F000), "not within"),
        ((6, 1, 1, 2 * MIB - PAGE, PAGE), "not within"),
        ((3, 1, 1, 0x2000, PAGE), "two objects of the region have its page 2"),
        ((1, 1, 1, 0x2000, PAGE), "two objects of the region have its page 2"),
    ],
)
def test_a_forged_entry_is_an_error(
    made: tuple[Region, Ram], entry: tuple[int, int, int, int, int], message: str
) -> None:
    region, ram = made
    region.counters.allocate()
    forge(region, ram, DIRECTORY_OFFSET + ENTRY_SIZE, RegionObject(*entry))
    with pytest.raises(RegionError, match=message):
        read_directory(ram, region.header)


def test_a_directory_that_leads_back_to_itself_has_an_end(made: tuple[Region, Ram]) -> None:
    region, ram = made
    more = region.allocate(Kind.DIRECTORY, PAGE)
    forge(region, ram, more.start, more)
    with pytest.raises(RegionError, match="two objects"):
        read_directory(ram, region.header)


def test_code_in_memory_for_data_is_not_gone_on_with(made: tuple[Region, Ram]) -> None:
    region, ram = made
    known = region.allocate(Kind.TABLE, PAGE)
    forge(region, ram, DIRECTORY_OFFSET, replace(known, kind=Kind.CODE))
    with pytest.raises(RegionError, match="code of version 1 in memory for data"):
        again(ram)


def test_a_region_of_2_mib_holds_what_thousands_of_probes_need() -> None:
    region, _ = plain_region(2 * MIB)
    for _ in range(4000):
        assert region.slots.allocate(150) is not None
        region.counters.allocate()
    region.commit()
    assert region.free > 0
    assert PhysAddr(PHYS) == region.header.phys
    assert VirtAddr(VIRT) == region.header.virt


def test_the_gate_of_the_session_before_is_none_of_the_next(made: tuple[Region, Ram]) -> None:
    region, ram = made
    gate = region.allocate(Kind.CODE, PAGE).range(VIRT).start
    region.describe_dispatch(AddressRange(VirtAddr(1), VirtAddr(9)), gate)
    later = again(ram)
    assert (later.header.gate, later.header.entry_text.size) == (0, 0)


def test_data_stay_while_code_that_may_use_them_does_and_go_with_it(made: tuple[Region, Ram]) -> None:
    region, ram = made
    region.slots.allocate(100)
    region.commit()
    region.allocate(Kind.TABLE, PAGE)
    later = again(ram)
    later.use_rest()
    assert {known.name for known in later.left} == {"code", "table"}
    assert later.release_left([]) == 0, "there are slots of this session in that code"
    alone = again(plain_with_table())
    assert {known.name for known in alone.left} == {"table"}
    assert alone.release_left([]) == 1, "no code can use it"


def plain_with_table() -> Ram:
    region, ram = plain_region()
    region.allocate(Kind.TABLE, PAGE)
    return ram
