"""Atomic instructions of eBPF as those of x86-64."""

from __future__ import annotations

from gdb_kprobe.bpf.compile_alu import GROUP
from gdb_kprobe.bpf.frame import SCRATCH
from gdb_kprobe.bpf.insn import CMPXCHG, FETCH, XCHG, AluOp, BpfInsn, Size
from gdb_kprobe.bpf.operands import Operand, Operands, RmOperand
from gdb_kprobe.bpf.verifier import Step
from gdb_kprobe.x86.assemble import Label, fits_s32
from gdb_kprobe.x86.emit import At, Cc, Gp, Mem


def atomic(operands: Operands, insn: BpfInsn, step: Step) -> None:
    """*insn*; a fetch whose result is not read is none."""
    width = Size(insn.op & 0x18).width
    memory = operands.memory(step.before.registers[insn.dst], insn.off)
    source = operands.operand(insn.src, step)
    if insn.imm == CMPXCHG:
        _cmpxchg(operands, memory, source, operands.operand(0, step), width)
        return
    if insn.imm == XCHG:
        register = operands.mapping[insn.src]
        operands.into(register, source, width)
        operands.out.xchg(memory, register, width)
        return
    op = AluOp(insn.imm & ~FETCH)
    if not (insn.imm & FETCH and insn.src in operands.live):
        _update(operands, op, memory, source, width)
    elif op is AluOp.ADD:
        register = operands.mapping[insn.src]
        operands.into(register, source, width)
        operands.out.lock_xadd(memory, register, width)
    else:
        _fetch(operands, op, memory, source, operands.mapping[insn.src], width)


def _update(operands: Operands, op: AluOp, memory: Mem | At, source: Operand, width: int) -> None:
    if isinstance(source, int) and (width == 4 or fits_s32(source)):
        # Not inc or dec, which leave CF as it was: QEMU has to compute that first, by a call (gen_inc).
        operands.out.alu_imm(GROUP[op], memory, source, width, lock=True)
    else:
        operands.out.alu_store(GROUP[op], memory, operands.as_register(source, width), width, lock=True)


def _cmpxchg(operands: Operands, memory: Mem | At, source: Operand, compared: Operand, width: int) -> None:
    register = operands.as_register(source, width)
    if not (isinstance(compared, RmOperand) and compared.rm is Gp.RAX and compared.width == 8):
        operands.into(Gp.RAX, compared, width)
    operands.out.lock_cmpxchg(memory, register, width)
    if width == 4:
        operands.out.mov(Gp.RAX, Gp.RAX, 4)  # a success leaves the upper half


def _fetch(operands: Operands, op: AluOp, memory: Mem | At, source: Operand, dst: Gp, width: int) -> None:
    """What no x86 instruction does at once: try until no other CPU came between."""
    out = operands.out
    new, keep, operand = SCRATCH
    operands.into(operand, source, width)
    if dst is not Gp.RAX and 0 in operands.live:
        out.mov(keep, Gp.RAX, 8)
    out.mov(Gp.RAX, memory, width)
    again = Label("again")
    out.asm.bind(again)
    out.mov(new, Gp.RAX, width)
    out.alu(GROUP[op], new, operand, width)
    out.lock_cmpxchg(memory, new, width)
    out.jcc(Cc.NE, again)
    if dst is not Gp.RAX:
        out.mov(dst, Gp.RAX, 8)
        if 0 in operands.live:
            out.mov(Gp.RAX, keep, 8)
