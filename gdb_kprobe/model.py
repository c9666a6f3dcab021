"""The values that every layer speaks: addresses, symbols, registers, refusals.

Addresses are not plain integers: a virtual and a physical address never mix (mypy sees to it). The only code that
turns one into another is :mod:`gdb_kprobe.system.paging`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, TypeVar

VirtAddr = NewType("VirtAddr", int)
"""An address in the kernel's (or the bare-metal guest's) address space."""

PhysAddr = NewType("PhysAddr", int)
"""A guest physical address."""

_A = TypeVar("_A", VirtAddr, PhysAddr)

PAGE_SIZE = 0x1000


def offset(addr: _A, count: int) -> _A:
    """Return *addr* moved by *count* bytes, modulo 2**64, of the same address kind."""
    return type(addr)((addr + count) & 0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """Half-open range of virtual addresses: *start* is in it, *end* is not."""

    start: VirtAddr
    end: VirtAddr

    def __post_init__(self) -> None:
        assert self.start <= self.end, f"{self.start:#x} is above {self.end:#x}"

    def __contains__(self, addr: int) -> bool:
        return self.start <= addr < self.end

    @property
    def size(self) -> int:
        return self.end - self.start

    def overlaps(self, other: AddressRange) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


TEXT_TYPES = "tTwW"
"""The types of symbols that are code."""


@dataclass(frozen=True, slots=True)
class ModuleLoad:
    """One load of a module of the guest's: of *name*, with its ``struct module`` at *addr*.

    *number* tells it from another load at the same address (the id of the directory that sysfs has of it).
    """

    name: str
    addr: VirtAddr
    number: int

    def __str__(self) -> str:
        return f"{self.name}@{self.addr:#x}#{self.number:x}"


@dataclass(frozen=True, slots=True)
class Symbol:
    """One line of the guest's symbol table.

    *type* is the letter of ``/proc/kallsyms`` (``T``/``t`` text, ``D``/``d`` data, ...); *module* is empty for the
    core kernel.
    """

    name: str
    addr: VirtAddr
    type: str
    module: str = ""

    @property
    def is_text(self) -> bool:
        return self.type in TEXT_TYPES

    def __str__(self) -> str:
        return f"{self.name} [{self.module}]" if self.module else self.name


class Rung(StrEnum):
    """How a probe is carried out, worst first (docs/internals/rungs.md)."""

    SINGLE_STEP = "single-step"
    BOOSTED = "boosted"
    OPTIMIZED = "optimized"


class Dispatch(StrEnum):
    """Who catches the int3 of a probe."""

    AUTO = "auto"
    """The guest where that is possible, else the stub."""
    GUEST = "guest"
    """A dispatcher in the guest; only hits that need the host stop the machine."""
    STUB = "stub"
    """The stub's breakpoint at the #BP entry: every hit stops the machine."""


class Boost(StrEnum):
    """Which instructions the boosted rung takes."""

    RELOCATE = "relocate"
    """All that can be relocated."""
    KERNEL = "kernel"
    """Only those that the guest's own kernel would boost, to compare."""


class Entry(StrEnum):
    """Where a probe on a function goes whose entry has a nop of the guest's ftrace."""

    BEHIND = "behind"
    """Behind the nop: the guest's tracers, kprobes and live patches of the function do not notice."""
    BORROW = "borrow"
    """On the nop, which the guest's ftrace leaves alone meanwhile."""


class Reason(StrEnum):
    """Why a probe, or a better rung of one, was refused. One member per rule.

    What is written under each is its entry in docs/reference/reasons.md: the rule, then what to do.
    """

    NO_SYMBOL = "no such symbol"
    """The guest's kallsyms has no function of that name. The hint has similar names; an inlined function has none of
    its own."""
    AMBIGUOUS_SYMBOL = "ambiguous symbol"
    """Several functions have the name. Name the one you mean by its address, or by `MODULE:SYMBOL`."""
    OFFSET_OUTSIDE_SYMBOL = "offset is outside the symbol"
    """The function is shorter than the offset. The hint has the offsets that are inside."""
    NOT_TEXT = "not kernel text"
    """The address is data, an address of user space, or of a module that is gone. Name an instruction of the kernel."""
    NOT_EXECUTABLE = "not mapped executable"
    """The page table maps the address without the right to execute. Take another function."""
    INIT_TEXT = "init text, freed after boot"
    """The kernel frees this code when it has booted; kallsyms lists it for ever. Take a function that stays."""
    NOT_A_BOUNDARY = "not an instruction boundary"
    """The address is inside an instruction. The detail has the boundaries on both sides, the hint the nearest one that
    can be probed."""
    UNDECODABLE = "cannot be decoded"
    """The function holds bytes that are no known instruction, so no boundary in it is certain. Take a caller or a
    callee."""
    NOINSTR = "noinstr text"
    """The kernel forbids probes in `.noinstr.text`, which runs where the kernel is not in order yet. Take a caller or
    a callee."""
    ENTRY_TEXT = "entry text"
    """The kernel forbids probes in `.entry.text`, the code of system calls, interrupts and exceptions. Take a callee.
    """
    KPROBES_TEXT = "kprobes text"
    """The kernel forbids probes in `.kprobes.text`, which its own kprobes use. Take a caller or a callee."""
    BLACKLISTED = "on the guest's kprobe blacklist"
    """The kernel's list of NOKPROBE_SYMBOL() has the function. Take a caller or a callee."""
    BP_PATH = "on the #BP path"
    """The #BP exception itself runs through this code: an int3 there would trap for ever. Take another function."""
    TEMPLATE = "code that the guest copies to elsewhere"
    """ftrace and kexec execute copies of this code, where a jump would lead astray. Take another function."""
    JUMP_LABEL = "jump label site"
    """The guest rewrites the place when it switches a static key. Take the next instruction."""
    STATIC_CALL = "static call site"
    """The guest rewrites the place when it redirects a static call. Take the next instruction."""
    STATIC_CALL_TRAMPOLINE = "static call trampoline"
    """The guest rewrites this jump when it redirects a static call. Probe the function that it leads to."""
    BUG_TABLE = "BUG or WARN site"
    """The kernel recognizes the `ud2` of a BUG() or WARN() by its address. Take the next instruction."""
    ALTERNATIVE = "SMP alternative site"
    """The guest patches the lock prefix when CPUs come and go. Take the next instruction."""
    EX_TABLE = "exception table instruction"
    """The kernel finds the fixup of a fault by the address of the instruction, which is executed nowhere else. The
    probe is single-stepped, or no jump's window holds the instruction."""
    LANDING_PAD = "where indirect branches land"
    """An `endbr64`, or what the kernel has sealed it with, is never replaced: with indirect branch tracking an
    indirect branch to anything else raises #CP. Take the instruction behind it."""
    FOREIGN_INT3 = "an int3 that is not ours"
    """A breakpoint instruction of the guest's own is there, or that of another debugger. Take another instruction."""
    GUEST_KPROBE = "a kprobe of the guest's own"
    """A kprobe of the guest's own has patched the place, or may turn into a jump over it, also while it is disabled.
    Remove it in the guest, or take another instruction."""
    PADDING = "padding between functions"
    """The bytes between functions are never executed. Take an instruction of a function."""
    FAR_TRANSFER = "far transfer"
    """The instruction loads CS together with RIP, or enters another mode, and hands on its own address, which must not
    be that of a slot. Take a neighbour."""
    SOFTWARE_INTERRUPT = "software interrupt"
    """The exception frame of the instruction would hold the address of a slot. Take a neighbour."""
    RAISES_UD = "raises #UD on purpose"
    """The instruction raises #UD on purpose, and the kernel tells its meaning by its address. Take a neighbour."""
    TRANSACTION = "begins a memory transaction"
    """`xbegin` begins a memory transaction, which an int3 or a jump to a slot would abort. Take a neighbour."""
    OPERAND_SIZE_BRANCH = "66-prefixed branch"
    """Processors of Intel and AMD disagree about a branch with the prefix 66. Take a neighbour."""
    RESERVED_OPCODE = "reserved opcode"
    """No processor defines the instruction. Take another one."""
    INTERRUPT_SHADOW = "interrupt shadow"
    """No interrupt comes between `sti; hlt` and its like, so the two instructions must not be parted. Take the
    instruction before them or behind them."""
    HALTS = "a step of it would not come back"
    """A step of `hlt` or `mwait` ends only with the next interrupt. The instruction runs in a slot: leave the
    post-handler away."""
    OUT_OF_REACH = "out of s32 reach of the region"
    """A displacement of 32 bits does not reach from the region to what the instruction refers to. Place the region
    within 2 GiB of the text (`region.virtual`)."""
    POLICY = "not allowed by the profile's policy"
    """The profile (`policy.rungs`), `set kprobe strategy` or `--dispatch stub` leaves the rung out."""
    KERNEL_BOOST = "not boostable by the kernel's rules"
    """With `policy.boost: kernel` only what the guest's own kernel boosts is boosted. `policy.boost: relocate` boosts
    the instruction."""
    NEEDS_SINGLE_STEP = "a post-handler needs the single step"
    """A post-handler runs right behind the instruction. A repeated one, or `pushf`, must be stepped in a copy of its
    own for that; or nothing may be stepped in this guest. Leave the post-handler away, or probe the next
    instruction."""
    REGION_FULL = "region is full"
    """No slot is free. Delete probes, or take a larger region: `region.size`, and `memmap=` on the guest's command
    line."""
    WINDOW_OUTSIDE = "the function ends within the jump's 5 bytes"
    """The function has fewer bytes left than a jump. The probe is an int3."""
    WINDOW_TARGET = "a branch goes into the jump's 5 bytes"
    """A branch leads to an instruction that the jump would hide. The probe is an int3."""
    WINDOW_CALL = "a call returns into the jump's 5 bytes"
    """A call in the jump's 5 bytes returns to an instruction that the jump would hide. The probe is an int3."""
    WINDOW_UNREACHED = "instructions of unknown use behind a jump"
    """Behind a jump or a return no instruction is executed in sequence, so what is there may be entered from anywhere.
    The probe is an int3."""
    LOOP_HEAD = "a loop goes back to where a probe on the function would be"
    """A loop goes back to the instruction behind the function's nop: a probe there would count rounds, not calls. Name
    `SYMBOL+OFFSET` to count the rounds, or have `policy.entry: borrow` in the profile."""
    INDIRECT_JUMP = "an indirect jump may go into the jump's 5 bytes"
    """The function jumps through a register or a table, whose targets are not all known. The probe is an int3."""
    WINDOW_UNKNOWN = "what else goes into the jump's 5 bytes is not known"
    """Not all that may enter the jump's 5 bytes can be read from this guest. The probe is an int3; an instruction of 5
    bytes or more gets a jump."""
    WINDOW_BUSY = "a vCPU or a task is within the jump's 5 bytes"
    """A vCPU is in the jump's 5 bytes, or a task will return there. The probe is an int3 until a stop at which none
    is."""
    PROBED_INSIDE = "another probe within the jump's 5 bytes"
    """The jump would hide the instruction of another probe. The probe is an int3 while the other one is armed."""
    BREAKPOINT_INSIDE = "a breakpoint within the jump's 5 bytes"
    """The jump would hide an instruction with a breakpoint of gdb. The probe is an int3 until the breakpoint is
    deleted."""
    STEPPED = "the user steps"
    """A step of yours may come to the probe, which has a post-handler. The probe is an int3 for that step."""
    NEEDS_HOST = "a hit needs the host"
    """Each hit calls a handler in Python, and only a #BP stops a hit of this guest. The probe is an int3."""
    TRACED = "the host is told of every hit"
    """`kprobe trace` or `on_hit` is told of each hit, and only a #BP stops a hit of this guest. The probe is an int3
    meanwhile."""
    FTRACE_BUSY = "the guest's ftrace uses the function's nop"
    """The call of a tracer of the guest's own is where the nop was. The hint has the instruction behind it."""

    @property
    def is_transient(self) -> bool:
        """It may not hold any more at the next stop: what was refused for it is tried again."""
        return self in _PASSING

    @property
    def may_pass(self) -> bool:
        """It may not hold any more when the probes of the place are others."""
        return self.is_transient or self is Reason.NEEDS_HOST


_PASSING = frozenset(
    {
        Reason.WINDOW_BUSY,
        Reason.PROBED_INSIDE,
        Reason.BREAKPOINT_INSIDE,
        Reason.STEPPED,
        Reason.TRACED,
        Reason.FTRACE_BUSY,
        Reason.GUEST_KPROBE,
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule said no: which, where, in what detail, and what the user can do about it."""

    reason: Reason
    addr: VirtAddr
    detail: str = ""
    hint: str = ""

    @property
    def text(self) -> str:
        """The reason, with the detail if there is one."""
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)

    def __str__(self) -> str:
        return f"{self.text} ({self.hint})" if self.hint else self.text


CpuId = NewType("CpuId", int)
"""A virtual CPU, numbered as the gdbstub numbers its threads (from 1)."""

# pt_regs order of the names the kernel's kprobe_events language uses, and the hardware name of each.
PT_REGS_NAMES: dict[str, str] = {
    "r15": "r15", "r14": "r14", "r13": "r13", "r12": "r12", "bp": "rbp", "bx": "rbx",
    "r11": "r11", "r10": "r10", "r9": "r9", "r8": "r8", "ax": "rax", "cx": "rcx",
    "dx": "rdx", "si": "rsi", "di": "rdi", "ip": "rip", "cs": "cs", "flags": "eflags",
    "sp": "rsp", "ss": "ss",
}  # fmt: skip

GENERAL_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags",
)  # fmt: skip
"""The registers, by hardware name, that a dispatch saves, shows to handlers and restores."""
