"""The guest's page allocator: what to call to get memory of it, and from where it may be called.

A caller that neither sleeps nor reclaims (no ``__GFP_DIRECT_RECLAIM``) may call it from nearly anywhere, hard
interrupts included: the zones' locks are taken with interrupts off (mm/page_alloc.c). Not from NMI-like context, and
not on PREEMPT_RT, where those locks sleep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.percpu import hot_symbol, per_cpu_ptr
from gdb_kprobe.linux.structs import read_pointer
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import PAGE_SIZE, PhysAddr, VirtAddr
from gdb_kprobe.target.protocols import Memory

GFP: Final = 0x2000 | 0x80000
"""``__GFP_NOWARN | __GFP_NOMEMALLOC`` (include/linux/gfp_types.h): take what is free and nobody's reserve, wait for
nobody, and do not complain."""

MAX_ORDER: Final = 10
"""The largest block that there is on x86-64: 4 MiB (``MAX_ORDER`` - 1 up to v6.3, ``MAX_PAGE_ORDER`` since v6.8)."""

# Memory allocation profiling has renamed it: Linux kernel commit b951aaff5035 (in v6.10).
_ALLOCATE: Final = ("get_free_pages_noprof", "__get_free_pages")
RETURN: Final = "restore_regs_and_return_to_kernel"
"""The end of an exception in the kernel: pops a ``struct pt_regs``, and returns to it (arch/x86/entry/entry_64.S)."""

_DIRECT_MAP: Final = {4: 0xFFFF_8880_0000_0000, 5: 0xFF11_0000_0000_0000}
"""Where all RAM is mapped without KASLR, by levels (Documentation/arch/x86/x86_64/mm.rst)."""

_RESERVE: Final = "reserve the memory: 'memmap=16M$ADDRESS' for the guest, 'source: reserved' in the profile"

_PREEMPT_NEED_RESCHED: Final = 1 << 31
"""Kept inverted in the count (arch/x86/include/asm/preempt.h)."""
_INTERRUPTS: Final = 1 << 9


@dataclass(frozen=True, slots=True)
class PageAllocator:
    """*allocate* is ``unsigned long (gfp_t mask, unsigned int order)``, *free* ``void (unsigned long, unsigned int)``.

    Both speak of addresses in the direct map, which begins at *direct_map*.
    """

    allocate: VirtAddr
    free: VirtAddr
    direct_map: VirtAddr

    def address(self, phys: PhysAddr) -> VirtAddr:
        """Where the kernel has the page at *phys* (``__va``)."""
        return VirtAddr(self.direct_map + phys)


def find_page_allocator(memory: Memory, kallsyms: Kallsyms, banner: str, levels: int) -> PageAllocator:
    """Find it.

    :raises GuestStateError: this kernel's cannot be called from outside.
    """
    if "PREEMPT_RT" in banner:
        raise GuestStateError(
            "the guest's kernel is PREEMPT_RT: its page allocator may sleep, so it cannot be called from outside",
            _RESERVE,
        )
    missing = next((name for name in (RETURN, "free_pages", "schedule") if kallsyms.find(name) is None), None)
    if missing is not None:
        raise GuestStateError(f"the guest's kernel has no {missing}: its page allocator cannot be called", _RESERVE)
    allocate = next((found for name in _ALLOCATE if (found := kallsyms.find(name)) is not None), None)
    base = kallsyms.find("page_offset_base")  # CONFIG_DYNAMIC_MEMORY_LAYOUT
    return PageAllocator(
        kallsyms.address(_ALLOCATE[-1]) if allocate is None else allocate,
        kallsyms.address("free_pages"),
        VirtAddr(_DIRECT_MAP[levels]) if base is None else read_pointer(memory, base),
    )


def way_points(kallsyms: Kallsyms) -> tuple[VirtAddr, ...]:
    """Functions at whose entry it may be called, one of which every kernel comes to soon.

    ``schedule`` is called by a task that holds no spinlock, ``hrtimer_interrupt`` by the timer's interrupt, which comes
    to an idle CPU too.
    """
    names = ("schedule", "schedule_idle", "hrtimer_interrupt")
    return tuple(found for name in names if (found := kallsyms.find(name)) is not None)


def may_call_here(memory: Memory, kallsyms: Kallsyms, types: Types, registers: dict[str, int]) -> bool:
    """Whether a CPU with these *registers* is where it may be called: in the kernel, nothing held, nothing off.

    Not in an idle task: its CPU halts, and would not wake for us.

    :raises GuestStateError: this kernel keeps its preempt count where it is not known here.
    """
    in_kernel = not registers["cs"] & 3 and registers["gs_base"] >> 63
    if not in_kernel or not registers["eflags"] & _INTERRUPTS:
        return False
    # In kernel mode gs_base is what is added to a per-CPU symbol's address.
    name = "__preempt_count" if kallsyms.find("__preempt_count") is not None else "preempt_count"
    count = memory.read(per_cpu_ptr(hot_symbol(kallsyms, types, name), registers["gs_base"]), 4)
    if int.from_bytes(count, "little") & ~_PREEMPT_NEED_RESCHED:
        return False
    task = read_pointer(memory, per_cpu_ptr(hot_symbol(kallsyms, types, "current_task"), registers["gs_base"]))
    return any(memory.read(VirtAddr(task + types.offset_of("task_struct", "pid")), 4))


def blocks_of(size: int) -> tuple[int, int]:
    """(order, number) of the blocks that *size* bytes are made of, a multiple of 2 MiB."""
    largest = PAGE_SIZE << MAX_ORDER
    order = MAX_ORDER if size % largest == 0 else MAX_ORDER - 1
    return order, size // (PAGE_SIZE << order)
