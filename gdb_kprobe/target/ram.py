"""Guest RAM through the file that backs it, for reading in bulk and while the guest runs.

Only ever for data. Text is written through the stub: a write past QEMU's back leaves old translated code running
(docs/architecture.md, "memory").
"""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory

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
            try:
                with Path(json.loads(path)).open("rb") as file:
                    files[name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except (OSError, ValueError):
                continue
        return cls(blocks, files) if files else None

    def covers(self, addr: PhysAddr, size: int) -> bool:
        return self._block(addr, size) is not None

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        block = self._block(addr, size)
        if block is None:
            raise TargetError(f"physical {addr:#x} (+{size}) is not in the shared memory file")
        start = block.file_offset + addr - block.start
        return self._files[block.name][start : start + size]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _block(self, addr: PhysAddr, size: int) -> RamBlock | None:
        return next((block for block in self._blocks if block.start <= addr and addr + size <= block.end), None)


class RamView:
    """Reads from the shared file where it covers the address, all else through the stub."""

    def __init__(self, stub: PhysicalMemory, shared: SharedRam | None) -> None:
        self._stub = stub
        self._shared = shared

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if self._shared is not None and self._shared.covers(addr, size):
            return self._shared.read_physical(addr, size)
        return self._stub.read_physical(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self._stub.write_physical(addr, data)
