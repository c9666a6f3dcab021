"""Which memory of a guest is set aside for probes, and which could be."""

from __future__ import annotations

import pytest

from gdb_kprobe.guest.doctor import Finding, memmap_for, set_aside
from gdb_kprobe.linux.e820 import E820Entry, E820Table
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.render.doctor import doctor

MIB = 1 << 20
RAM, RESERVED = 1, 2


def table(*entries: tuple[int, int, int]) -> E820Table:
    """Each from a MiB to a MiB, and its type."""
    return E820Table(tuple(E820Entry(PhysAddr(a * MIB), (b - a) * MIB, kind) for a, b, kind in entries))


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([(1, 256, RAM), (256, 272, RESERVED), (272, 512, RAM)], [256]),
        ([(1, 256, RAM), (256, 264, RESERVED), (264, 512, RAM)], []),  # too small
        ([(1, 511, RAM), (2816, 3072, RESERVED)], []),  # the machine's own
        ([(1, 512, RAM)], []),
    ],
)
def test_what_is_set_aside(entries: list[tuple[int, int, int]], found: list[int]) -> None:
    assert [entry.addr // MIB for entry in set_aside(table(*entries))] == found


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([(0, 1, RAM), (1, 511, RAM)], "memmap=16M$0x10000000"),
        ([(1, 2048, RAM), (4096, 8192, RAM)], "memmap=16M$0x180000000"),
        ([(1, 100, RAM)], ""),
    ],
)
def test_where_it_could_be(entries: list[tuple[int, int, int]], word: str) -> None:
    assert memmap_for(table(*entries)) == word


def test_what_could_be_better_is_marked() -> None:
    assert doctor([Finding("QEMU", "7.2", "take 8.0"), Finding("region", "there")]) == (
        "! QEMU    7.2\n          hint: take 8.0\n  region  there"
    )
