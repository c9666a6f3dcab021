"""Puts eBPF programs together: a method for each kind of instruction, and labels for jumps."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from gdb_kprobe.bpf.insn import (
    CMPXCHG,
    FETCH,
    LD_IMM64,
    SRC_X,
    XCHG,
    AluOp,
    BpfInsn,
    InsnClass,
    JmpOp,
    LoadKind,
    Mode,
    Program,
    Size,
    invalid,
)


class Reg(IntEnum):
    """A register as an operand, so that it is not taken for a number."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


R0: Final = Reg.R0
R1: Final = Reg.R1
R2: Final = Reg.R2
R3: Final = Reg.R3
R4: Final = Reg.R4
R5: Final = Reg.R5
R6: Final = Reg.R6
R7: Final = Reg.R7
R8: Final = Reg.R8
R9: Final = Reg.R9
R10: Final = Reg.R10

_ALU_CLASS: Final = {32: InsnClass.ALU, 64: InsnClass.ALU64}
_JMP_CLASS: Final = {32: InsnClass.JMP32, 64: InsnClass.JMP}


class Label:
    """A place in the program, compared by identity."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot: int | None = None


class Builder:
    """Collects instructions; numbers that no instruction can hold are refused by an ``assert``."""

    def __init__(self) -> None:
        self._insns: list[BpfInsn] = []
        self._slots = 0
        self._jumps: list[tuple[int, int, Label]] = []

    def finish(self) -> Program:
        """The program; every label that was used must be bound by now."""
        for index, slot, label in self._jumps:
            assert label.slot is not None, f"the label that instruction {index} jumps to was never bound"
            insn = self._insns[index]
            self._insns[index] = BpfInsn(insn.op, insn.dst, insn.src, label.slot - slot - 1, insn.imm)
        for index, insn in enumerate(self._insns):
            assert invalid(insn) is None, f"instruction {index}: {invalid(insn)}"
        return tuple(self._insns)

    def bind(self, label: Label) -> None:
        """*label* is here."""
        assert label.slot is None, "a label is bound twice"
        label.slot = self._slots

    def _add(self, insn: BpfInsn) -> None:
        self._insns.append(insn)
        self._slots += insn.slots

    def _binary(self, op: int, dst: Reg, operand: Reg | int, off: int = 0) -> BpfInsn:
        if isinstance(operand, Reg):
            return BpfInsn(op | SRC_X, dst, operand, off)
        return BpfInsn(op, dst, off=off, imm=operand)

    def alu(self, op: AluOp, dst: Reg, operand: Reg | int, *, bits: int = 64, signed: bool = False) -> None:
        """``dst op= operand``; *signed* is for division and modulo."""
        self._add(self._binary(_ALU_CLASS[bits] | op, dst, operand, int(signed)))

    def neg(self, dst: Reg, *, bits: int = 64) -> None:
        self._add(BpfInsn(_ALU_CLASS[bits] | AluOp.NEG, dst))

    def mov(self, dst: Reg, operand: Reg | int, *, bits: int = 64) -> None:
        """A register or a signed 32-bit number."""
        self.alu(AluOp.MOV, dst, operand, bits=bits)

    def sign_extend(self, dst: Reg, src: Reg, width: int, *, bits: int = 64) -> None:
        """The low *width* bits (8, 16, 32) of *src*."""
        self._add(BpfInsn(_ALU_CLASS[bits] | AluOp.MOV | SRC_X, dst, src, width))

    def to_little(self, dst: Reg, width: int) -> None:
        self._add(BpfInsn(InsnClass.ALU | AluOp.END, dst, imm=width))

    def to_big(self, dst: Reg, width: int) -> None:
        self._add(BpfInsn(InsnClass.ALU | AluOp.END | SRC_X, dst, imm=width))

    def bswap(self, dst: Reg, width: int) -> None:
        self._add(BpfInsn(InsnClass.ALU64 | AluOp.END, dst, imm=width))

    def load_number(self, dst: Reg, value: int) -> None:
        """Any 64 bits, in the shorter of two forms."""
        value &= 0xFFFF_FFFF_FFFF_FFFF
        signed = value - (1 << 64) if value >> 63 else value
        if -0x8000_0000 <= signed <= 0x7FFF_FFFF:
            self.mov(dst, signed)
        else:
            self._add(BpfInsn(LD_IMM64, dst, LoadKind.NUMBER, imm=value))

    def load_region(self, dst: Reg, region: int, offset: int = 0) -> None:
        """The address of byte *offset* of the declared *region*."""
        assert 0 <= region < 1 << 32
        assert 0 <= offset < 1 << 32
        self._add(BpfInsn(LD_IMM64, dst, LoadKind.REGION, imm=offset << 32 | region))

    def load(self, dst: Reg, base: Reg, offset: int, size: Size, *, signed: bool = False) -> None:
        mode = Mode.MEMSX if signed else Mode.MEM
        self._add(BpfInsn(InsnClass.LDX | mode | size, dst, base, offset))

    def store(self, base: Reg, offset: int, operand: Reg | int, size: Size) -> None:
        if isinstance(operand, Reg):
            self._add(BpfInsn(InsnClass.STX | Mode.MEM | size, base, operand, offset))
        else:
            self._add(BpfInsn(InsnClass.ST | Mode.MEM | size, base, 0, offset, operand))

    def _atomic(self, base: Reg, offset: int, src: Reg, size: Size, what: int) -> None:
        self._add(BpfInsn(InsnClass.STX | Mode.ATOMIC | size, base, src, offset, what))

    def atomic(self, op: AluOp, base: Reg, offset: int, src: Reg, size: Size, *, fetch: bool = False) -> None:
        """``lock *(base + offset) op= src``, and *src* becomes the old value if that is fetched."""
        self._atomic(base, offset, src, size, op | (FETCH if fetch else 0))

    def xchg(self, base: Reg, offset: int, src: Reg, size: Size) -> None:
        self._atomic(base, offset, src, size, XCHG)

    def cmpxchg(self, base: Reg, offset: int, src: Reg, size: Size) -> None:
        """*src* is stored if memory holds r0; r0 becomes what it held."""
        self._atomic(base, offset, src, size, CMPXCHG)

    def jump(self, target: Label) -> None:
        self._jump(BpfInsn(InsnClass.JMP | JmpOp.JA), target)

    def jump_if(self, op: JmpOp, left: Reg, right: Reg | int, target: Label, *, bits: int = 64) -> None:
        self._jump(self._binary(_JMP_CLASS[bits] | op, left, right), target)

    def _jump(self, insn: BpfInsn, target: Label) -> None:
        self._jumps.append((len(self._insns), self._slots, target))
        self._add(insn)

    def call(self, helper: int) -> None:
        self._add(BpfInsn(InsnClass.JMP | JmpOp.CALL, imm=helper))

    def exit(self) -> None:
        self._add(BpfInsn(InsnClass.JMP | JmpOp.EXIT))
