"""The guest's tasks and stacks, and the search for addresses on them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.percpu import hot_symbol, per_cpu_offsets, per_cpu_ptr
from gdb_kprobe.linux.structs import Struct, for_each_list_entry, read_pointer
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.system.bounds import Steps, damaged, guest_range
from gdb_kprobe.target.protocols import Memory

_LARGEST_TASK = 1 << 16
"""Bytes of a ``struct task_struct`` up to the last member that is asked for; there are some 5,000."""

assert sys.byteorder == "little", "stack words are taken as the host's"


@dataclass(frozen=True, slots=True)
class Task:
    """One ``struct task_struct``. *pid* is the thread's, *tgid* the process's; *sp* was saved at its last switch.

    *stack* is empty when the task has ended and nobody has asked for its status yet (a zombie): the kernel frees the
    stack before (release_task_stack() in kernel/fork.c).
    """

    addr: VirtAddr
    pid: int
    tgid: int
    comm: str
    stack: AddressRange
    sp: VirtAddr

    def __str__(self) -> str:
        return f"{self.comm}[{self.pid}]"


class StackKind(Enum):
    """What a stack is for."""

    TASK = auto()
    INTERRUPT = auto()
    EXCEPTION = auto()
    """All the stacks of a CPU that the IDT names (NMI, double fault, ...), one above the other."""
    ENTRY = auto()


@dataclass(frozen=True, slots=True)
class Stack:
    """A kernel stack and whose it is: a task's, or a CPU's for interrupts or exceptions."""

    owner: str
    range: AddressRange
    kind: StackKind = StackKind.TASK
    cpu: int | None = None
    alias: AddressRange | None = None
    """Where the CPU uses it, if that is not where it is read."""

    @property
    def used(self) -> AddressRange:
        """Where the CPU's stack pointer is while it is on it."""
        return self.range if self.alias is None else self.alias


@dataclass(frozen=True, slots=True)
class StackWord:
    """A word on a stack whose value was looked for."""

    owner: str
    addr: VirtAddr
    value: int


def read_tasks(memory: Memory, kallsyms: Kallsyms, types: Types) -> tuple[Task, ...]:
    """Return every thread of every process, and the idle task (pid 0) of each possible CPU.

    :raises GuestStateError: this kernel's structures are not as known here.
    """
    init_task = kallsyms.address("init_task")
    found = {init_task: None}
    # Idle tasks of the other CPUs are on no list. CPU 0's is init_task.
    idle_threads = kallsyms.find("idle_threads")
    if idle_threads is not None:
        for offset in per_cpu_offsets(memory, kallsyms, types).values():
            found[read_pointer(memory, per_cpu_ptr(idle_threads, offset))] = None
    found.pop(VirtAddr(0), None)
    signal = types.offset_of("task_struct", "signal")
    thread_head = types.offset_of("signal_struct", "thread_head")
    thread_node = types.offset_of("task_struct", "thread_node")
    tasks_head = VirtAddr(init_task + types.offset_of("task_struct", "tasks"))
    steps = Steps("the list of the guest's tasks")
    for leader in for_each_list_entry(memory, tasks_head, tasks_head - init_task, steps):
        threads = VirtAddr(read_pointer(memory, VirtAddr(leader + signal)) + thread_head)
        for thread in for_each_list_entry(memory, threads, thread_node, steps):
            found[thread] = None
    return tuple(_read_task(memory, types, addr) for addr in found)


def _read_task(memory: Memory, types: Types, addr: VirtAddr) -> Task:
    members = ("pid", "tgid", "comm", "stack", "thread.sp")
    size = max(types.offset_of("task_struct", name) + types.member("task_struct", name).size for name in members)
    if size > _LARGEST_TASK:
        raise damaged(f"struct task_struct has {size} bytes up to what is read of it")
    task = Struct(types, "task_struct", addr, memory.read(addr, size))
    base = task.pointer("stack")
    # THREAD_SIZE is a macro and no type has that size; an interrupt's stack is as large on x86-64, by THREAD_SIZE_ORDER
    # and IRQ_STACK_ORDER in arch/x86/include/asm/page_64_types.h.
    stack_size = types.size_of("irq_stack") if base else 0
    return Task(
        addr=addr,
        pid=task.sint("pid"),
        tgid=task.sint("tgid"),
        comm=task.string("comm"),
        stack=guest_range(f"the stack of the task at {addr:#x}", base, base + stack_size),
        sp=task.pointer("thread.sp"),
    )


def task_on_stack(tasks: Iterable[Task], rsp: int) -> Task | None:
    """Return the task whose kernel stack *rsp* is in: the one that runs on a vCPU, unless that is on another stack."""
    return next((task for task in tasks if rsp in task.stack), None)


def cpu_stacks(memory: Memory, kallsyms: Kallsyms, types: Types) -> tuple[Stack, ...]:
    """Return the interrupt, exception (IST) and entry stacks of all possible CPUs.

    :raises GuestStateError: this kernel's variables are not as known here.
    """
    hardirq_ptr = hot_symbol(kallsyms, types, "hardirq_stack_ptr")
    irq_size = types.size_of("irq_stack")
    stacks = []
    for cpu, offset in per_cpu_offsets(memory, kallsyms, types).items():
        # The pointer is to the last word: arch/x86/kernel/irq_64.c, map_irq_stack(). A CPU that never was up has none.
        last = read_pointer(memory, per_cpu_ptr(hardirq_ptr, offset))
        if not last:
            continue
        top = last + 8
        # Exceptions use theirs through cpu_entry_area, with a guard page in front of each: mm/cpu_entry_area.c.
        used_at = read_pointer(memory, per_cpu_ptr(kallsyms.address("cea_exception_stacks"), offset))
        used = guest_range(
            f"the exception stacks of CPU {cpu}", used_at, used_at + types.size_of("cea_exception_stacks")
        )
        exceptions = _storage(kallsyms, types, "exception_stacks", "exception_stacks", offset)
        entry = _storage(kallsyms, types, "entry_stack_storage", "entry_stack_page", offset)
        interrupts = guest_range(f"the interrupt stack of CPU {cpu}", top - irq_size, top)
        stacks += [
            Stack(f"interrupt stack of CPU {cpu}", interrupts, StackKind.INTERRUPT, cpu),
            Stack(f"exception stacks of CPU {cpu}", exceptions, StackKind.EXCEPTION, cpu, used),
            Stack(f"entry stack of CPU {cpu}", entry, StackKind.ENTRY, cpu),
        ]
    return tuple(stacks)


def _storage(kallsyms: Kallsyms, types: Types, symbol: str, type_name: str, offset: int) -> AddressRange:
    start = per_cpu_ptr(kallsyms.address(symbol), offset)
    return guest_range(f"the CPU's {symbol}", start, start + types.size_of(type_name))


def live_stacks(stacks: Iterable[Stack], stack_pointers: Iterable[int]) -> tuple[Stack, ...]:
    """Return those of the CPUs' *stacks* that hold anything alive.

    :param stack_pointers: of those CPUs that are on none of the tasks' stacks.

    A CPU is on the stack that its pointer is in. It may have come from its interrupt stack to one of an exception, but
    not the other way: there interrupts are off. Of a pointer that is in none of them nothing is known.
    """
    known, pointers = tuple(stacks), tuple(stack_pointers)
    if not all(any(rsp in stack.used for stack in known) for rsp in pointers):
        return known
    on = [stack for stack in known if any(rsp in stack.used for rsp in pointers)]
    nested = {stack.cpu for stack in on if stack.kind is StackKind.EXCEPTION}
    below = (stack for stack in known if stack.kind is StackKind.INTERRUPT and stack.cpu in nested)
    return tuple(dict.fromkeys((*on, *below)))


def task_stacks(tasks: Iterable[Task], running: Iterable[VirtAddr] = ()) -> Iterator[Stack]:
    """Yield the part of each task's stack that is in use; nothing for a task that has none any more.

    *running* holds the addresses of the tasks that are on a CPU: their saved stack pointer is out of date, so the whole
    stack is taken. So is that of a task whose saved pointer is not in its stack.
    """
    on_cpu = frozenset(running)
    for task in tasks:
        if not task.stack.size:
            continue
        start = task.sp if task.sp in task.stack and task.addr not in on_cpu else task.stack.start
        yield Stack(str(task), AddressRange(VirtAddr(start & ~7), task.stack.end))


def current_tasks(memory: Memory, kallsyms: Kallsyms, types: Types) -> dict[int, VirtAddr]:
    """Return the task that runs on each possible CPU, by its ``struct task_struct``.

    :raises GuestStateError: this kernel keeps the current task where it is not known here.
    """
    symbol = hot_symbol(kallsyms, types, "current_task")
    offsets = per_cpu_offsets(memory, kallsyms, types)
    return {cpu: read_pointer(memory, per_cpu_ptr(symbol, offset)) for cpu, offset in offsets.items()}


def scan_stacks(memory: Memory, stacks: Iterable[Stack], wanted: AddressRange) -> Iterator[StackWord]:
    """Yield every aligned word on *stacks* whose value lies in *wanted*.

    :raises UnmappedError: a stack is not mapped.
    """
    for stack in stacks:
        words = array("Q", memory.read(stack.range.start, stack.range.size & ~7))
        for index, value in enumerate(words):
            if wanted.start <= value < wanted.end:
                yield StackWord(stack.owner, VirtAddr(stack.range.start + 8 * index), value)
