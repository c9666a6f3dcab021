"""Code that does at another address what an instruction does at its own.

For the boosted rung: run at *slot*, the code of :func:`relocate` leaves registers, flags, memory and stack as the
instruction would have left them, and ends with RIP where the instruction would have left it. It uses no register, does
not touch the flags, and leaves no address of the slot behind: what a call pushes is the original return address. (An
x87 instruction leaves its address in the FPU's last-instruction pointer, which only ``fnstenv`` and ``fxsave`` show.)

The prefixes of a relative branch are not carried over: segment, rep, address size and REX mean nothing to it (``bnd``
did, on processors that still had MPX).
"""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import Reason, VirtAddr, offset
from gdb_kprobe.x86.assemble import (
    JMP_REL32_SIZE,
    Assembler,
    DisplacementError,
    Label,
    fits_s32,
    rel32,
)
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, Unhandled, classify

_JCC_REL32_SIZE = 6
_RSP = 4
_REP = b"\xf3"
_OPERAND_SIZE = b"\x66"


class RelocateError(KprobeError):
    """The instruction cannot be carried to the slot, for *reason*."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def relocated_size(insn: Insn) -> int:
    """How many bytes :func:`relocate` gives, wherever the slot is.

    :raises RelocateError: the instruction's family is not handled.
    """
    match _family(insn):
        case Family.NOP | Family.PLAIN | Family.RIP_RELATIVE | Family.REPEATED | Family.PUSH_FLAGS:
            return insn.length + JMP_REL32_SIZE
        case Family.JCC:
            return _JCC_REL32_SIZE + JMP_REL32_SIZE
        case Family.JMP:
            return JMP_REL32_SIZE
        case Family.CALL_REL:
            return _push_size(insn.end) + JMP_REL32_SIZE
        case Family.CALL_INDIRECT if _reads_stack_or_memory(insn):
            return insn.length + 3 + (9 if fits_s32(insn.end) else 16) + 1
        case Family.CALL_INDIRECT:
            return _push_size(insn.end) + insn.length
        case Family.JMP_INDIRECT | Family.RET:
            return insn.length
        case Family.LOOP:
            return insn.length + 2 * JMP_REL32_SIZE


def relocate(insn: Insn, slot: VirtAddr) -> bytes:
    """The code that stands in for *insn* when it is run at *slot*.

    :raises RelocateError: the family is not handled, or something that *insn* refers to is out of reach of *slot*.
    """
    asm = Assembler(slot)
    emit(asm, insn, return_to=insn.end, falls_to=insn.end)
    return asm.finish()


@dataclass(frozen=True, slots=True)
class StepCopy:
    """An instruction at *slot*, to be single-stepped there and put right by :mod:`gdb_kprobe.x86.step`.

    *code* begins with the copy, *length* bytes, and goes on with the way back: a vCPU that is not stepped, or that is
    left alone behind the step, does what the original does and leaves the slot by itself. (What a call pushes is the
    address of the way back.)

    *ends* are pairs: where a step can end, and where the original ends then. There are none for what loads RIP from a
    register or from memory: it ends where the original does.
    """

    insn: Insn
    slot: VirtAddr
    code: bytes
    length: int
    ends: tuple[tuple[VirtAddr, VirtAddr], ...]

    @property
    def behind(self) -> VirtAddr:
        """Where the copy ends and the way back begins."""
        return offset(self.slot, self.length)

    def original_end(self, rip: int) -> VirtAddr | None:
        """Where the original ends when a step of the copy ends at *rip*; ``None``: it does not end there."""
        return next((original for end, original in self.ends if end == rip), None)


def step_copy_size(insn: Insn) -> int:
    """How many bytes of code :func:`copy_for_step` gives, wherever the slot is.

    :raises RelocateError: the instruction's family is not handled.
    """
    match _family(insn):
        case Family.CALL_REL:
            return 2 * JMP_REL32_SIZE
        case Family.CALL_INDIRECT:
            return insn.length + JMP_REL32_SIZE
        case _:
            return relocated_size(insn)


def copy_for_step(insn: Insn, slot: VirtAddr) -> StepCopy:
    """The copy of *insn* that is single-stepped at *slot*: one instruction that does the same, then the way back.

    A relative branch goes to its own target; a call pushes the address behind the copy. ``pause`` becomes a nop: QEMU
    (target/i386, ``helper_pause``) leaves its loop there without the debug exception that ends a step, and goes on with
    the next instruction.

    :raises RelocateError: the family is not handled, something that *insn* refers to is out of reach of *slot*, or the
        instruction halts.
    """
    family = _family(insn)
    if insn.is_halt:
        # A step is made with interrupts held off: the processor would wait for ever, and the stub with it.
        raise RelocateError(Reason.HALTS, f"{insn} at {insn.addr:#x}")
    asm = Assembler(slot)
    try:
        match family:
            case Family.CALL_REL:
                assert insn.branch_target is not None
                asm.call_rel32(insn.branch_target)
                asm.jmp_rel32(insn.end)
            case Family.CALL_INDIRECT:
                asm.raw(_moved(insn, slot))
                asm.jmp_rel32(insn.end)
            case Family.NOP if insn.is_pause:
                asm.raw(insn.raw.replace(_REP, _OPERAND_SIZE))
                asm.jmp_rel32(insn.end)
            case _:
                _emit(asm, insn, return_to=insn.end, falls_to=insn.end)
    except DisplacementError as error:
        raise _out_of_reach(insn, error) from None
    length = {Family.JCC: _JCC_REL32_SIZE, Family.JMP: JMP_REL32_SIZE, Family.CALL_REL: JMP_REL32_SIZE}.get(
        family, insn.length
    )
    return StepCopy(insn, slot, asm.finish(), length, _step_ends(insn, family, offset(slot, length)))


def _step_ends(insn: Insn, family: Family, behind: VirtAddr) -> tuple[tuple[VirtAddr, VirtAddr], ...]:
    falls, target = (behind, insn.end), insn.branch_target
    match family:
        case Family.CALL_INDIRECT | Family.JMP_INDIRECT | Family.RET:
            return ()
        case Family.JMP | Family.CALL_REL:
            assert target is not None
            return ((target, target),)
        case Family.JCC:
            assert target is not None
            return (falls, (target, target))
        case Family.LOOP:
            assert target is not None
            return (falls, (offset(behind, JMP_REL32_SIZE), target))  # at the second jump of the way back
        case _:
            # Where QEMU must leave its loop to execute an instruction (with several vCPUs a locked one whose operand is
            # not aligned), it forgets that one step was asked for, and executes the jump back as well.
            return (falls, (insn.end, insn.end))


def _out_of_reach(insn: Insn, error: DisplacementError) -> RelocateError:
    return RelocateError(Reason.OUT_OF_REACH, f"{insn} at {insn.addr:#x}: {error.message}")


def _family(insn: Insn) -> Family:
    family = classify(insn)
    if isinstance(family, Unhandled):
        raise RelocateError(family.reason, family.detail)
    return family


def emit(asm: Assembler, insn: Insn, return_to: VirtAddr, falls_to: VirtAddr | None = None) -> None:
    """Emit what does the same as *insn*.

    :param return_to: what a call pushes.
    :param falls_to: where to go on when *insn* falls through; ``None``: to what is emitted next.
    :raises RelocateError: the family is not handled, or something that *insn* refers to is out of reach.
    """
    try:
        _emit(asm, insn, return_to, falls_to)
    except DisplacementError as error:
        raise _out_of_reach(insn, error) from None


def _emit(asm: Assembler, insn: Insn, return_to: VirtAddr, falls_to: VirtAddr | None) -> None:
    target = insn.branch_target
    match _family(insn):
        case Family.NOP | Family.PLAIN | Family.RIP_RELATIVE | Family.REPEATED | Family.PUSH_FLAGS:
            asm.raw(_moved(insn, asm.pc))
            if falls_to is not None:
                asm.jmp_rel32(falls_to)
        case Family.JCC:
            assert target is not None
            assert insn.condition is not None
            asm.jcc_rel32(insn.condition, target)
            if falls_to is not None:
                asm.jmp_rel32(falls_to)
        case Family.JMP:
            assert target is not None
            asm.jmp_rel32(target)
        case Family.CALL_REL:
            assert target is not None
            asm.push_imm64(return_to)
            asm.jmp_rel32(target)
        case Family.CALL_INDIRECT if _reads_stack_or_memory(insn):
            # The target is read first, as the call does: before RSP moves, before anything is stored, and so that a
            # fault leaves everything as it was. Then: the return address under it, and go there.
            asm.raw(_with_reg(_moved(insn, asm.pc), insn, 6))  # push r/m64
            asm.push_stack_top()
            asm.store_qword_at_rsp(8, return_to)
            asm.ret()
        case Family.CALL_INDIRECT:
            asm.push_imm64(return_to)
            asm.raw(_with_reg(insn.raw, insn, 4))  # jmp r64
        case Family.JMP_INDIRECT | Family.RET:
            asm.raw(_moved(insn, asm.pc))
        case Family.LOOP:
            # There is no long form: hop over the jump that is taken when the loop is left.
            assert target is not None
            taken, left = Label("taken"), Label("left")
            asm.raw(insn.raw[:-1] + bytes((JMP_REL32_SIZE,)))  # loop taken
            asm.jmp_rel32(left if falls_to is None else falls_to)
            asm.bind(taken)
            asm.jmp_rel32(target)
            asm.bind(left)


def _push_size(value: int) -> int:
    return 5 if fits_s32(value) else 13


def _reads_stack_or_memory(insn: Insn) -> bool:
    """The target of an indirect call is in memory, or is RSP itself: it must be taken before the push."""
    modrm = insn.modrm
    assert modrm is not None
    return insn.has_memory_operand or (modrm & 7 == _RSP and not insn.rex & 1)


def _with_reg(raw: bytes, insn: Insn, reg: int) -> bytes:
    """*raw* with another ModRM.reg, which in group 5 selects the instruction."""
    at = insn.encoding.opcode_offset + 1
    return raw[:at] + bytes((raw[at] & ~0x38 | reg << 3,)) + raw[at + 1 :]


def _moved(insn: Insn, slot: VirtAddr) -> bytes:
    """The bytes of *insn* for *slot*: the same length, the same RIP-relative operand.

    :raises DisplacementError: the operand is out of reach.
    """
    operand = insn.rip_target
    if operand is None or classify(insn) is Family.NOP:  # a nop's operand is never accessed
        return insn.raw
    at = insn.encoding.disp_offset
    end = offset(slot, insn.length)
    if 0x67 in insn.prefixes:
        # EIP-relative: the sum is cut to 32 bits, so that there is a displacement for every operand.
        displacement = (operand - end & 0xFFFF_FFFF).to_bytes(4, "little")
    else:
        displacement = rel32(insn.mnemonic, slot, end, operand)
    return insn.raw[:at] + displacement + insn.raw[at + 4 :]
