"""What the hits of one probe do, as one eBPF program: its condition, its effect, and the verdict in r0.

A probe that only counts has the effect, an increment of its counter, and CONTINUE. For one whose hits the host is to
see the program says HOST, and has no effect: the host counts what it handles, and what it does not is a miss.

The counter's region, one for each probe, shared with the host::

    +0   u64  hits     counted here
    +8   u64  missed   counted by who could not run the handler
    +16  u32  enable   1: hits are counted, 0: they are not
"""

from __future__ import annotations

from typing import Final

from gdb_kprobe.actions.condition import jump_unless
from gdb_kprobe.bpf.asm import R0, R1, R2, Builder, Label
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Program, Size
from gdb_kprobe.kprobes.action import Verdict
from gdb_kprobe.language.condition import Condition

COUNTER: Final = 0
"""The number of the counter's region in the program."""

HITS: Final = 0
MISSED: Final = 8
ENABLE: Final = 16
COUNTER_SIZE: Final = 24

REGIONS: Final = {COUNTER: COUNTER_SIZE}
"""The declaration that :func:`gdb_kprobe.bpf.verifier.check` wants."""


def lower(condition: Condition | None, verdict: Verdict = Verdict.CONTINUE) -> Program:
    """The program that says *verdict* of a hit if the probe is enabled and *condition* holds, else CONTINUE.

    Its only effect is one atomic increment of ``hits``, for such hits, where *verdict* is CONTINUE.
    """
    out, end = Builder(), Label()
    out.load_region(R2, COUNTER)
    out.load(R0, R2, ENABLE, Size.W)
    if condition is None and verdict is Verdict.CONTINUE:
        # Adds the enable word. A branch would be dearer: QEMU's translations end at one, and another is to be entered.
        out.atomic(AluOp.ADD, R2, HITS, R0, Size.DW)
        out.mov(R0, Verdict.CONTINUE)
        out.exit()
        return out.finish()
    out.jump_if(JmpOp.JEQ, R0, 0, end)
    if condition is not None:
        jump_unless(out, condition.expr, end)
    if verdict is Verdict.CONTINUE:
        out.load_region(R1, COUNTER)
        out.mov(R2, 1)
        out.atomic(AluOp.ADD, R1, HITS, R2, Size.DW)
    else:
        out.mov(R0, verdict)
        out.exit()
    out.bind(end)
    out.mov(R0, Verdict.CONTINUE)
    out.exit()
    return out.finish()
