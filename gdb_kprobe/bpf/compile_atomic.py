"""Atomic instructions of eBPF as those of x86-64."""

from __future__ import annotations

from gdb_kprobe.bpf.check import Step
from gdb_kprobe.bpf.compile_alu import GROUP
from gdb_kprobe.bpf.frame import SCRATCH
from gdb_kprobe.bpf.insn import CMPXCHG, FETCH, XCHG, AluOp, BpfInsn, Size
from gdb_kprobe.bpf.places import Operand, Place, Places
from gdb_kprobe.x86.assemble import Label, fits_s32
from gdb_kprobe.x86.emit import At, Cc, Gp, Mem


def atomic(places: Places, insn: BpfInsn, step: Step) -> None:
    """*insn*; a fetch whose result is not read is none."""
    width = Size(insn.op & 0x18).width
    memory = places.memory(step.before.registers[insn.dst], insn.off)
    source = places.operand(insn.src, step)
    if insn.imm == CMPXCHG:
        _cmpxchg(places, memory, source, places.operand(0, step), width)
        return
    if insn.imm == XCHG:
        register = places.mapping[insn.src]
        places.into(register, source, width)
        places.out.xchg(memory, register, width)
        return
    op = AluOp(insn.imm & ~FETCH)
    if not (insn.imm & FETCH and insn.src in places.live):
        _update(places, op, memory, source, width)
    elif op is AluOp.ADD:
        register = places.mapping[insn.src]
        places.into(register, source, width)
        places.out.lock_xadd(memory, register, width)
    else:
        _fetch(places, op, memory, source, places.mapping[insn.src], width)


def _update(places: Places, op: AluOp, memory: Mem | At, source: Operand, width: int) -> None:
    if isinstance(source, int) and (width == 4 or fits_s32(source)):
        # Not inc or dec, which leave CF as it was: QEMU has to compute that first, by a call (gen_inc).
        places.out.alu_imm(GROUP[op], memory, source, width, lock=True)
    else:
        places.out.alu_store(GROUP[op], memory, places.as_register(source, width), width, lock=True)


def _cmpxchg(places: Places, memory: Mem | At, source: Operand, compared: Operand, width: int) -> None:
    register = places.as_register(source, width)
    if not (isinstance(compared, Place) and compared.rm is Gp.RAX and compared.width == 8):
        places.into(Gp.RAX, compared, width)
    places.out.lock_cmpxchg(memory, register, width)
    if width == 4:
        places.out.mov(Gp.RAX, Gp.RAX, 4)  # a success leaves the upper half


def _fetch(places: Places, op: AluOp, memory: Mem | At, source: Operand, dst: Gp, width: int) -> None:
    """What no x86 instruction does at once: try until no other CPU came between."""
    out = places.out
    new, keep, operand = SCRATCH
    places.into(operand, source, width)
    if dst is not Gp.RAX and 0 in places.live:
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
        if 0 in places.live:
            out.mov(Gp.RAX, keep, 8)
