"""The header: the same after a round trip through guest memory; what cannot be one of ours is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.region.header import MAGIC, Header, HeaderStore, Identity, read_header
from gdb_kprobe.region.layout import FIRST_PAGE, MARK_OFFSET, TABLE_CELL, Layout
from tests.unit.region.conftest import MIB, PHYS, VIRT, Ram

addresses = st.integers(0, (1 << 64) - 1)
_SIZES = (2 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    size = draw(st.sampled_from(_SIZES))
    pages = Layout(size).pages
    data_end = draw(st.integers(FIRST_PAGE, pages))
    first = draw(addresses)
    return Header(
        size,
        VirtAddr(draw(addresses)),
        PhysAddr(draw(addresses)),
        Identity(
            draw(st.binary(min_size=20, max_size=20)),
            VirtAddr(draw(addresses)),
            VirtAddr(draw(addresses)),
            PhysAddr(draw(addresses)),
            draw(addresses),
        ),
        draw(st.binary(min_size=16, max_size=16)),
        draw(st.integers(1, (1 << 32) - 1)),
        data_end,
        draw(st.integers(data_end, pages)),
        draw(st.sampled_from((0, 9, 10))),
        AddressRange(VirtAddr(first), VirtAddr(draw(st.integers(first, (1 << 64) - 1)))),
        VirtAddr(draw(addresses)),
    )


@given(headers())
def test_a_header_survives_the_round_trip(header: Header) -> None:
    assert Header.unpack(header.pack().ljust(0x1000, b"\0")) == header
    assert len(header.pack()) <= TABLE_CELL < MARK_OFFSET


@given(headers(), st.integers(0, 7), st.integers(1, 255))
def test_a_wrong_magic_is_no_header(header: Header, at: int, change: int) -> None:
    data = bytearray(header.pack())
    data[at] ^= change
    assert Header.unpack(bytes(data)) is None


def test_memory_of_zeros_is_no_header() -> None:
    assert Header.unpack(bytes(0x1000)) is None


def test_another_version_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RegionError, match=r"version 7; this gdb_kprobe knows version 8\n.*detach with"):
        Header.unpack(MAGIC + (7).to_bytes(4, "little") + bytes(0x1000))


def store() -> HeaderStore:
    identity = Identity(bytes(20), VirtAddr(1), VirtAddr(2), PhysAddr(3), 4)
    made = HeaderStore(Ram(2 * MIB), Header(2 * MIB, VIRT, PHYS, identity, bytes(16), code_start=500))
    made.create()
    return made


@pytest.mark.parametrize("bit", range(0, 8 * 180, 37))
def test_a_bit_that_is_another_one_is_noticed(bit: int) -> None:
    made = store()
    data = made.header.pack()
    bit %= 8 * len(data)
    flipped = (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")
    made.memory.write_physical(PHYS, flipped)
    if 8 * 8 <= bit < 8 * 12:
        with pytest.raises(RegionError, match="a header of version"):
            read_header(made.memory, PHYS)
        return
    found = read_header(made.memory, PHYS)
    assert found is None or found.damage == "its checksum is wrong"


@pytest.mark.parametrize(
    ("change", "damage"),
    [
        ({"size": 0}, "its size is 0x0"),
        ({"size": 1 << 62}, "its size is 0x4000000000000000"),
        ({"virt": VirtAddr((1 << 64) - 0x1000)}, "it is at 0xfffffffffffff000"),
        ({"virt": VirtAddr((1 << 64) - 2 * MIB)}, "it is at 0xffffffffffe00000"),
        ({"phys": PhysAddr(1)}, "(physical 0x1)"),
        ({"phys": PhysAddr(1 << 60)}, "it is at physical 0x1000000000000000"),
        ({"phys": PhysAddr(PHYS + 0x1000)}, "it says that it is at physical 0x401000"),
        ({"data_end": 1}, "its data end at page 1, "),
        ({"data_end": 501}, "its data end at page 501, its code begins at page 500"),
        ({"code_start": (1 << 32) - 1}, "its code begins at page 4294967295"),
        ({"lent": 63}, "blocks of order 63"),
        ({"gate": VirtAddr(0x5000)}, "its gate is at 0x5000"),
        ({"entry_text": AddressRange(VirtAddr(0), VirtAddr((1 << 64) - 1))}, "the guest's entry text is"),
    ],
)
def test_what_was_never_written_is_not_believed_whatever_its_checksum(change: dict[str, Any], damage: str) -> None:
    made = store()
    made.memory.write_physical(PHYS, replace(made.header, **change).pack())
    found = read_header(made.memory, PHYS)
    assert found is not None
    assert damage in found.damage


def test_an_entry_text_that_ends_before_it_begins_is_damage() -> None:
    """No range can be made of it: it is no broken invariant."""
    data = bytearray(store().header.pack())
    data[-28:-12] = (8).to_bytes(8, "little") + (1).to_bytes(8, "little")
    found = Header.unpack(bytes(data))
    assert found is not None
    assert found.damage


@pytest.mark.parametrize("size", _SIZES)
def test_the_page_tables_have_room_and_share_no_page(size: int) -> None:
    layout = Layout(size)
    assert layout.pages * 0x1000 == layout.end < size
    # A table of PTEs for each 2 MiB; and above them one a level, should the guest have none there.
    assert size - layout.end >= (size // (2 * MIB) + 3) * 0x1000


def test_a_change_is_written_and_an_erased_header_is_gone() -> None:
    made = store()
    gate = made.header.code.start
    made.change(gate=gate)
    found = read_header(made.memory, PHYS)
    assert found == made.header
    assert found is not None
    assert (found.gate, found.damage) == (gate, "")
    made.erase()
    assert read_header(made.memory, PHYS) is None
