"""Writes that are kept back: what is read meanwhile, what is written at the end, and in how many pieces."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.target.ram import RamView

SIZE = 4 * 4096


class Stub:
    """Memory that notes each write; with *deaf*, one that does not take them."""

    def __init__(self) -> None:
        self.data = bytearray(range(256)) * (SIZE // 256)
        self.writes: list[tuple[int, int]] = []
        self.deaf = False

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return bytes(self.data[addr : addr + size])

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self.writes.append((addr, len(data)))
        if not self.deaf:
            self.data[addr : addr + len(data)] = data

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_reads_see_what_was_written_and_the_guest_does_at_the_end() -> None:
    stub = Stub()
    view = RamView(stub, None)
    with view.batch():
        view.write_physical(PhysAddr(0x10), b"one")
        with view.batch():
            view.write_physical(PhysAddr(0x20), b"two")
        assert view.read_physical(PhysAddr(0x10), 3) == b"one"
        assert stub.writes == []
    assert stub.read_physical(PhysAddr(0x10), 3) == b"one"
    assert stub.read_physical(PhysAddr(0x20), 3) == b"two"
    assert len(stub.writes) == 1, "they are near each other"


def test_what_is_written_and_undone_is_no_write() -> None:
    stub = Stub()
    view = RamView(stub, None)
    before = bytes(stub.data)
    with contextlib.suppress(KeyError), view.batch():
        view.write_physical(PhysAddr(0x1000), b"\xcc")
        view.write_physical(PhysAddr(0x1000), before[0x1000:0x1001])
        raise KeyError
    assert (stub.writes, bytes(stub.data)) == ([], before)


def test_a_write_that_does_not_take_is_an_error() -> None:
    stub = Stub()
    stub.deaf = True
    view = RamView(stub, None)
    with pytest.raises(TargetError, match="are not there"), view.batch():
        view.write_physical(PhysAddr(0x1000), b"\xff")


@given(st.lists(st.tuples(st.integers(0, SIZE - 300), st.binary(min_size=1, max_size=300)), max_size=40))
def test_it_comes_to_the_same_as_writing_at_once(writes: list[tuple[int, bytes]]) -> None:
    at_once, stub = Stub(), Stub()
    view = RamView(stub, None)
    with view.batch():
        for addr, data in writes:
            at_once.write_physical(PhysAddr(addr), data)
            view.write_physical(PhysAddr(addr), data)
            assert view.read_physical(PhysAddr(max(addr - 9, 0)), 400) == at_once.read_physical(
                PhysAddr(max(addr - 9, 0)), 400
            )
    assert stub.data == at_once.data
    assert sum(size for _, size in stub.writes) <= SIZE
