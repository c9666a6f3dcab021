"""Records: what memory alone says is patched, after every change; what cannot be one is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes.patch import CodePatch, over
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import PhysAddr, Rung, VirtAddr
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.region.layout import Layout
from gdb_kprobe.region.records import (
    RECORD_SIZE,
    Record,
    RecordKind,
    clear_records,
    iter_records,
    read_records,
    record_cells,
    sealed,
)
from gdb_kprobe.region.region import Region
from tests.unit.region.conftest import MIB, VIRT, Ram, again, plain_region

addresses = st.integers(0, (1 << 64) - 1)
patches = st.integers(1, 16).flatmap(
    lambda n: st.builds(
        CodePatch,
        addresses.map(VirtAddr),
        st.binary(min_size=n, max_size=n),
        st.binary(min_size=n, max_size=n),
    )
)
records = st.builds(
    Record, patches, st.builds(Slot, addresses.map(VirtAddr), st.integers(64, 4096)), st.sampled_from(Rung)
)


COOKIE = bytes(range(16))
CODE = VirtAddr(VIRT + Layout(2 * MIB).end - 4 * 0x1000)
"""The first piece of code."""


def record_at(addr: int) -> Record:
    slot = Slot(VirtAddr(CODE + addr % 64 * 64), 64)
    return Record(CodePatch(VirtAddr(addr), b"\x55", b"\xcc"), slot, Rung.BOOSTED)


@pytest.fixture
def made() -> tuple[Region, Ram]:
    """A region with a piece of code."""
    region, ram = plain_region()
    assert region.slots.allocate(8) is not None
    region.commit()
    return region, ram


def told(ram: Ram, region: Region) -> list[int]:
    """What memory alone says is patched."""
    return sorted(record.patch.addr for record in iter_records(ram, region.header))


@given(records)
def test_a_record_survives_the_round_trip(record: Record) -> None:
    assert len(record.pack(COOKIE)) == RECORD_SIZE
    assert Record.unpack(record.pack(COOKIE), COOKIE) == record


def test_memory_of_zeros_is_no_record() -> None:
    assert Record.unpack(bytes(RECORD_SIZE), COOKIE) is None


@pytest.mark.parametrize(("at", "value"), [(0, 9), (4, 0), (4, 17), (5, 3)], ids=["kind", "empty", "long", "rung"])
def test_what_no_gdb_kprobe_writes_is_an_error(at: int, value: int) -> None:
    data = bytearray(record_at(5).pack(COOKIE))
    data[at] = value
    with pytest.raises(RegionError, match="its checksum is wrong"):
        Record.unpack(bytes(data), COOKIE)
    with pytest.raises(RegionError, match="it is of kind"):
        Record.unpack(sealed(bytes(data), COOKIE), COOKIE)


@given(st.lists(st.integers(0, 9), max_size=60))
def test_memory_tells_what_is_patched_after_every_change(toggled: list[int]) -> None:
    region, ram = plain_region()
    region.slots.allocate(8)
    region.commit()
    patched: set[int] = set()
    for addr in toggled:
        if addr in patched:
            region.records.remove(VirtAddr(addr))
        else:
            region.records.add(record_at(addr))
        patched ^= {addr}
        assert told(ram, region) == sorted(patched)


def test_there_may_be_as_many_as_the_region_has_room_for(made: tuple[Region, Ram]) -> None:
    region, ram = made
    count = 0

    def add_all() -> None:
        nonlocal count
        while True:
            region.records.add(record_at(count))
            count += 1

    with pytest.raises(RegionError, match=r"no .* KiB left in a piece for records\n.*kprobe info"):
        add_all()
    assert count > 20_000
    assert told(ram, region) == list(range(count))
    region.records.remove(VirtAddr(7))
    region.records.add(record_at(count))
    assert told(ram, region) == [addr for addr in range(count + 1) if addr != 7]
    assert {found.kind for found in region.objects} == {Kind.RECORDS, Kind.CODE}


def test_they_are_cleared_from_memory_alone(made: tuple[Region, Ram]) -> None:
    region, ram = made
    for addr in range(300):
        region.records.add(record_at(addr))
    clear_records(ram, region.header)
    assert told(ram, region) == []
    assert told(ram, again(ram)) == []


# -- the guest has written over it, or forged it -----------------------------------------------------------------------


def cells(region: Region) -> list[int]:
    return [at for at, _ in record_cells(region.memory, region.header)]


@pytest.mark.parametrize("bit", range(0, 8 * RECORD_SIZE, 7))
def test_a_bit_of_a_record_that_is_another_one_is_noticed(made: tuple[Region, Ram], bit: int) -> None:
    region, ram = made
    region.records.add(record_at(1))
    region.records.add(record_at(2))
    at = PhysAddr(cells(region)[0])
    data = int.from_bytes(ram.read_physical(at, RECORD_SIZE), "little")
    ram.write_physical(at, (data ^ 1 << bit).to_bytes(RECORD_SIZE, "little"))
    records, wrong = read_records(ram, region.header)
    assert [record.patch.addr for record in records] == [2]
    assert wrong == ("record 0 of the region is damaged: its checksum is wrong",)


SLOT = record_at(1).slot
TEXT = 0xFFFF_FFFF_8100_1000
JUMP = b"\xe9" + (SLOT.code - (TEXT + 5)).to_bytes(4, "little")
CALL = b"\xe8" + JUMP[1:]


@pytest.mark.parametrize(
    ("addr", "new", "rung", "kind", "slot"),
    [
        (TEXT, b"\x90", Rung.BOOSTED, RecordKind.SITE, SLOT),  # the text there may hold that by itself
        (TEXT, b"\xcc\x90", Rung.BOOSTED, RecordKind.SITE, SLOT),
        (TEXT, JUMP, Rung.BOOSTED, RecordKind.SITE, SLOT),
        (TEXT + 8, JUMP, Rung.OPTIMIZED, RecordKind.SITE, SLOT),  # leads to elsewhere
        (TEXT, JUMP + b"\x90", Rung.OPTIMIZED, RecordKind.SITE, SLOT),
        (TEXT, JUMP, Rung.BOOSTED, RecordKind.HOOK, SLOT),
        (TEXT, b"\xe8" + bytes(4), Rung.BOOSTED, RecordKind.HOOK, SLOT),
        (VIRT + 8, b"\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),  # the region itself
        ((1 << 64) - 1, b"\xcc\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),
        ((1 << 64) - 1, b"\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),  # its end is no address
        (TEXT, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(VirtAddr(TEXT), 64)),
        (TEXT, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(SLOT.start, 1 << 63)),
        (TEXT, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(VirtAddr(VIRT + Layout(2 * MIB).end - 32), 64)),
    ],
)
def test_a_forged_record_chooses_neither_what_is_written_nor_where(
    made: tuple[Region, Ram], addr: int, new: bytes, rung: Rung, kind: RecordKind, slot: Slot
) -> None:
    """Restoring writes a record's old bytes where its new ones are: so these must be a patch of ours."""
    region, ram = made
    region.records.add(Record(CodePatch(VirtAddr(addr), bytes(len(new)), new), slot, rung, kind))
    records, [wrong] = read_records(ram, region.header)
    assert records == ()
    assert wrong.startswith("record 0 of the region is damaged: ")


@pytest.mark.parametrize(
    ("new", "rung", "kind"),
    [
        (b"\xcc", Rung.SINGLE_STEP, RecordKind.SITE),
        (b"\xcc" * 5, Rung.BOOSTED, RecordKind.SITE),
        (JUMP + b"\xcc\xcc", Rung.OPTIMIZED, RecordKind.SITE),
        (over(VirtAddr(TEXT), bytes(19), JUMP).new, Rung.OPTIMIZED, RecordKind.SITE),
        (CALL, Rung.BOOSTED, RecordKind.HOOK),
    ],
)
def test_what_we_put_over_text_is_a_record(made: tuple[Region, Ram], new: bytes, rung: Rung, kind: RecordKind) -> None:
    region, ram = made
    record = Record(CodePatch(VirtAddr(TEXT), bytes(len(new)), new), SLOT, rung, kind)
    region.records.add(record)
    assert read_records(ram, region.header) == ((record,), ())


def test_of_two_records_of_one_place_the_first_counts(made: tuple[Region, Ram]) -> None:
    region, ram = made
    region.records.add(record_at(1))
    ram.write_physical(PhysAddr(cells(region)[1]), record_at(1).pack(region.header.cookie))
    assert read_records(ram, region.header)[1] == ("record 1 of the region is damaged: 0x1 has another one",)


def test_a_record_of_another_region_is_none(made: tuple[Region, Ram]) -> None:
    """What the memory held before."""
    region, ram = made
    region.records.add(record_at(1))
    ram.write_physical(PhysAddr(cells(region)[0]), record_at(1).pack(b"another region's"))
    assert told(ram, region) == []


def test_another_session_keeps_the_records_that_stay_and_no_others(made: tuple[Region, Ram]) -> None:
    region, ram = made
    for addr in range(100):
        region.records.add(record_at(addr))
    later = again(ram, [record_at(7), record_at(60)])
    assert told(ram, later) == [7, 60]
    later.records.add(record_at(7))
    later.records.add(record_at(200))
    assert told(ram, later) == [7, 60, 200]
    later.records.remove(VirtAddr(60))
    assert told(ram, again(ram, [record_at(7), record_at(200)])) == [7, 200]
