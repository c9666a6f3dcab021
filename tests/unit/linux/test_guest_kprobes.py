"""The guest's own kprobes, by its types: which of them own text, and what is known where not all can be read."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.guest_kprobes import GuestKprobes, read_guest_kprobes
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.types import KnownTypes, Layout, Member
from gdb_kprobe.model import AddressRange, VirtAddr

TABLE, NODES, SLOT = 0x1000, 0x2000, 0x3000
TEXT = 0xFFFF_FFFF_8100_0000
_KPROBE = {
    "hlist": Member(0, 16), "hlist.next": Member(0, 8), "addr": Member(16, 8), "opcode": Member(24, 1),
    "flags": Member(28, 4), "ainsn.insn": Member(32, 8),
}  # fmt: skip
TYPES = KnownTypes({"kprobe": lambda: Layout(40, _KPROBE), "optimized_kprobe": lambda: Layout(0, {})}, {})
GONE, DISABLED = 1, 2


def read(memory: Any, *nodes: tuple[int, int, int, int]) -> GuestKprobes:
    """The table whose first list has *nodes*: address, opcode, flags and slot of each, one behind the other."""
    table = struct.pack("<Q", NODES).ljust(64 * 8, b"\0")
    chain = b"".join(
        struct.pack(
            "<QQQB3xIQ", NODES + 40 * (index + 1) if index + 1 < len(nodes) else 0, 0, addr, opcode, flags, slot
        )
        for index, (addr, opcode, flags, slot) in enumerate(nodes)
    )
    memory.add(TABLE, table)
    memory.add(NODES, chain)
    whole = AddressRange(VirtAddr(0), VirtAddr(1 << 63))
    kallsyms = Kallsyms(SymbolTable(["kprobe_table"], "d", array("Q", [TABLE]), (whole,)))
    return read_guest_kprobes(memory, kallsyms, TYPES)


def test_one_whose_text_is_gone_owns_none(memory: Any) -> None:
    """Its slot is gone as well; and at its address there may be a function of another module."""
    found = read(memory, (TEXT, 0x55, 0, 0), (TEXT + 0x10, 0xE9, GONE, 0), (TEXT + 0x20, 0x90, DISABLED, 0))
    found.check_all()
    assert [(kprobe.addr, kprobe.original) for kprobe in found] == [(TEXT, b"\x55"), (TEXT + 0x20, b"\x90")]


def test_a_jump_is_read_from_the_slot(memory: Any) -> None:
    memory.add(SLOT, b"\xe9\x00\x01\x00\x00")
    [found] = read(memory, (TEXT, 0xE9, 0, SLOT))
    assert found.leads_to == TEXT + 5 + 0x100


def test_where_one_cannot_be_read_those_before_it_are_known_and_the_rest_is_asked_for(memory: Any) -> None:
    found = read(memory, (TEXT, 0x55, 0, 0), (TEXT + 0x10, 0xE9, 0, 0x7000))
    assert [kprobe.addr for kprobe in found] == [TEXT]
    with pytest.raises(
        GuestStateError, match="a kprobe of the guest's own cannot be read: 0x7000 is not mapped"
    ) as error:
        found.check_all()
    assert "remove the guest's own kprobes" in error.value.hint
