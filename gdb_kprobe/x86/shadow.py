"""Instructions that must not be parted from the one that follows: those that hold interrupts off behind themselves.

``sti`` enables interrupts only behind the next instruction, so that ``sti; hlt`` cannot lose a wakeup, and ``mov ss``
holds them off until the stack pointer is loaded as well (Intel SDM vol. 3, 7.8.3 "Masking Exceptions and Interrupts
When Switching Stacks"; vol. 2, STI). An int3 between the two, or the jump out of a slot, takes the place of the second.
Everywhere else an interrupt that comes one instruction early does no harm.
"""

from __future__ import annotations

from gdb_kprobe.model import Reason
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Unhandled

_RSP = 4


def splits_shadow(previous: Insn | None, insn: Insn, following: Insn | None) -> Unhandled | None:
    """Why a probe on *insn* would part two instructions that belong together; ``None`` where it does not.

    *previous* and *following* are its neighbours in the text, ``None`` where there is none.
    """
    for first, second in ((previous, insn), (insn, following)):
        if first is not None and second is not None and _belong_together(first, second):
            return Unhandled(
                Reason.INTERRUPT_SHADOW, f"no interrupt may come between {first} at {first.addr:#x} and {second}"
            )
    return None


def may_shadow(insn: Insn) -> bool:
    """Whether *insn* may belong together with what follows: ``sti``, a move to a segment register."""
    return not insn.encoding.space and not insn.opcode_map and insn.opcode in (0xFB, 0x8E)


def _belong_together(first: Insn, second: Insn) -> bool:
    if not may_shadow(first):
        return False
    if first.opcode == 0xFB:  # sti
        return second.is_halt
    return first.opcode == 0x8E and first.reg == 2 and _loads_stack_pointer(second)


def _loads_stack_pointer(insn: Insn) -> bool:
    if insn.encoding.space or insn.opcode_map:
        return False
    base_is_rsp = insn.modrm is not None and insn.modrm >= 0xC0 and insn.modrm & 7 == _RSP and not insn.rex & 1
    match insn.opcode:
        case 0x8B | 0x8D:  # mov rsp, r/m; lea rsp
            return insn.reg == _RSP and not insn.rex & 4
        case 0x89 | 0xC7:  # mov rsp, r; mov rsp, imm32
            return base_is_rsp
        case 0x5C | 0xBC:  # pop rsp; mov rsp, imm64
            return not insn.rex & 1
        case _:
            return False
