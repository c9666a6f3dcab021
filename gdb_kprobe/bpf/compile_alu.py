"""Arithmetic instructions of eBPF as those of x86-64."""

from __future__ import annotations

from typing import Final

from gdb_kprobe.bpf.frame import SCRATCH
from gdb_kprobe.bpf.insn import SRC_X, AluOp, BpfInsn, InsnClass
from gdb_kprobe.bpf.operands import Operand, Operands, RmOperand
from gdb_kprobe.bpf.verifier import Step
from gdb_kprobe.x86.assemble import Label, fits_s32
from gdb_kprobe.x86.emit import Cc, Gp, Op, Shift

GROUP: Final = {AluOp.ADD: Op.ADD, AluOp.SUB: Op.SUB, AluOp.AND: Op.AND, AluOp.OR: Op.OR, AluOp.XOR: Op.XOR}
_SHIFTS: Final = {AluOp.LSH: Shift.SHL, AluOp.RSH: Shift.SHR, AluOp.ARSH: Shift.SAR}


def alu(operands: Operands, insn: BpfInsn, step: Step, dst: Gp) -> None:
    """*insn*, whose result is not known, with the result in *dst*."""
    op = AluOp(insn.op & 0xF0)
    width = 8 if insn.cls is InsnClass.ALU64 else 4
    out = operands.out
    if op is AluOp.MOV:
        _mov(operands, insn, step, dst, width)
        return
    target = operands.operand(insn.dst, step)
    if op is AluOp.END:
        operands.into(dst, target)
        _swap(operands, insn, dst)
        return
    if op is AluOp.NEG:
        operands.start(dst, target, width)
        out.neg(dst, width)
        return
    source = operands.second(insn, step)
    if op in (AluOp.DIV, AluOp.MOD):
        _divide(operands, insn, target, source, dst, width)
        return
    if op in _SHIFTS:
        _shift(operands, _SHIFTS[op], target, source, dst, width)
        return
    if isinstance(source, int) and (width == 4 or fits_s32(source)):
        operands.start(dst, target, width)
        if op is AluOp.MUL:
            out.imul_imm(dst, dst, source, width)
        else:
            out.alu_imm(GROUP[op], dst, source, width)
        return
    rm = operands.as_rm(source, width)
    operands.start(dst, target, width)
    if op is AluOp.MUL:
        out.imul(dst, rm, width)
    else:
        out.alu(GROUP[op], dst, rm, width)


def _mov(operands: Operands, insn: BpfInsn, step: Step, dst: Gp, width: int) -> None:
    source = operands.operand(insn.src, step)
    if not insn.off:
        operands.into(dst, source, width)
        return
    narrow = insn.off // 8
    if isinstance(source, RmOperand) and source.width >= narrow:
        operands.out.movsx(dst, source.rm, narrow, width)
    else:
        operands.into(dst, source)
        operands.out.movsx(dst, dst, narrow, width)


def _swap(operands: Operands, insn: BpfInsn, register: Gp) -> None:
    out = operands.out
    if insn.cls is InsnClass.ALU and not insn.op & SRC_X:  # to little endian: only the width is cut
        if insn.imm == 16:
            out.movzx(register, register, 2)
        elif insn.imm == 32:
            out.mov(register, register, 4)
    elif insn.imm == 16:
        out.shift_imm(Shift.ROL, register, 8, 2)
        out.movzx(register, register, 2)
    else:
        out.bswap(register, insn.imm // 8)


def _shift(operands: Operands, kind: Shift, target: Operand, source: Operand, dst: Gp, width: int) -> None:
    """The count is taken modulo the width by the CPU as by eBPF. A count that is no constant must be in cl."""
    out = operands.out
    if isinstance(source, int):
        if count := source & (8 * width - 1):
            operands.start(dst, target, width)
            out.shift_imm(kind, dst, count, width)
        else:
            operands.into(dst, target, width)
        return
    if source.rm is Gp.RCX and dst is not Gp.RCX:
        operands.start(dst, target, width)
        out.shift_cl(kind, dst, width)
        return
    shifted = operands.scratch() if dst is Gp.RCX else dst
    operands.start(shifted, target, width)
    keep = operands.scratch() if dst is not Gp.RCX and operands.mapping.index(Gp.RCX) in operands.live else None
    if keep is not None:
        out.mov(keep, Gp.RCX, 8)
    if source.rm is not Gp.RCX:
        if source.width >= 4:
            out.mov(Gp.RCX, source.rm, 4)
        else:
            out.movzx(Gp.RCX, source.rm, source.width)
    out.shift_cl(kind, shifted, width)
    if keep is not None:
        out.mov(Gp.RCX, keep, 8)
    if shifted is not dst:
        out.mov(dst, shifted, 8)


def _divide(operands: Operands, insn: BpfInsn, target: Operand, source: Operand, dst: Gp, width: int) -> None:
    """Total, as the RFC has it: a quotient by 0 is 0, a remainder by 0 the dividend; by -1 nothing overflows."""
    out = operands.out
    modulo, signed = insn.op & 0xF0 == AluOp.MOD, bool(insn.off)
    # The operands may be in the scratch registers: the dividend in the first, the divisor in the first or second.
    high, low, divisor = SCRATCH
    operands.into(divisor, source, width)
    save_low = dst is not Gp.RAX and 0 in operands.live
    save_high = dst is not Gp.RDX and 3 in operands.live
    if save_low:
        out.mov(low, Gp.RAX, 8)
    operands.into(Gp.RAX, target, width)
    if save_high:
        out.mov(high, Gp.RDX, 8)
    zero, done = Label("division by zero"), Label("divided")
    result = Gp.RDX if modulo else Gp.RAX
    out.test(divisor, divisor, width)
    out.jcc(Cc.E, zero)
    if signed:
        plain = Label("no overflow")
        out.alu_imm(Op.CMP, divisor, -1, width)
        out.jcc(Cc.NE, plain)
        if modulo:
            out.mov_imm(Gp.RDX, 0)
        else:
            out.neg(Gp.RAX, width)
        out.jmp(done)
        out.asm.bind(plain)
        out.extend_rax(width)
    else:
        out.mov_imm(Gp.RDX, 0)
    out.div(divisor, width, signed=signed)
    out.jmp(done)
    out.asm.bind(zero)
    if modulo:
        out.mov(Gp.RDX, Gp.RAX, width)
    else:
        out.mov_imm(Gp.RAX, 0)
    out.asm.bind(done)
    out.mov(divisor, result, width)
    if save_low:
        out.mov(Gp.RAX, low, 8)
    if save_high:
        out.mov(Gp.RDX, high, 8)
    out.mov(dst, divisor, 8)
