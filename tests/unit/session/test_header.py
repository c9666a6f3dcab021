"""The region's description of itself: the same after a round trip through guest memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import RegionError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import PhysAddr, Rung, VirtAddr
from gdb_kprobe.session.header import (
    MAGIC,
    RECORD_OFFSET,
    RECORD_SIZE,
    Header,
    HeaderStore,
    Identity,
    Layout,
    Record,
    iter_records,
    read_header,
)

MIB = 1 << 20
PHYS = PhysAddr(0x40_0000)
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
    assert len(record.pack()) == RECORD_SIZE
    assert Record.unpack(record.pack()) == record


@given(headers, st.integers(0, 7), st.integers(1, 255))
def test_a_wrong_magic_is_no_header(header: Header, at: int, change: int) -> None:
    data = bytearray(header.pack())
    data[at] ^= change
    assert Header.unpack(bytes(data)) is None


def test_memory_of_zeros_is_no_header_and_no_record() -> None:
    assert Header.unpack(bytes(0x1000)) is None
    assert Record.unpack(bytes(RECORD_SIZE)) is None


def test_another_version_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RegionError, match=r"version 7; this gdb_kprobe knows version 6\n.*detach with"):
        Header.unpack(MAGIC + (7).to_bytes(4, "little") + bytes(0x1000))


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


def record_at(addr: int) -> Record:
    return Record(CodePatch(VirtAddr(addr), b"\x55", b"\xcc"), Slot(VirtAddr(addr * 64), 64), Rung.BOOSTED)


def told(store: HeaderStore) -> list[int]:
    """What memory alone says is patched."""
    header = read_header(store.memory, PHYS)
    assert header is not None
    return sorted(record.patch.addr for record in iter_records(store.memory, header))


@given(st.lists(st.integers(0, 9), max_size=60))
def test_memory_tells_what_is_patched_after_every_change(toggled: list[int]) -> None:
    identity = Identity(bytes(20), VirtAddr(0), VirtAddr(0), PhysAddr(0), 0)
    store = HeaderStore(Ram(), Header(2 * MIB, VirtAddr(0), PHYS, identity, bytes(16), VirtAddr(0)))
    store.create()
    patched: set[int] = set()
    for addr in toggled:
        if addr in patched:
            store.remove(VirtAddr(addr))
        else:
            store.add(record_at(addr), VirtAddr(0))
        patched ^= {addr}
        assert told(store) == sorted(patched)
        assert store.header.records <= 10


def test_what_lies_behind_the_records_was_never_written(store: HeaderStore) -> None:
    store.add(record_at(1), VirtAddr(5))
    assert store.memory.read_physical(PhysAddr(PHYS + RECORD_OFFSET + RECORD_SIZE), 64) == b"\x5a" * 64
    assert read_header(store.memory, PHYS) == replace(store.header, records=1, code_high_water=VirtAddr(5))


def test_an_erased_header_is_gone(store: HeaderStore) -> None:
    store.erase()
    assert read_header(store.memory, PHYS) is None


def test_all_records_in_use_is_an_error_and_a_removed_one_is_used_again(store: HeaderStore) -> None:
    count = store.header.layout.record_count
    for addr in range(count):
        store.add(record_at(addr), VirtAddr(0))
    with pytest.raises(RegionError, match=f"all {count} records"):
        store.add(record_at(count), VirtAddr(0))
    store.remove(VirtAddr(7))
    store.add(record_at(count), VirtAddr(0))
    assert told(store) == [addr for addr in range(count + 1) if addr != 7]


def test_records_stay_inside_their_part(store: HeaderStore) -> None:
    memory: Any = store.memory
    for addr in range(store.header.layout.record_count):
        store.add(record_at(addr), VirtAddr(0))
    assert bytes(memory.data[store.header.layout.data_end :]).count(b"\x5a") == len(memory.data) - (
        store.header.layout.data_end
    )
