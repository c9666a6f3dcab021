"""What readers read of a real guest, kept by the page, and read again by others with changes in it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from gdb_kprobe.errors import TargetError, UnmappedError
from gdb_kprobe.model import PAGE_SIZE, CpuId, PhysAddr, VirtAddr
from gdb_kprobe.system.paging import PageTable, loaded_table
from gdb_kprobe.target.protocols import PhysicalMemory
from gdb_kprobe.target.quirks import Accelerator, Quirks

Pages = dict[int, bytes]
"""Contents by physical address."""

_MOST_READ = 1 << 30


class TooMuchReadError(BaseException):
    """A reader has read more than any needs: no part of what readers may catch."""


@dataclass(frozen=True, slots=True)
class Read:
    """One read: *phys* is where it began, *virt* by which address, if it was by one."""

    phys: int
    size: int
    virt: int | None = None


class Recorder:
    """A :class:`~gdb_kprobe.target.protocols.PhysicalMemory` that keeps what is read of another."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self.pages: Pages = {}

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        first, last = addr // PAGE_SIZE, (addr + max(size, 1) - 1) // PAGE_SIZE
        missing = [page * PAGE_SIZE for page in range(first, last + 1) if page * PAGE_SIZE not in self.pages]
        for at, end in _runs(missing):
            data = self._memory.read_physical(PhysAddr(at), end - at)
            self.pages.update((at + done, data[done : done + PAGE_SIZE]) for done in range(0, end - at, PAGE_SIZE))
        return self._memory.read_physical(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        raise AssertionError("a reader writes")

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for page in pages:
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + PAGE_SIZE
    if end >= 0:
        yield start, end


@dataclass(frozen=True, slots=True)
class Write:
    """One write: what was there, and what is."""

    phys: int
    old: bytes
    new: bytes


class Replay:
    """A :class:`~gdb_kprobe.target.protocols.PhysicalMemory` of recorded pages, with *changes* in them.

    What was not recorded is no RAM. Reads are noted in :attr:`reads` where that is a list, writes always.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.changed: Pages = {}
        self.reads: list[Read] | None = None
        self.writes: list[Write] = []
        self.virt: int | None = None
        self._total = 0

    def start(self) -> None:
        """Undo all changes and writes."""
        self.changed.clear()
        self.writes.clear()
        self._total = 0

    def _page(self, at: int) -> bytes:
        page = self.changed.get(at) or self._pages.get(at)
        if page is None:
            raise TargetError(f"there is no RAM at physical {at:#x}")
        return page

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if self.reads is not None and size:
            self.reads.append(Read(addr, size, self.virt))
        self._total += size
        if self._total > _MOST_READ:
            raise TooMuchReadError(f"{self._total} bytes")
        start = addr & -PAGE_SIZE
        if addr + size <= start + PAGE_SIZE:
            return self._page(start)[addr - start : addr - start + size]
        data = b"".join([self._page(at) for at in range(start, addr + size, PAGE_SIZE)])
        return data[addr - start : addr - start + size]

    def change(self, addr: int, data: bytes) -> None:
        """Have the guest hold *data* at *addr*; nothing happens where nothing was recorded."""
        with contextlib.suppress(TargetError):
            for at in range(addr & -PAGE_SIZE, addr + len(data), PAGE_SIZE):
                page = bytearray(self._page(at))
                first, last = max(addr, at), min(addr + len(data), at + PAGE_SIZE)
                page[first - at : last - at] = data[first - addr : last - addr]
                self.changed[at] = bytes(page)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        old = self.read_physical(addr, len(data))
        self.writes.append(Write(addr, old, bytes(data)))
        self.change(addr, data)

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Table(PageTable):
    """Page tables in a :class:`Replay`, which is told of the virtual address of each read."""

    def read(self, addr: VirtAddr, size: int) -> bytes:
        assert isinstance(self.memory, Replay)
        if self.memory.reads is None or not size:
            return super().read(addr, size)
        self.translate(addr)  # the tables themselves are read at no virtual address
        self.memory.virt = addr
        try:
            return super().read(addr, size)
        finally:
            self.memory.virt = None


@dataclass
class Machine:
    """A stopped :class:`~gdb_kprobe.target.protocols.Machine`, as it was recorded, over *memory*.

    A step leaves a vCPU where it is.
    """

    memory: Replay
    registers: Mapping[CpuId, Mapping[str, int]]
    system: str
    """The answer to ``info registers -a``."""
    shown: CpuId | None = None
    _values: dict[CpuId, dict[str, int]] = field(default_factory=dict)

    def start(self) -> None:
        """All vCPUs are where they were."""
        self._values = {cpu: dict(values) for cpu, values in self.registers.items()}

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self.memory.read_physical(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self.memory.write_physical(addr, data)

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def cpus(self) -> tuple[CpuId, ...]:
        return tuple(self._values)

    def read_registers(self, cpu: CpuId) -> dict[str, int]:
        return dict(self._values[cpu])

    def read_register(self, cpu: CpuId, name: str) -> int:
        return self._values[cpu][name]

    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None:
        for name, value in values.items():
            value.to_bytes(8, "little")  # a register has no more
            self._values[cpu][name] = value

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        table = loaded_table(self.memory, self._values[cpu]["cr3"], self._values[cpu]["cr4"])
        try:
            return table.read(addr, size)
        except (UnmappedError, TargetError):
            return None

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        table = loaded_table(self.memory, self._values[cpu]["cr3"], self._values[cpu]["cr4"])
        try:
            table.write(addr, data)
        except (UnmappedError, TargetError):
            return False
        return True

    def step(self, cpu: CpuId) -> None:
        pass

    def watch_faults(self, entries: Mapping[VirtAddr, int]) -> None:
        pass

    def drop_trap_flag(self, cpu: CpuId) -> None:
        pass

    def flushed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run_briefly(self) -> None:
        pass

    @property
    def quirks(self) -> Quirks:
        return Quirks(Accelerator.TCG)

    def check_can_run(self) -> None:
        pass

    def run_to(self, addrs: Collection[VirtAddr], seconds: float, *, heed: bool = True) -> CpuId | None:
        return None

    def drop_breakpoints(self) -> None:
        pass

    def monitor(self, command: str) -> str:
        return self.system if command == "info registers -a" else ""
