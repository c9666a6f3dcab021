"""A region in memory that needs no mapping, and held something else before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import pytest

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PhysAddr, VirtAddr
from gdb_kprobe.region.header import Header, Identity
from gdb_kprobe.region.layout import FIRST_PAGE, Layout
from gdb_kprobe.region.pages import Pages
from gdb_kprobe.region.records import Record
from gdb_kprobe.region.region import Region
from gdb_kprobe.system.paging import PageTable

MIB = 1 << 20
PHYS = PhysAddr(0x40_0000)
VIRT = VirtAddr(0xFFFF_FFFF_C000_0000)


@dataclass
class Ram:
    """*size* bytes from PHYS on. *log* has the offsets of what was written."""

    size: int
    data: bytearray = field(init=False)
    log: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = bytearray(b"\x5a" * self.size)

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if not PHYS <= addr <= PHYS + len(self.data) - size:
            raise TargetError("no RAM")
        return bytes(self.data[addr - PHYS : addr - PHYS + size])

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        assert PHYS <= addr <= PHYS + len(self.data) - len(data)
        self.log.append(addr - PHYS)
        self.data[addr - PHYS : addr - PHYS + len(data)] = data

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _NoTable:
    def invalidate(self) -> None:
        pass


def plain_region(size: int = 2 * MIB) -> tuple[Region, Ram]:
    """An empty region that nothing must be mapped for, and its memory."""
    ram = Ram(size)
    identity = Identity(bytes(20), VirtAddr(1), VirtAddr(2), PhysAddr(0), 0)
    pages = Pages(FIRST_PAGE, Layout(size).pages)
    header = Header(size, VIRT, PHYS, identity, bytes(16), code_start=pages.code_start)
    region = Region(ram, ram, cast(PageTable, _NoTable()), header, (), pages)
    region.create()
    return region, ram


def again(ram: Ram, saved: Iterable[Record] = ()) -> Region:
    """The region of another session, from what memory alone says; the records *saved* stay."""
    header = Header.unpack(bytes(ram.data[:0x1000]))
    assert header is not None
    pages = Pages(FIRST_PAGE, header.layout.pages, header.data_end, header.code_start)
    region = Region(ram, ram, cast(PageTable, _NoTable()), header, (), pages)
    region.go_on(saved)
    return region


@pytest.fixture
def made() -> tuple[Region, Ram]:
    return plain_region()
