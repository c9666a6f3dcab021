"""The region's description of itself: the same after a round trip through guest memory."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import RegionError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch, over
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import AddressRange, PhysAddr, Rung, VirtAddr
from gdb_kprobe.session.header import (
    MAGIC,
    RECORD_OFFSET,
    RECORD_SIZE,
    Header,
    HeaderStore,
    Identity,
    Layout,
    Record,
    RecordKind,
    iter_records,
    read_header,
    read_records,
)

MIB = 1 << 20
PHYS = PhysAddr(0x40_0000)
COOKIE = bytes(range(16))
VIRT = VirtAddr(0x1000_0000)
addresses = st.integers(0, (1 << 64) - 1)


class Ram:
    """4 MiB from PHYS on, full of what somebody left there."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x5a" * (4 * MIB))

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if not PHYS <= addr <= PHYS + len(self.data) - size:
            raise TargetError("no RAM")
        return bytes(self.data[addr - PHYS : addr - PHYS + size])

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        assert PHYS <= addr <= PHYS + len(self.data) - len(data)
        self.data[addr - PHYS : addr - PHYS + len(data)] = data

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


headers = st.builds(
    Header,
    size=st.sampled_from((2 * MIB, 4 * MIB, 16 * MIB)),
    virt=addresses.map(VirtAddr),
    phys=addresses.map(PhysAddr),
    identity=st.builds(
        Identity,
        build_id=st.binary(min_size=20, max_size=20),
        text_base=addresses.map(VirtAddr),
        bp_entry=addresses.map(VirtAddr),
        entry_addr=addresses.map(PhysAddr),
        entry_value=addresses,
    ),
    cookie=st.binary(min_size=16, max_size=16),
    code_high_water=addresses.map(VirtAddr),
    records=st.integers(0, (1 << 32) - 1),
)
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


@given(headers)
def test_a_header_survives_the_round_trip(header: Header) -> None:
    assert Header.unpack(header.pack().ljust(0x1000, b"\0")) == header


@given(records)
def test_a_record_survives_the_round_trip(record: Record) -> None:
    assert len(record.pack(COOKIE)) == RECORD_SIZE
    assert Record.unpack(record.pack(COOKIE), COOKIE) == record


@given(headers, st.integers(0, 7), st.integers(1, 255))
def test_a_wrong_magic_is_no_header(header: Header, at: int, change: int) -> None:
    data = bytearray(header.pack())
    data[at] ^= change
    assert Header.unpack(bytes(data)) is None


def test_memory_of_zeros_is_no_header_and_no_record() -> None:
    assert Header.unpack(bytes(0x1000)) is None
    assert Record.unpack(bytes(RECORD_SIZE), COOKIE) is None


def test_another_version_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RegionError, match=r"version 8; this gdb_kprobe knows version 7\n.*detach with"):
        Header.unpack(MAGIC + (8).to_bytes(4, "little") + bytes(0x1000))


@pytest.mark.parametrize("lent", [0, 9, 10])
def test_it_says_whose_the_memory_is(lent: int) -> None:
    identity = Identity(bytes(20), VirtAddr(1), VirtAddr(2), PhysAddr(3), 4)
    header = Header(2 * MIB, VirtAddr(0x1000_0000), PHYS, identity, bytes(16), VirtAddr(0x1000_0000), lent=lent)
    assert Header.unpack(header.pack().ljust(0x1000, b"\0")) == header


@pytest.mark.parametrize("size", [2 * MIB, 4 * MIB, 16 * MIB, 64 * MIB])
def test_the_parts_of_a_region_do_not_overlap_and_never_share_a_page(size: int) -> None:
    layout = Layout(size)
    records_end = RECORD_OFFSET + layout.record_count * RECORD_SIZE
    assert 0x1000 <= RECORD_OFFSET < records_end <= layout.data_end < layout.code_end < size
    assert layout.data_end % 0x1000 == layout.code_end % 0x1000 == 0
    # A table of PTEs for each 2 MiB; and above them one a level, should the guest have none there.
    assert size - layout.code_end >= (size // (2 * MIB) + 3) * 0x1000


@pytest.fixture
def store() -> HeaderStore:
    identity = Identity(bytes(20), VirtAddr(0), VirtAddr(0), PhysAddr(0), 0)
    made = HeaderStore(Ram(), Header(2 * MIB, VirtAddr(0x1000_0000), PHYS, identity, bytes(16), VirtAddr(0x1000_0000)))
    made.create()
    return made


HIGH = VirtAddr(VIRT + Layout(2 * MIB).data_end + 64 * 64)
"""Where the code ends that was ever given out."""


def record_at(addr: int) -> Record:
    slot = Slot(VirtAddr(VIRT + Layout(2 * MIB).data_end + addr % 64 * 64), 64)
    return Record(CodePatch(VirtAddr(addr), b"\x55", b"\xcc"), slot, Rung.BOOSTED)


def told(store: HeaderStore) -> list[int]:
    """What memory alone says is patched."""
    header = read_header(store.memory, PHYS)
    assert header is not None
    return sorted(record.patch.addr for record in iter_records(store.memory, header))


@given(st.lists(st.integers(0, 9), max_size=60))
def test_memory_tells_what_is_patched_after_every_change(toggled: list[int]) -> None:
    identity = Identity(bytes(20), VirtAddr(0), VirtAddr(0), PhysAddr(0), 0)
    store = HeaderStore(Ram(), Header(2 * MIB, VIRT, PHYS, identity, bytes(16), VIRT))
    store.create()
    patched: set[int] = set()
    for addr in toggled:
        if addr in patched:
            store.remove(VirtAddr(addr))
        else:
            store.add(record_at(addr), HIGH)
        patched ^= {addr}
        assert told(store) == sorted(patched)
        assert store.header.records <= 10


def test_what_lies_behind_the_records_was_never_written(store: HeaderStore) -> None:
    store.add(record_at(1), HIGH)
    assert store.memory.read_physical(PhysAddr(PHYS + RECORD_OFFSET + RECORD_SIZE), 64) == b"\x5a" * 64
    assert read_header(store.memory, PHYS) == replace(store.header, records=1, code_high_water=HIGH)


def test_an_erased_header_is_gone(store: HeaderStore) -> None:
    store.erase()
    assert read_header(store.memory, PHYS) is None


def test_all_records_in_use_is_an_error_and_a_removed_one_is_used_again(store: HeaderStore) -> None:
    count = store.header.layout.record_count
    for addr in range(count):
        store.add(record_at(addr), HIGH)
    with pytest.raises(RegionError, match=f"all {count} records"):
        store.add(record_at(count), HIGH)
    store.remove(VirtAddr(7))
    store.add(record_at(count), HIGH)
    assert told(store) == [addr for addr in range(count + 1) if addr != 7]


def test_records_stay_inside_their_part(store: HeaderStore) -> None:
    memory: Any = store.memory
    for addr in range(store.header.layout.record_count):
        store.add(record_at(addr), HIGH)
    assert bytes(memory.data[store.header.layout.data_end :]).count(b"\x5a") == len(memory.data) - (
        store.header.layout.data_end
    )


class TestDamage:
    """The guest has written over it, or forged it."""

    @pytest.mark.parametrize("bit", range(0, 8 * 180, 37))
    def test_a_bit_of_the_header_that_is_another_one_is_noticed(self, store: HeaderStore, bit: int) -> None:
        store.add(record_at(1), HIGH)
        data = store.header.pack()
        flipped = (int.from_bytes(data, "little") ^ 1 << bit % (8 * len(data))).to_bytes(len(data), "little")
        store.memory.write_physical(PHYS, flipped)
        if 8 * 8 <= bit % (8 * len(data)) < 8 * 12:
            with pytest.raises(RegionError, match="a header of version"):
                read_header(store.memory, PHYS)
            return
        found = read_header(store.memory, PHYS)
        assert found is None or found.damage == "its checksum is wrong"

    @pytest.mark.parametrize(
        ("change", "damage"),
        [
            ({"size": 0}, "its size is 0x0"),
            ({"size": 1 << 62}, "its size is 0x4000000000000000"),
            ({"virt": VirtAddr((1 << 64) - 0x1000)}, "it is at 0xfffffffffffff000"),
            ({"virt": VirtAddr((1 << 64) - 2 * MIB)}, "it is at 0xffffffffffe00000"),
            ({"phys": PhysAddr(1)}, "it is at 0x10000000 .physical 0x1."),
            ({"phys": PhysAddr(1 << 60)}, "it is at physical 0x1000000000000000"),
            ({"phys": PhysAddr(PHYS + 0x1000)}, "it says that it is at physical 0x401000"),
            ({"records": (1 << 32) - 1}, "it has 4294967295 records"),
            ({"lent": 63}, "blocks of order 63"),
            ({"code_high_water": VirtAddr(0)}, "its code ends at 0x0"),
            ({"code_high_water": VirtAddr((1 << 64) - 1)}, "its code ends at 0xffffffffffffffff"),
            ({"gate": VirtAddr(0x5000)}, "its gate is at 0x5000"),
            ({"entry_text": AddressRange(VirtAddr(0), VirtAddr((1 << 64) - 1))}, "the guest's entry text is"),
        ],
    )
    def test_what_was_never_written_is_not_believed_whatever_its_checksum(
        self, store: HeaderStore, change: dict[str, Any], damage: str
    ) -> None:
        store.memory.write_physical(PHYS, replace(store.header, **change).pack())
        found = read_header(store.memory, PHYS)
        assert found is not None
        assert re.match(damage, found.damage) or damage in found.damage, found.damage

    def test_an_entry_text_that_ends_before_it_begins(self, store: HeaderStore) -> None:
        """No range can be made of it: it is damage, and no broken invariant."""
        data = bytearray(store.header.pack())
        data[-28:-12] = (8).to_bytes(8, "little") + (1).to_bytes(8, "little")
        found = Header.unpack(bytes(data))
        assert found is not None
        assert found.damage

    @pytest.mark.parametrize("bit", range(0, 8 * RECORD_SIZE, 7))
    def test_a_bit_of_a_record_that_is_another_one_is_noticed(self, store: HeaderStore, bit: int) -> None:
        store.add(record_at(1), HIGH)
        store.add(record_at(2), HIGH)
        at = store.header.record_address(0)
        data = int.from_bytes(store.memory.read_physical(at, RECORD_SIZE), "little")
        store.memory.write_physical(at, (data ^ 1 << bit).to_bytes(RECORD_SIZE, "little"))
        records, wrong = read_records(store.memory, store.header)
        assert [record.patch.addr for record in records] == [2]
        assert wrong == ("record 0 of the region is damaged: its checksum is wrong",)

    SLOT = record_at(1).slot
    JUMP = b"\xe9" + (SLOT.code - (0x1000 + 5)).to_bytes(4, "little")
    CALL = b"\xe8" + JUMP[1:]

    @pytest.mark.parametrize(
        ("addr", "new", "rung", "kind", "slot"),
        [
            (0x1000, b"\x90", Rung.BOOSTED, RecordKind.SITE, SLOT),  # the text there may hold that by itself
            (0x1000, b"\xcc\x90", Rung.BOOSTED, RecordKind.SITE, SLOT),
            (0x1000, JUMP, Rung.BOOSTED, RecordKind.SITE, SLOT),
            (0x1008, JUMP, Rung.OPTIMIZED, RecordKind.SITE, SLOT),  # leads to elsewhere
            (0x1000, JUMP + b"\x90", Rung.OPTIMIZED, RecordKind.SITE, SLOT),
            (0x1000, JUMP, Rung.BOOSTED, RecordKind.HOOK, SLOT),
            (0x9000, b"\xe8" + bytes(4), Rung.BOOSTED, RecordKind.HOOK, SLOT),
            (VIRT + 8, b"\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),  # the region itself
            ((1 << 64) - 1, b"\xcc\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),
            ((1 << 64) - 1, b"\xcc", Rung.BOOSTED, RecordKind.SITE, SLOT),  # its end is no address
            (0x1000, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(VirtAddr(0x1000), 64)),
            (0x1000, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(SLOT.start, 1 << 63)),
            (0x1000, b"\xcc", Rung.BOOSTED, RecordKind.SITE, Slot(VirtAddr(HIGH - 32), 64)),
        ],
    )
    def test_a_forged_record_chooses_neither_what_is_written_nor_where(
        self, store: HeaderStore, addr: int, new: bytes, rung: Rung, kind: RecordKind, slot: Slot
    ) -> None:
        """Restoring writes a record's old bytes where its new ones are: so these must be a patch of ours."""
        store.add(Record(CodePatch(VirtAddr(addr), bytes(len(new)), new), slot, rung, kind), HIGH)
        records, [wrong] = read_records(store.memory, store.header)
        assert records == ()
        assert wrong.startswith("record 0 of the region is damaged: ")

    @pytest.mark.parametrize(
        ("new", "rung", "kind"),
        [
            (b"\xcc", Rung.SINGLE_STEP, RecordKind.SITE),
            (b"\xcc" * 5, Rung.BOOSTED, RecordKind.SITE),
            (JUMP + b"\xcc\xcc", Rung.OPTIMIZED, RecordKind.SITE),
            (over(VirtAddr(0x1000), bytes(19), JUMP).new, Rung.OPTIMIZED, RecordKind.SITE),
            (CALL, Rung.BOOSTED, RecordKind.HOOK),
        ],
    )
    def test_what_we_put_over_text_is_a_record(
        self, store: HeaderStore, new: bytes, rung: Rung, kind: RecordKind
    ) -> None:
        record = Record(CodePatch(VirtAddr(0x1000), bytes(len(new)), new), self.SLOT, rung, kind)
        store.add(record, HIGH)
        assert read_records(store.memory, store.header) == ((record,), ())

    def test_of_two_records_of_one_place_the_first_counts(self, store: HeaderStore) -> None:
        store.add(record_at(1), HIGH)
        store.memory.write_physical(store.header.record_address(1), record_at(1).pack(store.header.cookie))
        header = replace(store.header, records=2)
        assert read_records(store.memory, header)[1] == ("record 1 of the region is damaged: 0x1 has another one",)

    def test_a_record_of_another_region_is_none(self, store: HeaderStore) -> None:
        """What the memory held before."""
        store.add(record_at(1), HIGH)
        store.memory.write_physical(store.header.record_address(0), record_at(1).pack(b"another region's"))
        assert told(store) == []
