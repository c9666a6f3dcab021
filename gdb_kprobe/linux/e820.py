"""The guest's own map of physical memory: what it uses as RAM and what it was told to leave alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import read_pointer
from gdb_kprobe.model import PhysAddr, VirtAddr
from gdb_kprobe.target.protocols import Memory

# enum e820_type, arch/x86/include/asm/e820/types.h
_TYPE_NAMES = {
    1: "System RAM",
    2: "Reserved",
    3: "ACPI Tables",
    4: "ACPI Non-volatile Storage",
    5: "Unusable memory",
    7: "Persistent Memory",
    12: "Persistent Memory (legacy)",
    128: "Reserved",
    0xEFFF_FFFF: "Soft Reserved",
}
_RAM, _RESERVED = 1, 2

_ENTRY = struct.Struct("<QQI")
_MOST_ENTRIES = 4096


@dataclass(frozen=True, slots=True)
class E820Entry:
    """One range of physical memory; *type* is the kernel's ``enum e820_type``."""

    addr: PhysAddr
    size: int
    type: int

    @property
    def end(self) -> PhysAddr:
        return PhysAddr(self.addr + self.size)

    @property
    def type_name(self) -> str:
        """The name that ``/proc/iomem`` uses."""
        return _TYPE_NAMES.get(self.type, f"Unknown E820 type {self.type}")

    def __str__(self) -> str:
        return f"{self.addr:#x}-{self.end - 1:#x} {self.type_name}"


@dataclass(frozen=True, slots=True)
class E820Table:
    """The entries in the kernel's order, which is ascending."""

    entries: tuple[E820Entry, ...]

    @property
    def ram(self) -> int:
        """Bytes of usable memory."""
        return sum(entry.size for entry in self.entries if entry.type == _RAM)

    def overlapping(self, start: PhysAddr, size: int) -> tuple[E820Entry, ...]:
        """Return the entries that share a byte with the range."""
        return tuple(entry for entry in self.entries if entry.addr < start + size and start < entry.end)

    def is_reserved(self, start: PhysAddr, size: int) -> bool:
        """Say whether every byte of the range is marked reserved, so that the guest keeps its hands off it."""
        at = int(start)
        for entry in self.overlapping(start, size):
            if entry.type != _RESERVED or entry.addr > at:
                return False
            at = entry.end
        return at >= start + size

    def is_ram(self, addr: PhysAddr) -> bool:
        """Say whether the byte at *addr* is memory that the kernel uses."""
        return any(entry.type == _RAM for entry in self.overlapping(addr, 1))

    def describe(self, start: PhysAddr, size: int) -> str:
        """Say in words what the range is to the guest, for a message."""
        found = self.overlapping(start, size)
        return ", ".join(str(entry) for entry in found) if found else "not in the guest's memory map"


def read_e820(memory: Memory, kallsyms: Kallsyms) -> E820Table:
    """Read the table that the kernel's pointer ``e820_table`` leads to.

    :raises GuestStateError: this kernel has no such symbol, or the table is not plausible.
    """
    table = read_pointer(memory, kallsyms.address("e820_table"))
    count = int.from_bytes(memory.read(table, 4), "little")
    if not 0 < count <= _MOST_ENTRIES:
        raise GuestStateError(f"the guest's e820 table at {table:#x} claims {count} entries", "the guest is booting")
    data = memory.read(VirtAddr(table + 4), count * _ENTRY.size)
    return E820Table(tuple(E820Entry(PhysAddr(addr), size, kind) for addr, size, kind in _ENTRY.iter_unpack(data)))
