"""Where compiled eBPF is put in line, and which x86 registers it has there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gdb_kprobe.bpf.value import MASK64
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.emit import Gp


@dataclass(frozen=True, slots=True)
class InDetour:
    """The code runs with the interrupted registers in the registers.

    :ivar ip: the probed address.
    :ivar pushed: bytes between the interrupted stack pointer and rsp where the code begins.
    :ivar saved: where, from rsp at the beginning, the surroundings keep what they restore themselves: hardware names to
        displacements. These registers are free. ``eflags`` must be here if the program reads it.
    """

    ip: VirtAddr
    pushed: int = 0
    saved: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InHandler:
    """The code runs in a C function: rdi is its ``struct pt_regs *`` and stays so, what a callee may change is free.

    :ivar ip: the probed address. In memory the int3 has left the address behind it.
    """

    ip: VirtAddr


Frame = InDetour | InHandler

_PLAIN: Final = (
    Gp.RAX, Gp.RDI, Gp.RSI, Gp.RDX, Gp.RCX, Gp.R8, Gp.RBX, Gp.R13, Gp.R14, Gp.R15,
)  # fmt: skip
_HANDLER: Final = (Gp.RAX, Gp.R12, *_PLAIN[2:])  # rdi is taken

SCRATCH: Final = (Gp.R11, Gp.R10, Gp.R9)
"""Registers that hold nothing between two instructions."""

ARGUMENTS: Final = (Gp.RDI, Gp.RSI, Gp.RDX, Gp.RCX, Gp.R8)
"""Of a C function (System V ABI), and of a helper."""

CALLEE_SAVED: Final = frozenset({Gp.RBX, Gp.RBP, Gp.R12, Gp.R13, Gp.R14, Gp.R15})

KERNEL_CONSTANTS: Final = {"cs": 0x10, "ss": 0x18, "orig_rax": MASK64}
"""What a struct pt_regs that is made in a detour holds (arch/x86/kernel/kprobes/opt.c)."""


def mapping(frame: Frame) -> tuple[Gp, ...]:
    """The x86 registers of r0 to r9. r10 has none: where the stack is is always known."""
    return _HANDLER if isinstance(frame, InHandler) else _PLAIN


def free(frame: Frame) -> frozenset[Gp]:
    """The registers that need not be saved."""
    if isinstance(frame, InHandler):
        return frozenset(Gp) - CALLEE_SAVED - {Gp.RDI}
    return frozenset(Gp[name.upper()] for name in frame.saved if name.upper() in Gp.__members__)
