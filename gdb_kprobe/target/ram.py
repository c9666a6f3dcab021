"""Guest RAM through the file that backs it, for reading in bulk and while the guest runs; and all ways to it as one.

Only ever for data. Text is written through the stub: a write past QEMU's back leaves old translated code running
(docs/internals/connection.md).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.model import PAGE_SIZE, PhysAddr
from gdb_kprobe.target.process_memory import ProcessMemory, find_process_memory
from gdb_kprobe.target.protocols import Machine, Monitor, PhysicalMemory

_GRAIN = 8
"""Bytes that are compared at once to find out what a batch has changed: ``Q`` of :mod:`struct`."""

_NEAR = 128
"""Two changes that are no further apart are one packet: its cost is that of some hundred bytes."""

_BULK = 1 << 20
"""Bytes of a piece of RAM that is worth being asked for."""

_CR3_ADDRESS = 0x000F_FFFF_FFFF_F000

_RAM_LINE = re.compile(r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): (\S+)(?: @([0-9a-f]+))?", re.M)


@dataclass(frozen=True, slots=True)
class RamBlock:
    """Guest physical *start* .. *end* lies at *file_offset* in the backing object *name*."""

    start: PhysAddr
    end: PhysAddr
    name: str
    file_offset: int


def ram_blocks(monitor: Monitor) -> tuple[RamBlock, ...]:
    """Return where QEMU's memory tree (``info mtree -f``, address space "memory") puts RAM."""
    text = monitor.monitor("info mtree -f").replace("\r", "")
    for view in text.split("FlatView #"):
        if re.search(r'AS "memory"', view):
            return tuple(
                RamBlock(PhysAddr(int(start, 16)), PhysAddr(int(end, 16) + 1), name, int(at or "0", 16))
                for start, end, name, at in _RAM_LINE.findall(view)
            )
    return ()


class SharedRam:
    """Guest RAM mapped from the host files that back it; reads only."""

    def __init__(self, blocks: tuple[RamBlock, ...], files: dict[str, mmap.mmap]) -> None:
        self._blocks = tuple(block for block in blocks if block.name in files)
        self._files = files

    @classmethod
    def discover(cls, monitor: Monitor) -> Self | None:
        """Ask QEMU for shared file-backed RAM; ``None`` when there is none that we can open (another host, user)."""
        blocks = ram_blocks(monitor)
        files: dict[str, mmap.mmap] = {}
        for name in {block.name for block in blocks}:
            share = monitor.monitor(f"qom-get /objects/{name} share").strip()
            path = monitor.monitor(f"qom-get /objects/{name} mem-path").strip()
            if share != "true" or not path.startswith('"'):
                continue
            with contextlib.suppress(OSError, ValueError):
                files[name] = _map(Path(json.loads(path)))
        return cls(blocks, files) if files else None

    def covers(self, addr: PhysAddr, size: int) -> bool:
        return self._block(addr, size) is not None

    @property
    def name(self) -> str:
        """For the user."""
        return f"shared memory ({', '.join(sorted(self._files))})"

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        block = self._block(addr, size)
        if block is None:
            raise TargetError(f"physical {addr:#x} (+{size}) is not in the shared memory file")
        start = block.file_offset + addr - block.start
        return self._files[block.name][start : start + size]

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        """Write data, past QEMU's back: never what is executed.

        :raises TargetError: it is not in the file, or may only be read.
        """
        block = self._block(addr, len(data))
        if block is None:
            raise TargetError(f"physical {addr:#x} (+{len(data)}) is not in the shared memory file")
        start = block.file_offset + addr - block.start
        try:
            self._files[block.name][start : start + len(data)] = data
        except TypeError as error:
            raise TargetError(f"the file of the shared memory {block.name} may only be read") from error

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _block(self, addr: PhysAddr, size: int) -> RamBlock | None:
        return next((block for block in self._blocks if block.start <= addr and addr + size <= block.end), None)


def _map(path: Path) -> mmap.mmap:
    """Map a file, for writing if that is allowed."""
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except PermissionError:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


class RamView:
    """Reads from the shared file, or from QEMU's process, where one covers the address; all else through the stub."""

    def __init__(self, stub: PhysicalMemory, shared: SharedRam | None) -> None:
        self._stub = stub
        self._shared = shared
        self._process: tuple[ProcessMemory, ...] = ()
        self._batch: _Batch | None = None
        self.not_live = "QEMU does not share its memory"
        """Why what is not live is not; for the user."""

    def use_process(self, process: ProcessMemory) -> None:
        """Read what *process* covers from it, too. When it has ended, the stub is asked again."""
        self._process += (process,)

    def use_ram_of(self, machine: Machine, pids: Collection[int]) -> None:
        """Read all the RAM of the stopped *machine* from QEMU's process, one of *pids*, where no file is shared.

        In bulk that is a hundred times faster than the stub. Where it cannot be, the stub is asked: that is no error.
        What tells the process from another guest's is the page table in use, which the stub must read alike.

        :raises ConnectionLostError: the stub does not answer any more.
        """
        root = PhysAddr(machine.read_register(machine.cpus()[0], "cr3") & _CR3_ADDRESS)
        blocks = [block for block in ram_blocks(machine) if block.end - block.start >= _BULK] if pids else []
        for block in blocks:
            size = block.end - block.start
            if self._shared is not None and self._shared.covers(block.start, size):
                continue
            try:
                process = find_process_memory(machine, pids, block.start, size)
            except TargetError:
                continue
            if process.covers(root, PAGE_SIZE) and process.read_physical(root, PAGE_SIZE) != machine.read_physical(
                root, PAGE_SIZE
            ):
                process.close()
            else:
                self.use_process(process)

    def live(self, addr: PhysAddr, size: int) -> SharedRam | ProcessMemory | None:
        """Where these bytes can be read from while the machine runs; ``None``: only through the stub, when stopped."""
        ways = (self._shared, *self._process)
        return next((way for way in ways if way is not None and way.covers(addr, size)), None)

    def is_live(self, addr: PhysAddr, size: int) -> bool:
        """Whether these bytes can be read and written while the machine runs."""
        return self.live(addr, size) is not None

    def write_live(self, addr: PhysAddr, data: bytes) -> None:
        """Write data while the machine runs: never what is executed.

        :raises GuestStateError: its memory cannot be reached then.
        :raises TargetError: the write was not possible.
        """
        way = self.live(addr, len(data))
        if way is None:
            raise GuestStateError(
                f"the guest is running, and {self.not_live}", "stop it first (Ctrl-C, or 'interrupt')"
            )
        way.write_physical(addr, data)

    def close(self) -> None:
        """Give the process's memory back; then the stub is asked."""
        for process in self._process:
            process.close()
        self._process = ()

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self._read(addr, size) if self._batch is None else self._batch.read(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        if self._batch is None:
            self._stub.write_physical(addr, data)
        else:
            self._batch.write(addr, data)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Keep writes back until the end; reads see them. Also when an error ends it: what undoes is a write too."""
        if self._batch is not None:
            yield
            return
        self._batch = _Batch(self._read)
        try:
            yield
        finally:
            batch, self._batch = self._batch, None
            self._flush(batch)

    def _read(self, addr: PhysAddr, size: int) -> bytes:
        way = self.live(addr, size)
        if way is None:
            return self._stub.read_physical(addr, size)
        try:
            return way.read_physical(addr, size)
        except TargetError as error:
            if way not in self._process:
                raise
            self.not_live = error.message
            self.close()
            return self._stub.read_physical(addr, size)

    def _flush(self, batch: _Batch) -> None:
        changes = tuple(batch.changes())
        with self._stub.batch():
            for addr, data in changes:
                self._stub.write_physical(addr, data)
        for _, group in itertools.groupby(changes, lambda change: change[0] & -PAGE_SIZE):
            within = tuple(group)
            start, (last, end) = within[0][0], within[-1]
            found = self._read(start, last + len(end) - start)
            for addr, data in within:
                if found[addr - start : addr - start + len(data)] != data:
                    raise TargetError(f"{len(data)} bytes were written to physical {addr:#x}, and are not there")


class _Batch:
    """Writes that were not made yet, as pages that hold them."""

    def __init__(self, read: Callable[[PhysAddr, int], bytes]) -> None:
        self._read = read
        self._before: dict[int, bytes] = {}
        self._after: dict[int, bytearray] = {}

    def read(self, addr: PhysAddr, size: int) -> bytes:
        if not any(page in self._after for page in _pages(addr, size)):
            return self._read(addr, size)
        return b"".join(
            bytes(self._after[page][start:end])
            if page in self._after
            else self._read(PhysAddr(page + start), end - start)
            for page, start, end in _pieces(addr, size)
        )

    def write(self, addr: PhysAddr, data: bytes) -> None:
        done = 0
        for page, start, end in _pieces(addr, len(data)):
            if page not in self._after:
                self._before[page] = self._read(PhysAddr(page), PAGE_SIZE)
                self._after[page] = bytearray(self._before[page])
            self._after[page][start:end] = data[done : done + end - start]
            done += end - start

    def changes(self) -> Iterator[tuple[PhysAddr, bytes]]:
        """What is to be written, in ascending order; between two changes that are near each other, what is there."""
        for page in sorted(self._after):
            before, after = self._before[page], self._after[page]
            if before == after:
                continue
            words = zip(memoryview(before).cast("Q"), memoryview(after).cast("Q"), strict=True)
            places = [number * _GRAIN for number, (old, new) in enumerate(words) if old != new]
            start = end = places[0]
            for at in places:
                if at - end > _NEAR:
                    yield PhysAddr(page + start), bytes(after[start:end])
                    start = at
                end = at + _GRAIN
            yield PhysAddr(page + start), bytes(after[start:end])


def _pages(addr: int, size: int) -> range:
    return range(addr & -PAGE_SIZE, addr + size, PAGE_SIZE)


def _pieces(addr: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(page, first byte in it, end in it) of each page that the bytes are in."""
    for page in _pages(addr, size):
        yield page, max(addr - page, 0), min(addr + size - page, PAGE_SIZE)
