"""Bytes between functions: what compiler and linker put there so that the next function begins at a round address.

kallsyms has no sizes, so that padding counts as the end of the function in front of it. It is the instructions that do
nothing (int3, nops; zeros at the end of a module), up to the end, behind one that execution does not get past.
"""

from __future__ import annotations

from gdb_kprobe.kprobes.landing import is_landing_pad
from gdb_kprobe.kprobes.slots import INT3
from gdb_kprobe.model import Reason
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, Unhandled, classify

_ZEROS = b"\0\0"
_ENDING = (Reason.RAISES_UD, Reason.FAR_TRANSFER)


def is_fill(insn: Insn) -> bool:
    """Whether padding may consist of *insn*."""
    if insn.raw in (INT3, _ZEROS):
        return True
    return classify(insn) is Family.NOP and not is_landing_pad(insn.raw)


def may_end(insn: Insn) -> bool:
    """Whether padding may follow *insn*: a jump, a return, ``ud2``, or the call of something that does not return."""
    if not insn.falls_through or insn.is_call:
        return True
    family = classify(insn)
    return isinstance(family, Unhandled) and family.reason in _ENDING


def begins_padding(before: Insn | None, first: Insn) -> bool:
    """Whether a run of fill up to the function's end, of which *first* is the first, is padding behind *before*.

    *before* is ``None`` at the function's start: there only int3 and zeros are, for nops may be all of a function.
    """
    return first.raw in (INT3, _ZEROS) if before is None else may_end(before)
