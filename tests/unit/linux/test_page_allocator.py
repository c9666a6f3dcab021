"""What is called to get memory of the guest, and where it may be called."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.linux.page_allocator import blocks_of, find_page_allocator, may_call_here
from gdb_kprobe.model import PhysAddr, VirtAddr

MIB = 1 << 20
BASE = 0xFFFF_FFFF_8100_0000
TASK, PID = 0xFFFF_8880_2000_0000, 0x500
PER_CPU = 0xFFFF_8880_1000_0000


NEEDED = {"restore_regs_and_return_to_kernel": BASE, "free_pages": BASE, "schedule": BASE}


class Symbols:
    """As much of a Kallsyms as is asked for."""

    def __init__(self, **symbols: int) -> None:
        self._symbols = symbols

    def find(self, name: str) -> VirtAddr | None:
        return VirtAddr(self._symbols[name]) if name in self._symbols else None

    def address(self, name: str) -> VirtAddr:
        found = self.find(name)
        if found is None:
            raise GuestStateError(f"no symbol {name}")
        return found


class Types:
    """A Btf with ``pcpu_hot``, if it has any *members*, and a ``task_struct``."""

    def __init__(self, **members: int) -> None:
        self._members = members

    def has_member(self, struct_name: str, member: str) -> bool:
        return struct_name == "pcpu_hot" and member in self._members

    def offset_of(self, struct_name: str, member: str) -> int:
        return PID if struct_name == "task_struct" else self._members[member]


class Words:
    """Memory of some words."""

    def __init__(self, words: dict[int, int]) -> None:
        self._words = words

    def read(self, addr: VirtAddr, size: int) -> bytes:
        return struct.pack("<Q", self._words[addr])[:size]

    def write(self, addr: VirtAddr, data: bytes) -> None:
        raise AssertionError("nothing is written")


@pytest.mark.parametrize(("size", "order", "count"), [(2, 9, 1), (4, 10, 1), (6, 9, 3), (16, 10, 4), (64, 10, 16)])
def test_a_region_is_made_of_the_largest_blocks_that_fit(size: int, order: int, count: int) -> None:
    assert blocks_of(size * MIB) == (order, count)
    assert (0x1000 << order) * count == size * MIB


@pytest.mark.parametrize("name", ["__get_free_pages", "get_free_pages_noprof"])
def test_the_allocator_is_found_by_either_name(name: str) -> None:
    symbols: Any = Symbols(**{**NEEDED, name: BASE, "free_pages": BASE + 1, "page_offset_base": BASE + 2})
    memory = Words({BASE + 2: 0xFFFF_9000_0000_0000})
    found = find_page_allocator(memory, symbols, "Linux version 6.1", 4)
    assert (found.allocate, found.free) == (BASE, BASE + 1)
    assert found.address(PhysAddr(0x1000)) == 0xFFFF_9000_0000_1000


@pytest.mark.parametrize(("levels", "start"), [(4, 0xFFFF_8880_0000_0000), (5, 0xFF11_0000_0000_0000)])
def test_without_kaslr_of_memory_the_direct_map_is_where_it_always_is(levels: int, start: int) -> None:
    symbols: Any = Symbols(**NEEDED, __get_free_pages=BASE)
    found = find_page_allocator(Words({}), symbols, "Linux version 6.1", levels)
    assert found.direct_map == start


def test_a_kernel_whose_locks_sleep_is_not_called() -> None:
    symbols: Any = Symbols(**NEEDED, __get_free_pages=BASE)
    with pytest.raises(GuestStateError, match=r"is PREEMPT_RT: .*\n.*reserve the memory"):
        find_page_allocator(Words({}), symbols, "Linux version 6.1.0 #1 SMP PREEMPT_RT Debian", 4)


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_kernel_without_what_is_needed_is_told_apart(missing: str) -> None:
    symbols: Any = Symbols(__get_free_pages=BASE, **{name: addr for name, addr in NEEDED.items() if name != missing})
    with pytest.raises(GuestStateError, match=rf"has no {missing}: .*\n.*reserve the memory"):
        find_page_allocator(Words({}), symbols, "Linux version 6.1", 4)


@pytest.mark.parametrize("kind", ["symbol", "member"])
@pytest.mark.parametrize(
    ("changed", "count", "pid", "may"),
    [
        ({}, 0x8000_0000, 7, True),
        ({}, 0, 7, True),  # a reschedule is due: it waits
        ({}, 0x8000_0001, 7, False),
        ({}, 0x0001_0000, 7, False),  # a hard interrupt
        ({}, 0x8000_0000, 0, False),  # an idle task
        ({"eflags": 0x46}, 0x8000_0000, 7, False),
        ({"cs": 0x33}, 0x8000_0000, 7, False),
        ({"gs_base": 0x7F00_0000_0000}, 0x8000_0000, 7, False),  # on the way in, before swapgs
    ],
)
def test_it_is_called_where_nothing_is_held(
    kind: str, changed: dict[str, int], count: int, pid: int, may: bool
) -> None:
    types: Any = Types(current_task=0, preempt_count=8) if kind == "member" else Types()
    hot = {"pcpu_hot": 0x2000} if kind == "member" else {"__preempt_count": 0x2008, "current_task": 0x2000}
    symbols: Any = Symbols(**hot)
    memory = Words({PER_CPU + 0x2008: count, PER_CPU + 0x2000: TASK, TASK + PID: pid})
    registers = {"cs": 0x10, "gs_base": PER_CPU, "eflags": 0x246, **changed}
    assert may_call_here(memory, symbols, types, registers) is may


def test_registers_go_into_a_frame_and_out_of_it() -> None:
    registers = {name: 0x1111_0000_0000_0000 + at for name, at in pt_regs.OFFSETS.items()}
    assert pt_regs.unpack(pt_regs.pack({**registers, "cr3": 1})) == registers
