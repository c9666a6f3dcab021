"""The values that every layer speaks: addresses, symbols, registers, refusals.

Addresses are not plain integers: a virtual and a physical address never mix (mypy sees to it). The only code that
turns one into another is :mod:`gdb_kprobe.linux.paging`.
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
    """How a probe is carried out, worst first (docs/architecture.md, "the ladder")."""

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
    """Why a probe, or a better rung of one, was refused. One member per rule."""

    NO_SYMBOL = "no such symbol"
    AMBIGUOUS_SYMBOL = "ambiguous symbol"
    OFFSET_OUTSIDE_SYMBOL = "offset is outside the symbol"
    NOT_TEXT = "not kernel text"
    NOT_EXECUTABLE = "not mapped executable"
    INIT_TEXT = "init text, freed after boot"
    NOT_A_BOUNDARY = "not an instruction boundary"
    UNDECODABLE = "cannot be decoded"
    NOINSTR = "noinstr text"
    ENTRY_TEXT = "entry text"
    KPROBES_TEXT = "kprobes text"
    BLACKLISTED = "on the guest's kprobe blacklist"
    BP_PATH = "on the #BP path"
    TEMPLATE = "code that the guest copies to elsewhere"
    JUMP_LABEL = "jump label site"
    STATIC_CALL = "static call site"
    STATIC_CALL_TRAMPOLINE = "static call trampoline"
    BUG_TABLE = "BUG or WARN site"
    ALTERNATIVE = "SMP alternative site"
    EX_TABLE = "exception table instruction"
    LANDING_PAD = "where indirect branches land"
    FOREIGN_INT3 = "an int3 that is not ours"
    GUEST_KPROBE = "a kprobe of the guest's own"
    PADDING = "padding between functions"
    ALREADY_PROBED = "already probed"
    FAR_TRANSFER = "far transfer"
    SOFTWARE_INTERRUPT = "software interrupt"
    RAISES_UD = "raises #UD on purpose"
    TRANSACTION = "begins a memory transaction"
    OPERAND_SIZE_BRANCH = "66-prefixed branch"
    RESERVED_OPCODE = "reserved opcode"
    INTERRUPT_SHADOW = "interrupt shadow"
    HALTS = "a step of it would not come back"
    OUT_OF_REACH = "out of s32 reach of the region"
    POLICY = "not allowed by the profile's policy"
    KERNEL_BOOST = "not boostable by the kernel's rules"
    NEEDS_SINGLE_STEP = "a post-handler needs the single step"
    REGION_FULL = "region is full"
    WINDOW_OUTSIDE = "the function ends within the jump's 5 bytes"
    WINDOW_TARGET = "a branch goes into the jump's 5 bytes"
    WINDOW_CALL = "a call returns into the jump's 5 bytes"
    WINDOW_UNREACHED = "instructions of unknown use behind a jump"
    LOOP_HEAD = "a loop goes back to where a probe on the function would be"
    INDIRECT_JUMP = "an indirect jump may go into the jump's 5 bytes"
    WINDOW_UNKNOWN = "nobody says what else goes into the jump's 5 bytes"
    WINDOW_BUSY = "somebody is within the jump's 5 bytes"
    PROBED_INSIDE = "another probe within the jump's 5 bytes"
    BREAKPOINT_INSIDE = "a breakpoint within the jump's 5 bytes"
    NEEDS_HOST = "a hit needs the host"
    TRACED = "the host is told of every hit"
    FTRACE_BUSY = "the guest's ftrace uses the function's nop"

    @property
    def passes(self) -> bool:
        """It may not hold any more at the next stop: what was refused for it is tried again."""
        return self in _PASSING

    @property
    def may_pass(self) -> bool:
        """It may not hold any more when the probes of the place are others."""
        return self.passes or self is Reason.NEEDS_HOST


_PASSING = frozenset(
    {
        Reason.WINDOW_BUSY,
        Reason.PROBED_INSIDE,
        Reason.BREAKPOINT_INSIDE,
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
