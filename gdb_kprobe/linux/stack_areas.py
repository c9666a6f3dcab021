"""All memory that kernel stacks are in, told by page tables and symbols, for a kernel whose tasks cannot be read.

With CONFIG_VMAP_STACK each stack of a task, and the interrupt stack of each CPU, is mapped in the vmalloc area, between
pages that are not mapped (kernel/fork.c, ``alloc_thread_stack_node``; arch/x86/kernel/irq_64.c). The first task's is
part of the kernel's image, and those of exceptions are in the CPU entry area. So whatever is written to in these three
is more than all stacks: what is found there may be no stack, or a dead part of one, but nothing is missed.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Collection, Iterable
from typing import Final

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.e820 import E820Table
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.percpu import per_cpu_offsets, per_cpu_ptr
from gdb_kprobe.linux.structs import read_pointer
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.system.bounds import guest_range
from gdb_kprobe.system.paging import PageTable

_VMALLOC: Final = {4: (0xFFFF_C900_0000_0000, 32 << 40), 5: (0xFFA0_0000_0000_0000, 12800 << 40)}
"""Where it begins without KASLR, and its size, by levels (Documentation/arch/x86/x86_64/mm.rst)."""
_CPU_ENTRY_AREA: Final = AddressRange(VirtAddr(0xFFFF_FE00_0000_0000), VirtAddr(0xFFFF_FE80_0000_0000))
_OF_VMAP_STACK: Final = "cached_stacks"
"""A variable of kernel/fork.c that there is with CONFIG_VMAP_STACK alone."""
_LAST_CALL: Final = "do_task_dead"
"""A function of kernel/sched/core.c that each task calls once, with preemption off, and that does not return."""
_CACHED: Final = 2
"""``NR_CACHED_STACKS``: what a CPU keeps of stacks that their tasks have left, each by its ``struct vm_struct``."""
_VM_STRUCT: Final = struct.Struct("<8xQQ")
"""Its ``addr``, and its ``size`` with the page that guards it (include/linux/vmalloc.h)."""
_GUARD: Final = 0x1000
_INIT_STACKS: Final = (("__start_init_stack", "__end_init_stack"), ("__start_init_task", "__end_init_task"))
"""Since v6.10, and before (include/asm-generic/vmlinux.lds.h)."""
_MOST: Final = 256 << 20
"""Bytes of vmalloc area that are searched at the most; a guest with more has its stacks not found."""


def scan_all_stacks(
    table: PageTable, kallsyms: Kallsyms, ram: E820Table, wanted: AddressRange, stack_pointers: Iterable[int]
) -> list[int] | None:
    """All aligned words that point into *wanted* and may be on a kernel stack; ``None`` when stacks may be elsewhere.

    :param stack_pointers: of the CPUs. What lies below all of those in the same mapping is dead.
    """
    init_stack = next((stack for names in _INIT_STACKS if (stack := kallsyms.section(*names)) is not None), None)
    if kallsyms.find(_OF_VMAP_STACK) is None or init_stack is None:
        return None
    runs = [init_stack, *_vmalloc_areas(table, kallsyms, ram)]
    if sum(run.size for run in runs) > _MOST:
        return None
    pointers = tuple(stack_pointers)
    if not all(any(rsp in run for run in runs) for rsp in pointers if rsp >> 63):
        runs += _writable(table, _CPU_ENTRY_AREA)
    if not all(any(rsp in run for run in runs) for rsp in pointers if rsp >> 63):
        return None
    left = _left_by_their_tasks(table, kallsyms)
    words: list[int] = []
    for run in runs:
        if run in left:
            continue
        floor = min((rsp for rsp in pointers if rsp in run), default=0)
        for index, word in enumerate(array("Q", table.read(run.start, run.size))):
            if wanted.start <= word < wanted.end and run.start + 8 * index >= floor:
                words.append(word)
    return words


def unlisted_stacks(
    table: PageTable,
    kallsyms: Kallsyms,
    ram: E820Table,
    size: int,
    known: Collection[AddressRange],
    stack_pointers: Iterable[int],
) -> list[AddressRange]:
    """Areas of *size* bytes that may be the stack of a task which is on no list of the kernel's any more.

    A task that ends without a parent to ask for its status takes itself off the lists (kernel/exit.c, ``exit_notify``
    and ``release_task``), and goes on, and may be preempted, until it has called ``do_task_dead``. From there on it
    only goes on while it is on a CPU.

    :param known: stacks of tasks that are on a list, and those of interrupts.
    :param stack_pointers: of the CPUs.
    """
    if kallsyms.find(_OF_VMAP_STACK) is None:
        return []
    others = {run.start for run in known} | {run.start for run in _left_by_their_tasks(table, kallsyms)}
    areas = [run for run in _vmalloc_areas(table, kallsyms, ram) if run.size == size and run.start not in others]
    pointers = tuple(stack_pointers)
    [end, *_] = kallsyms.lookup(_LAST_CALL) or (None,)
    if end is None:
        return areas
    last = AddressRange(end.addr, kallsyms.end(end))
    return [
        area
        for area in areas
        if any(rsp in area for rsp in pointers)
        # Its return address into that function: a stack is cleared before another task has it.
        or not any(last.start <= word < last.end for word in array("Q", table.read(area.start, area.size)))
    ]


def _vmalloc_areas(table: PageTable, kallsyms: Kallsyms, ram: E820Table) -> list[AddressRange]:
    """What is mapped in the vmalloc area, to be written to, and is memory as a whole; a device must not be read."""
    base, size = _VMALLOC[table.levels]
    pointer = kallsyms.find("vmalloc_base")
    if pointer is not None:
        base = read_pointer(table, pointer)
    areas = _writable(table, AddressRange(VirtAddr(base), VirtAddr(base + size)))
    return [area for area in areas if ram.is_ram(PhysAddr(table.translate(area.start)))]


def _left_by_their_tasks(table: PageTable, kallsyms: Kallsyms) -> set[AddressRange]:
    """The stacks that CPUs keep for the next task to come; whole ones, for else it is not known what they are.

    No task is on them (kernel/fork.c, ``try_release_thread_stack_to_cache``: the task's last switch is over), and the
    next task finds them cleared (``alloc_thread_stack_node``).
    """
    cached = kallsyms.find(_OF_VMAP_STACK)
    assert cached is not None
    found = set()
    try:
        for offset in per_cpu_offsets(table, kallsyms, None).values():
            for pointer in struct.unpack(f"<{_CACHED}Q", table.read(per_cpu_ptr(cached, offset), 8 * _CACHED)):
                if pointer:
                    addr, size = _VM_STRUCT.unpack(table.read(VirtAddr(pointer), _VM_STRUCT.size))
                    found.add(guest_range("a stack that no task has", addr, addr + size - _GUARD))
    except (UnmappedError, GuestStateError):
        return set()
    return found


def _writable(table: PageTable, window: AddressRange) -> list[AddressRange]:
    return [run.range for run in table.mappings(window) if run.writable and not run.executable]
