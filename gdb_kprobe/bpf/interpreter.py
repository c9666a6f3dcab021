"""Executes eBPF programs on values of Python: what a program means, written from RFC 9669 and nothing else.

It is the oracle for the JIT, and shares with it only the fields of an instruction. Pointers are numbers here: each
piece of memory has an address of its own, far from all others, and an access outside of them is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
)
from gdb_kprobe.errors import KprobeError

STACK_SIZE: Final = 512
_STRIDE: Final = 1 << 32

Call = Callable[[int, int, int, int, int], int]
"""A helper: r1-r5 to r0."""


class BpfRunError(KprobeError):
    """A program did what only an unchecked one can do."""


@dataclass
class Machine:
    """What a program runs on. *context* is read-only bytes at r1; regions are changed in place."""

    context: bytes = b""
    regions: Mapping[int, bytearray] = field(default_factory=dict)
    helpers: Mapping[int, Call] = field(default_factory=dict)

    def run(self, program: Program, limit: int = 1 << 20) -> int:
        """Execute *program* and return r0.

        :raises BpfRunError: an access outside of all memory, a register or helper that is not there, or no end within
            *limit* instructions.
        """
        return _Run(self, program).run(limit)


class _Run:
    def __init__(self, machine: Machine, program: Program) -> None:
        self.machine = machine
        self.memory: dict[int, bytearray] = {
            _STRIDE: bytearray(machine.context),
            2 * _STRIDE: bytearray(STACK_SIZE),
            **{(3 + number) * _STRIDE: data for number, data in machine.regions.items()},
        }
        self.registers: list[int | None] = [None] * 11
        self.registers[1], self.registers[10] = _STRIDE, 2 * _STRIDE + STACK_SIZE
        self.at: dict[int, BpfInsn] = {}
        slot = 0
        for insn in program:
            self.at[slot] = insn
            slot += insn.slots

    def run(self, limit: int) -> int:
        slot = 0
        for _ in range(limit):
            insn = self.at.get(slot)
            if insn is None:
                raise BpfRunError(f"no eBPF instruction begins at {slot}")
            if insn.op == InsnClass.JMP | JmpOp.EXIT:
                return self.registers[0] or 0
            slot += insn.slots + self.execute(insn)
        raise BpfRunError(f"no end within {limit} eBPF instructions")

    def get(self, number: int) -> int:
        value = self.registers[number]
        if value is None:
            raise BpfRunError(f"r{number} was never written")
        return value

    def set(self, number: int, value: int) -> None:
        self.registers[number] = value & 0xFFFF_FFFF_FFFF_FFFF

    def execute(self, insn: BpfInsn) -> int:
        """Execute one instruction, and return how many slots it jumps."""
        match insn.cls:
            case InsnClass.ALU:
                self.set(insn.dst, self.alu(insn, 32))
            case InsnClass.ALU64:
                self.set(insn.dst, self.alu(insn, 64))
            case InsnClass.JMP:
                return self.jump(insn, 64)
            case InsnClass.JMP32:
                return self.jump(insn, 32)
            case InsnClass.LD:
                assert insn.op == LD_IMM64
                if insn.src == LoadKind.REGION:
                    self.set(insn.dst, (3 + insn.imm % _STRIDE) * _STRIDE + insn.imm // _STRIDE)
                else:
                    self.set(insn.dst, insn.imm)
            case InsnClass.LDX:
                width = Size(insn.op & 0x18).width
                memory, start = self.place(self.get(insn.src) + insn.off, width)
                signed = insn.op & 0xE0 == Mode.MEMSX
                self.set(insn.dst, int.from_bytes(memory[start : start + width], "little", signed=signed))
            case InsnClass.ST:
                self.store(insn, insn.imm)
            case InsnClass.STX if insn.op & 0xE0 == Mode.ATOMIC:
                self.atomic(insn)
            case InsnClass.STX:
                self.store(insn, self.get(insn.src))
        return 0

    # Section 4.1

    def alu(self, insn: BpfInsn, bits: int) -> int:
        """The result, modulo 2**bits, and thus zero-extended."""
        op = AluOp(insn.op & 0xF0)
        if op is AluOp.END:
            return self.swap(insn)
        modulus = 1 << bits
        source = (self.get(insn.src) if insn.op & SRC_X else insn.imm) % modulus
        if op is AluOp.MOV:
            return (_signed(source, insn.off) if insn.off else source) % modulus
        dst = self.get(insn.dst) % modulus
        if op in (AluOp.DIV, AluOp.MOD):
            return self.divide(op, dst, source, bits, signed=insn.off == 1) % modulus
        results: dict[AluOp, Callable[[], int]] = {
            AluOp.ADD: lambda: dst + source,
            AluOp.SUB: lambda: dst - source,
            AluOp.MUL: lambda: dst * source,
            AluOp.OR: lambda: dst | source,
            AluOp.AND: lambda: dst & source,
            AluOp.XOR: lambda: dst ^ source,
            AluOp.LSH: lambda: dst << source % bits,
            AluOp.RSH: lambda: dst >> source % bits,
            AluOp.ARSH: lambda: _signed(dst, bits) >> source % bits,
            AluOp.NEG: lambda: -dst,
        }
        return results[op]() % modulus

    def divide(self, op: AluOp, dst: int, source: int, bits: int, *, signed: bool) -> int:
        """Truncating division. By 0 the quotient is 0, the remainder the dividend."""
        if source == 0:
            return 0 if op is AluOp.DIV else dst
        if signed:
            dst, source = _signed(dst, bits), _signed(source, bits)
        quotient = abs(dst) // abs(source)
        if (dst < 0) != (source < 0):
            quotient = -quotient
        return quotient if op is AluOp.DIV else dst - quotient * source

    # Section 4.2

    def swap(self, insn: BpfInsn) -> int:
        low = (self.get(insn.dst) % (1 << insn.imm)).to_bytes(insn.imm // 8, "little")
        to_little = insn.cls is InsnClass.ALU and not insn.op & SRC_X
        return int.from_bytes(low, "little" if to_little else "big")

    # Section 4.3

    def jump(self, insn: BpfInsn, bits: int) -> int:
        op = JmpOp(insn.op & 0xF0)
        if op is JmpOp.JA:
            return insn.off if bits == 64 else insn.imm
        if op is JmpOp.CALL:
            self.call(insn.imm)
            return 0
        left = self.get(insn.dst) % (1 << bits)
        right = (self.get(insn.src) if insn.op & SRC_X else insn.imm) % (1 << bits)
        if op in (JmpOp.JSGT, JmpOp.JSGE, JmpOp.JSLT, JmpOp.JSLE):
            left, right = _signed(left, bits), _signed(right, bits)
        match op:
            case JmpOp.JEQ:
                holds = left == right
            case JmpOp.JNE:
                holds = left != right
            case JmpOp.JSET:
                holds = left & right != 0
            case JmpOp.JGT | JmpOp.JSGT:
                holds = left > right
            case JmpOp.JGE | JmpOp.JSGE:
                holds = left >= right
            case JmpOp.JLT | JmpOp.JSLT:
                holds = left < right
            case _:
                holds = left <= right
        return insn.off if holds else 0

    def call(self, number: int) -> None:
        helper = self.machine.helpers.get(number)
        if helper is None:
            raise BpfRunError(f"there is no eBPF helper {number}")
        arguments = [value or 0 for value in self.registers[1:6]]
        self.registers[1:6] = [None] * 5
        self.set(0, helper(*arguments))

    # Section 5

    def place(self, address: int, width: int) -> tuple[bytearray, int]:
        start = address % _STRIDE
        base = address - start
        memory = self.memory.get(base)
        if memory is None or start + width > len(memory):
            raise BpfRunError(f"the eBPF program accesses {width} bytes at {address:#x}, where nothing is")
        return memory, start

    def store(self, insn: BpfInsn, value: int) -> None:
        width = Size(insn.op & 0x18).width
        memory, start = self.place(self.get(insn.dst) + insn.off, width)
        memory[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, "little")

    def atomic(self, insn: BpfInsn) -> None:
        """Section 5.3. Nothing else runs meanwhile, so that each of them is atomic."""
        width = Size(insn.op & 0x18).width
        modulus = 1 << 8 * width
        memory, start = self.place(self.get(insn.dst) + insn.off, width)
        old = int.from_bytes(memory[start : start + width], "little")
        source = self.get(insn.src) % modulus
        if insn.imm == CMPXCHG:
            new = source if self.get(0) % modulus == old else old
            self.set(0, old)
        elif insn.imm == XCHG:
            new = source
            self.set(insn.src, old)
        else:
            match AluOp(insn.imm & ~FETCH):
                case AluOp.ADD:
                    new = (old + source) % modulus
                case AluOp.OR:
                    new = old | source
                case AluOp.AND:
                    new = old & source
                case _:
                    new = old ^ source
            if insn.imm & FETCH:
                self.set(insn.src, old)
        memory[start : start + width] = new.to_bytes(width, "little")


def _signed(value: int, bits: int) -> int:
    """The low *bits* of *value* as a signed number."""
    value %= 1 << bits
    return value - (1 << bits) if value >= 1 << (bits - 1) else value
