"""The handler that counts: a counter, its enable word, and the probe's condition, as one eBPF program.

The counter's region, one for each probe, shared with the host::

    +0   u64  hits     counted here
    +8   u64  missed   counted by who could not run the handler
    +16  u32  enable   1: hits are counted, 0: they are not
"""

from __future__ import annotations

from typing import Final

from gdb_kprobe.bpf.asm import R0, R1, R2, Builder, Label
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Program, Size
from gdb_kprobe.handlers.condition import jump_unless
from gdb_kprobe.language.condition import Condition

COUNTER: Final = 0
"""The number of the counter's region in the program."""

HITS: Final = 0
MISSED: Final = 8
ENABLE: Final = 16
COUNTER_SIZE: Final = 24

REGIONS: Final = {COUNTER: COUNTER_SIZE}
"""The declaration that :func:`gdb_kprobe.bpf.check.check` wants."""


def lower(condition: Condition | None) -> Program:
    """The program that counts a hit if the probe is enabled and *condition* holds.

    Its only effect is one atomic increment of ``hits``.
    """
    out, end = Builder(), Label()
    out.load_region(R2, COUNTER)
    out.load(R0, R2, ENABLE, Size.W)
    if condition is None:
        # Adds the enable word. A branch would be dearer: QEMU's translations end at one, and another is to be entered.
        out.atomic(AluOp.ADD, R2, HITS, R0, Size.DW)
        out.exit()
        return out.finish()
    out.jump_if(JmpOp.JEQ, R0, 0, end)
    jump_unless(out, condition.expr, end)
    out.load_region(R1, COUNTER)
    out.mov(R2, 1)
    out.atomic(AluOp.ADD, R1, HITS, R2, Size.DW)
    out.bind(end)
    out.exit()
    return out.finish()
