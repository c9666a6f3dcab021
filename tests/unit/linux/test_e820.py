from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.e820 import E820Entry, E820Table, read_e820
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.model import PhysAddr

MIB = 1 << 20
RAM, RESERVED, ACPI = 1, 2, 3


def table(*entries: tuple[int, int, int]) -> E820Table:
    return E820Table(tuple(E820Entry(PhysAddr(addr), size, kind) for addr, size, kind in entries))


MAP = table(
    (0, 256 * MIB, RAM),
    (256 * MIB, 8 * MIB, RESERVED),
    (264 * MIB, 8 * MIB, RESERVED),
    (272 * MIB, 100 * MIB, RAM),
    (400 * MIB, MIB, ACPI),
)


@pytest.mark.parametrize(
    ("start", "size", "reserved"),
    [
        (256 * MIB, 16 * MIB, True),
        (260 * MIB, 8 * MIB, True),
        (256 * MIB - 1, 16 * MIB, False),
        (256 * MIB, 16 * MIB + 1, False),
        (0, MIB, False),
        (400 * MIB, MIB, False),
        (380 * MIB, MIB, False),
    ],
)
def test_reserved_means_every_byte(start: int, size: int, reserved: bool) -> None:
    assert MAP.is_reserved(PhysAddr(start), size) is reserved


def test_a_gap_between_reserved_entries_is_not_reserved() -> None:
    assert not table((0, MIB, RESERVED), (2 * MIB, MIB, RESERVED)).is_reserved(PhysAddr(0), 3 * MIB)


def test_description_says_what_it_is_instead() -> None:
    assert MAP.describe(PhysAddr(255 * MIB), 2 * MIB) == "0x0-0xfffffff System RAM, 0x10000000-0x107fffff Reserved"
    assert MAP.describe(PhysAddr(400 * MIB), 1) == "0x19000000-0x190fffff ACPI Tables"
    assert MAP.describe(PhysAddr(1 << 40), MIB) == "not in the guest's memory map"


def kallsyms() -> Kallsyms:
    return Kallsyms(SymbolTable(["e820_table"], "D", array("Q", [0x1000]), ()))


def test_table_is_read_through_the_kernels_pointer(memory: Any) -> None:
    memory.add(0x1000, (0x2000).to_bytes(8, "little"))
    memory.add(0x2000, struct.pack("<IQQIQQI", 2, 0, MIB, RAM, MIB, MIB, RESERVED) + bytes(100))
    assert read_e820(memory, kallsyms()) == table((0, MIB, RAM), (MIB, MIB, RESERVED))


@pytest.mark.parametrize("count", [0, 1 << 20])
def test_implausible_table_is_refused(memory: Any, count: int) -> None:
    memory.add(0x1000, (0x2000).to_bytes(8, "little"))
    memory.add(0x2000, struct.pack("<I", count))
    with pytest.raises(GuestStateError, match=f"claims {count} entries"):
        read_e820(memory, kallsyms())
