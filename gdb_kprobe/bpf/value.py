"""What is known of a register before a program runs, and the arithmetic on it.

The checker proves accesses with it, and the JIT leaves out what it makes superfluous. Of numbers it knows constants and
plain (parts of) fields of the context; of pointers everything, for only constants are added to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.bpf.insn import SRC_X, AluOp, BpfInsn, InsnClass, JmpOp

MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Number:
    """A constant, unsigned, 64 bits."""

    value: int


@dataclass(frozen=True, slots=True)
class Field:
    """The low *width* bytes of a register of the context (by hardware name), extended to 64 bits by sign or zeros."""

    name: str
    width: int
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number that is known only when the program runs."""


@dataclass(frozen=True, slots=True)
class ContextPointer:
    offset: int


@dataclass(frozen=True, slots=True)
class StackPointer:
    """*offset* is from the end of the stack, so that what lies in it is negative."""

    offset: int


@dataclass(frozen=True, slots=True)
class RegionPointer:
    region: int
    offset: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The register must not be read; *why* completes "r3 ..."."""

    why: str


Pointer = ContextPointer | StackPointer | RegionPointer
Value = Number | Field | Scalar | Pointer | Unreadable


def is_number(value: Value) -> bool:
    return isinstance(value, Number | Field | Scalar)


def merge(left: Value, right: Value) -> Value:
    """What holds of a register that is *left* on one path and *right* on another."""
    if left == right:
        return left
    if is_number(left) and is_number(right):
        return Scalar()
    for value in (left, right):
        if isinstance(value, Unreadable):
            return value
    return Unreadable("does not point to the same place on all paths")


def to_signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def arithmetic(insn: BpfInsn, dst: Value, src: Value) -> Number | Field | Scalar:
    """What an arithmetic *insn* makes of numbers; *src* is its second operand, register or immediate."""
    op, bits = AluOp(insn.op & 0xF0), 64 if insn.cls is InsnClass.ALU64 else 32
    if isinstance(src, Field) and op is AluOp.MOV:
        return _moved_field(src, insn.off or 64, bits, extend=bool(insn.off))
    if isinstance(dst, Field) and isinstance(src, Number) and op is AluOp.AND:
        width = {0xFF: 1, 0xFFFF: 2, MASK32: 4}.get(src.value & (MASK64 if bits == 64 else MASK32))
        return Field(dst.name, width) if width is not None and width <= dst.width else Scalar()
    if op is AluOp.MOV and isinstance(src, Number):
        moved = to_signed(src.value, insn.off) if insn.off else src.value
        return Number(moved & (MASK64 if bits == 64 else MASK32))
    if isinstance(dst, Number) and isinstance(src, Number) and not (op is AluOp.END and insn.op & SRC_X):
        return _folded(op, dst.value, src.value, bits)
    return Scalar()


def _moved_field(field: Field, width: int, bits: int, *, extend: bool) -> Field | Scalar:
    """A field after a move of its low *width* bits, *extend*-ed by sign, to *bits* bits."""
    if not extend:
        if bits == 64:
            return field
        if field.width >= 4:
            return Field(field.name, 4)
        return Scalar() if field.signed else field
    if bits == 64 and width <= 8 * field.width:
        return Field(field.name, width // 8, signed=True)
    return Scalar()


def _folded(op: AluOp, left: int, right: int, bits: int) -> Number | Scalar:
    """The constants that filters and addresses are made of; the others are not computed at run time."""
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    count = right & (bits - 1)
    match op:
        case AluOp.ADD:
            value = left + right
        case AluOp.SUB:
            value = left - right
        case AluOp.MUL:
            value = left * right
        case AluOp.OR:
            value = left | right
        case AluOp.AND:
            value = left & right
        case AluOp.XOR:
            value = left ^ right
        case AluOp.LSH:
            value = left << count
        case AluOp.RSH:
            value = left >> count
        case AluOp.ARSH:
            value = to_signed(left, bits) >> count
        case AluOp.NEG:
            value = -left
        case _:
            return Scalar()
    return Number(value & mask)


def holds(op: JmpOp, left: int, right: int, bits: int) -> bool:
    """Whether a conditional jump of *bits* bits is taken for these operands."""
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    signed_left, signed_right = to_signed(left, bits), to_signed(right, bits)
    return {
        JmpOp.JEQ: left == right,
        JmpOp.JNE: left != right,
        JmpOp.JGT: left > right,
        JmpOp.JGE: left >= right,
        JmpOp.JLT: left < right,
        JmpOp.JLE: left <= right,
        JmpOp.JSET: bool(left & right),
        JmpOp.JSGT: signed_left > signed_right,
        JmpOp.JSGE: signed_left >= signed_right,
        JmpOp.JSLT: signed_left < signed_right,
        JmpOp.JSLE: signed_left <= signed_right,
    }[op]
