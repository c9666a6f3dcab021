"""A machine of dictionaries: RAM, page tables written by hand, and a walker that shares no code with the real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdb_kprobe.errors import TargetError, UnmappedError
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr

P, W, U, A, D, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63


class FakeRam:
    """RAM of *size* bytes, all zeros; notes each read."""

    def __init__(self, size: int = 64 << 20) -> None:
        self.size = size
        self.pages: dict[int, bytearray] = {}
        self.reads: list[tuple[int, int]] = []

    def _page(self, addr: int) -> bytearray:
        return self.pages.setdefault(addr >> 12, bytearray(0x1000))

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if addr + size > self.size:
            raise TargetError(f"no RAM at {addr:#x}")
        self.reads.append((addr, size))
        return bytes(self._page(at)[at & 0xFFF] for at in range(addr, addr + size))

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        if addr + len(data) > self.size:
            raise TargetError(f"no RAM at {addr:#x}")
        for at, value in enumerate(data, addr):
            self._page(at)[at & 0xFFF] = value

    def quad(self, addr: int) -> int:
        return int.from_bytes(self._page(addr)[addr & 0xFFF : (addr & 0xFFF) + 8], "little")

    def set_quad(self, addr: int, value: int) -> None:
        self.write_physical(PhysAddr(addr), value.to_bytes(8, "little"))


class Tables:
    """Page tables in a :class:`FakeRam`, made entry by entry."""

    def __init__(self, ram: FakeRam, levels: int = 4, root: int = 0x10_0000, pool: int = 0x20_0000) -> None:
        self.ram, self.levels, self.root, self.pool = ram, levels, root, pool

    def map(self, virt: int, phys: int, flags: int = P | W, *, level: int = 1, upper: int = P | W | U) -> None:
        """Map one page of *level* (1: 4 KiB, 2: 2 MiB, 3: 1 GiB); new tables above it get the flags *upper*."""
        table = self.root
        for at in range(self.levels, level, -1):
            entry = table + 8 * (virt >> (12 + 9 * (at - 1)) & 511)
            if not self.ram.quad(entry):
                self.ram.set_quad(entry, self.pool | upper)
                self.pool += 0x1000
            table = self.ram.quad(entry) & 0xF_FFFF_FFFF_F000
        self.ram.set_quad(
            table + 8 * (virt >> (12 + 9 * (level - 1)) & 511), phys | flags | (LARGE if level > 1 else 0)
        )

    def oracle(self, virt: int) -> tuple[int, str] | None:
        """Walk as the processor does (recursively, unlike the real one): physical address and rights as letters."""

        def step(table: int, bits: int, rights: set[str]) -> tuple[int, str] | None:
            value = self.ram.quad(table + (virt >> bits) % 512 * 8)
            if value % 2 == 0:
                return None
            rights = rights - ({"w"} if not value & W else set()) - ({"u"} if not value & U else set())
            rights = rights - ({"x"} if value >> 63 else set())
            if bits == 12 or (bits in (21, 30) and value & LARGE):
                frame = value % (1 << 52) >> bits << bits
                return frame + virt % (1 << bits), "".join(sorted(rights))
            return step(value % (1 << 52) >> 12 << 12, bits - 9, rights)

        return step(self.root, 12 + 9 * (self.levels - 1), {"w", "u", "x"})


class FlatMemory:
    """Virtual memory of blocks, for the readers above paging."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, bytearray]] = []

    def add(self, addr: int, data: bytes) -> AddressRange:
        self.blocks.append((addr, bytearray(data)))
        return AddressRange(VirtAddr(addr), VirtAddr(addr + len(data)))

    def read(self, addr: VirtAddr, size: int) -> bytes:
        for start, data in self.blocks:
            if start <= addr and addr + size <= start + len(data):
                return bytes(data[addr - start : addr - start + size])
        raise UnmappedError(addr)

    def write(self, addr: VirtAddr, data: bytes) -> None:
        for start, block in self.blocks:
            if start <= addr and addr + len(data) <= start + len(block):
                block[addr - start : addr - start + len(data)] = data
                return
        raise UnmappedError(addr)


@pytest.fixture
def ram() -> FakeRam:
    return FakeRam()


@pytest.fixture
def make_tables(ram: FakeRam) -> Callable[..., Tables]:
    return lambda **options: Tables(ram, **options)


@pytest.fixture
def memory() -> FlatMemory:
    return FlatMemory()
