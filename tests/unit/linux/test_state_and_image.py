from __future__ import annotations

import struct
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.image import find_build_id, find_image, read_string
from gdb_kprobe.linux.state import GuestState
from gdb_kprobe.linux.tasks import Stack, Task, scan_stacks, task_on_stack, task_stacks
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.paging import PageTable

P, W, NX = 1, 2, 1 << 63
BASE = 0xFFFF_FFFF_9200_0000


def window(start: int, end: int) -> AddressRange:
    return AddressRange(VirtAddr(start), VirtAddr(end))


# -- image --------------------------------------------------------------------------------------------------------


def test_image_is_split_by_permission(make_tables: Any) -> None:
    tables = make_tables()
    for index, flags in enumerate((P, P, P | NX, P | W | NX)):
        tables.map(BASE + index * (2 << 20), 0x40_0000, flags, level=2)
    tables.map(0xFFFF_FFFF_C000_0000, 0x9000, P)  # a module is not the kernel's
    found = find_image(PageTable(tables.ram, PhysAddr(tables.root), 4), VirtAddr(BASE + 0x123))
    mib = 1 << 20
    assert (found.base, found.end, found.slide) == (BASE, BASE + 8 * mib, 0x1100_0000)
    assert found.text == (window(BASE, BASE + 4 * mib),)
    assert found.rodata == (window(BASE + 4 * mib, BASE + 6 * mib),)
    assert found.data == (window(BASE + 6 * mib, BASE + 8 * mib),)


@pytest.mark.parametrize("inside", [BASE + (2 << 20), 0x40_0000, 0xFFFF_FFFF_C000_0000])
def test_handler_outside_kernel_text_is_refused(make_tables: Any, inside: int) -> None:
    tables = make_tables()
    tables.map(BASE, 0x40_0000, P, level=2)
    tables.map(BASE + (2 << 20), 0x60_0000, P | NX, level=2)
    tables.map(0x40_0000, 0x9000, P)
    tables.map(0xFFFF_FFFF_C000_0000, 0x9000, P)
    with pytest.raises(GuestStateError, match=rf"{inside:#x} is not in the text of a Linux kernel image\n.*booting"):
        find_image(PageTable(tables.ram, PhysAddr(tables.root), 4), VirtAddr(inside))


def test_string_at_the_very_end_of_mapped_memory(memory: Any) -> None:
    memory.add(0x1000, b"\xff" * 0xF00 + b"x" * 0xF0 + b"Linux version 6\0")
    assert read_string(memory, VirtAddr(0x1FF0)) == "Linux version 6"
    assert read_string(memory, VirtAddr(0x1F00), limit=100) == "x" * 100


def test_string_that_runs_out_of_memory_is_an_error(memory: Any) -> None:
    memory.add(0x1000, b"x" * 0x100)
    with pytest.raises(UnmappedError):
        read_string(memory, VirtAddr(0x1000))


def note(name: bytes, kind: int, data: bytes) -> bytes:
    padded = data + bytes(-len(data) % 4)
    return struct.pack("<III", len(name), len(data), kind) + name + bytes(-len(name) % 4) + padded


def test_build_id_is_found_among_the_notes(memory: Any) -> None:
    notes = memory.add(0x1000, note(b"Xen\0", 6, b"linux") + note(b"GNU\0", 5, b"") + note(b"GNU\0", 3, b"\xab" * 20))
    assert find_build_id(memory, notes) == "ab" * 20


def test_no_build_id_is_an_empty_string(memory: Any) -> None:
    assert find_build_id(memory, memory.add(0x1000, note(b"Xen\0", 6, b"linux"))) == ""
    assert find_build_id(memory, window(0x9000, 0x9100)) == ""


# -- state --------------------------------------------------------------------------------------------------------


def test_running_guest_is_accepted() -> None:
    state = GuestState("SYSTEM_RUNNING", None, oops_in_progress=False)
    assert state.is_running
    state.check_running()


def test_booting_guest_is_told_from_a_panicked_one() -> None:
    with pytest.raises(GuestStateError, match=r"system_state is SYSTEM_BOOTING\n.*attach --wait"):
        GuestState("SYSTEM_BOOTING", None, oops_in_progress=False).check_running()
    with pytest.raises(GuestStateError, match=r"panicked \(on its CPU 0\)\n.*after a reset"):
        GuestState("SYSTEM_RUNNING", 0, oops_in_progress=True).check_running()


# -- stacks -------------------------------------------------------------------------------------------------------


def task(pid: int, start: int, sp: int) -> Task:
    return Task(VirtAddr(pid << 12), pid, pid, f"task{pid}", window(start, start + 0x4000), VirtAddr(sp))


def test_stack_of_a_sleeping_task_is_taken_from_its_saved_pointer() -> None:
    sleeping, running, strange = task(1, 0x10000, 0x13F03), task(2, 0x20000, 0x23F00), task(3, 0x30000, 0)
    found = list(task_stacks((sleeping, running, strange), running=(running.addr,)))
    assert found == [
        Stack("task1[1]", window(0x13F00, 0x14000)),
        Stack("task2[2]", window(0x20000, 0x24000)),
        Stack("task3[3]", window(0x30000, 0x34000)),
    ]


def test_a_task_that_has_ended_has_no_stack() -> None:
    zombie = Task(VirtAddr(0x1000), 1, 1, "zombie", window(0, 0), VirtAddr(0x13F00))
    assert list(task_stacks((zombie,))) == []
    assert list(task_stacks((zombie,), running=(zombie.addr,))) == []
    assert task_on_stack((zombie,), 0x13F00) is None


def test_task_on_stack() -> None:
    tasks = (task(1, 0x10000, 0), task(2, 0x20000, 0))
    assert task_on_stack(tasks, 0x23FFF) is tasks[1]
    assert task_on_stack(tasks, 0x24000) is None


def test_scan_finds_aligned_words_in_the_half_open_range(memory: Any) -> None:
    words = (0xFFF, 0x1000, 0x1FFF, 0x2000, 0xFFFF_FFFF_FFFF_FFFF)
    stack = Stack("someone", memory.add(0x5000, struct.pack("<5Q", *words) + b"\0\x10\0\0"))
    found = [(word.owner, word.addr, word.value) for word in scan_stacks(memory, [stack], window(0x1000, 0x2000))]
    assert found == [("someone", 0x5008, 0x1000), ("someone", 0x5010, 0x1FFF)]


def test_scan_of_an_unmapped_stack_is_an_error(memory: Any) -> None:
    with pytest.raises(UnmappedError):
        list(scan_stacks(memory, [Stack("gone", window(0x5000, 0x6000))], window(0, 1)))
