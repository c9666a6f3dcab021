"""Which status flags and registers are dead at a place: whatever they hold, they are overwritten before they are read.

Code that is put in front of the place need not preserve what is dead there. All ways on from it are followed as far as
they are known, through direct jumps of both kinds, a bounded number of instructions in all. What is not settled by then
is live: behind calls, returns, indirect jumps, traps, system calls, and instructions that are not in the table of
:mod:`gdb_kprobe.x86.effects`. No calling convention is relied on. Compiled code leaves no flags to its caller or
callee, but inline assembly of a kernel does: it calls routines that answer in a flag (``this_cpu_cmpxchg16b_emu``: ZF)
and such that keep every register (paravirt calls), and the text does not tell which is which.

A fault or an interrupt on the way is no read: the frame saves RFLAGS, the registers are saved and restored, and the
instruction that was interrupted goes on with them. Only code that looks at the saved values sees a dead one changed:
an oops, a debugger, another probe. The fixup of an exception table is another matter. It is a way on that the text does
not show, so the caller's instructions must end at those that have one; and at text that may be other text later
(jump labels, static calls, the nop of ftrace), for the answer is used for as long as the probe is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.effects import EVERYTHING, REGISTERS, STATUS_FLAGS, Flag, effect_of, register_bit

MOST_INSNS: Final = 32

_NEVER_DEAD: Final = register_bit(REGISTERS.index("rsp")) | register_bit(REGISTERS.index("rbp"))
"""An interrupt pushes on the one, and a walk of the stack in it starts from the other."""
_GENERAL: Final = EVERYTHING & ~int(STATUS_FLAGS) & ~_NEVER_DEAD

InsnAt = Callable[[int], Insn | None]
"""The instruction at an address, or ``None`` where it is not known.

Only its bytes count: it may have been decoded for another address. ``{insn.addr: insn for insn in insns}.get`` is one.
"""


def dead_flags(start: int, insn_at: InsnAt, *, most: int = MOST_INSNS, as_processors_do: bool = False) -> Flag:
    """The status flags that are dead before the instruction at *start*.

    :param most: how many instructions are looked at, on all ways together.
    :param as_processors_do: take it that ``and``, ``or``, ``xor`` and ``test`` overwrite AF. The manual says that it is
        undefined behind them, so no program can rely on what it was; AF is cleared by processors and by QEMU. Without
        it all six are dead only where something adds, subtracts or compares.
    """
    return Flag(_dead(start, insn_at, int(STATUS_FLAGS), most, as_processors_do))


def are_flags_dead(start: int, insn_at: InsnAt, *, most: int = MOST_INSNS, as_processors_do: bool = False) -> bool:
    """Whether all of :func:`dead_flags` are."""
    return _dead(start, insn_at, int(STATUS_FLAGS), most, as_processors_do) == STATUS_FLAGS


def dead_registers(start: int, insn_at: InsnAt, *, most: int = MOST_INSNS) -> frozenset[str]:
    """The general registers, by their 64-bit names, that are dead before the instruction at *start*.

    Never RSP and RBP, on which those rely who interrupt the code.
    """
    return _names(_dead(start, insn_at, _GENERAL, most, False))


@lru_cache(maxsize=1024)
def _names(mask: int) -> frozenset[str]:
    return frozenset(name for number, name in enumerate(REGISTERS) if mask & register_bit(number))


def _dead(start: int, insn_at: InsnAt, asked: int, most: int, as_processors_do: bool) -> int:
    """The part of the mask *asked* that is dead."""
    live = 0
    seen: dict[int, int] = {}  # address -> what was followed from there already
    ways = [(start, asked)]
    while ways:
        at, pending = ways.pop()
        known = seen.get(at, 0)
        pending &= ~(live | known)
        if not pending:
            continue
        insn = insn_at(at) if most > 0 else None
        if insn is None:
            live |= pending
            continue
        most -= 1
        seen[at] = known | pending
        effect = effect_of(insn.raw)
        live |= pending & effect.reads
        pending &= ~(effect.reads | (effect.overwrites_in_fact if as_processors_do else effect.overwrites))
        if pending:
            if effect.reach is not None:
                ways.append((at + effect.reach, pending))
            if effect.falls_through:
                ways.append((at + len(insn.raw), pending))
    return asked & ~live
