"""The filter alone: whether a hit is one that the host is to see, as an eBPF program with the answer in r0.

It works on the probe's counter region (:mod:`gdb_kprobe.handlers.count`), and changes nothing there: the host counts
what it sees.
"""

from __future__ import annotations

from gdb_kprobe.bpf.asm import R0, R2, Builder, Label
from gdb_kprobe.bpf.insn import JmpOp, Program, Size
from gdb_kprobe.handlers.condition import jump_unless
from gdb_kprobe.handlers.count import COUNTER, ENABLE
from gdb_kprobe.language.condition import Condition


def lower(condition: Condition) -> Program:
    """The program that returns 1 if the probe is enabled and *condition* holds, else 0."""
    out, no = Builder(), Label()
    out.load_region(R2, COUNTER)
    out.load(R0, R2, ENABLE, Size.W)
    out.jump_if(JmpOp.JEQ, R0, 0, no)
    jump_unless(out, condition.expr, no)
    out.mov(R0, 1)
    out.exit()
    out.bind(no)
    out.mov(R0, 0)
    out.exit()
    return out.finish()
