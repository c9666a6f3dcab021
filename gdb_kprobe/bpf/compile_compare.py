"""Comparisons of eBPF as those of x86-64: on operands where they are, as narrow as they are."""

from __future__ import annotations

from typing import Final

from gdb_kprobe.bpf.insn import BpfInsn, InsnClass, JmpOp
from gdb_kprobe.bpf.operands import Operands, RmOperand
from gdb_kprobe.bpf.value import holds, to_signed
from gdb_kprobe.bpf.verifier import Step
from gdb_kprobe.x86.assemble import fits_s32
from gdb_kprobe.x86.emit import Cc, Gp, Op

_CONDITIONS: Final = {
    JmpOp.JEQ: Cc.E, JmpOp.JNE: Cc.NE, JmpOp.JGT: Cc.A, JmpOp.JGE: Cc.AE, JmpOp.JLT: Cc.B, JmpOp.JLE: Cc.BE,
    JmpOp.JSGT: Cc.G, JmpOp.JSGE: Cc.GE, JmpOp.JSLT: Cc.L, JmpOp.JSLE: Cc.LE, JmpOp.JSET: Cc.NE,
}  # fmt: skip
_UNSIGNED: Final = {Cc.G: Cc.A, Cc.GE: Cc.AE, Cc.L: Cc.B, Cc.LE: Cc.BE}
_MIRRORED: Final = {
    Cc.A: Cc.B, Cc.B: Cc.A, Cc.AE: Cc.BE, Cc.BE: Cc.AE, Cc.G: Cc.L, Cc.L: Cc.G, Cc.GE: Cc.LE, Cc.LE: Cc.GE,
}  # fmt: skip


def compare(operands: Operands, insn: BpfInsn, step: Step) -> Cc | bool:
    """Set the flags, and return the condition on which to jump; a bool if that is certain in this frame."""
    op = JmpOp(insn.op & 0xF0)
    width = 8 if insn.cls is InsnClass.JMP else 4
    condition = _CONDITIONS[op]
    left, right = operands.operand(insn.dst, step), operands.second(insn, step)
    if isinstance(left, int):
        if isinstance(right, int):
            return holds(op, left, right, 8 * width)
        left, right = right, left
        condition = _MIRRORED.get(condition, condition)
    if isinstance(right, int):
        if op is JmpOp.JSET:
            return _test_constant(operands, left, right, width)
        return _compare_constant(operands, left, right, width, condition)
    first, second = operands.as_rm(left, width), operands.as_rm(right, width)
    if op is JmpOp.JSET:
        if isinstance(second, Gp):
            operands.out.test(first, second, width)
        else:
            operands.out.test(second, operands.as_register(RmOperand(first, width, False), width), width)
    elif isinstance(first, Gp):
        operands.out.alu(Op.CMP, first, second, width)
    else:
        other = operands.as_register(RmOperand(second, width, False), width)
        operands.out.alu_store(Op.CMP, first, other, width)
    return condition


def _compare_constant(operands: Operands, left: RmOperand, constant: int, width: int, condition: Cc) -> Cc:
    constant &= (1 << 8 * width) - 1
    if left.width < width:
        low = constant & (1 << 8 * left.width) - 1
        extended = to_signed(low, 8 * left.width) & (1 << 8 * width) - 1 if left.signed else low
        if extended == constant:  # then the narrow values compare as the extended ones do
            condition = condition if left.signed else _UNSIGNED.get(condition, condition)
            width, constant = left.width, low
    rm = left.rm if left.width >= width else operands.as_rm(left, width)
    if constant == 0 and isinstance(rm, Gp):
        operands.out.test(rm, rm, width)
    elif width < 8 or fits_s32(constant):
        operands.out.alu_imm(Op.CMP, rm, constant, width)
    else:
        register = operands.scratch()
        operands.out.mov_imm(register, constant)
        operands.out.alu_store(Op.CMP, rm, register, width)
    return condition


def _test_constant(operands: Operands, left: RmOperand, mask: int, width: int) -> Cc | bool:
    mask &= (1 << 8 * width) - 1
    if left.width < width:
        low = mask & (1 << 8 * left.width) - 1
        if left.signed and low != mask:
            left = RmOperand(operands.as_rm(left, width), width, False)
        else:
            mask = low
    if mask == 0:
        return False
    widths = (1, 4, 8) if isinstance(left.rm, Gp) else (1, 2, 4, 8)
    narrow = next(w for w in widths if mask < 1 << 8 * w)
    if narrow < 8 or fits_s32(mask):
        operands.out.test_imm(left.rm, mask, narrow)
    else:
        register = operands.scratch()
        operands.out.mov_imm(register, mask)
        operands.out.test(left.rm, register, 8)
    return Cc.NE
