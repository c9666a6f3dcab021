"""The nodes of a condition, and what each of them means.

The arithmetic is C's on a 64-bit machine, made total: every value is 64 bits and either signed or unsigned; registers
are unsigned; a number is signed when it fits; an operation on an unsigned and a signed value is unsigned; comparisons
and logic give a signed 0 or 1. A shift uses the low six bits of its count, as the CPU and eBPF do, and takes its sign
from its left side alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

BITS = 64
_MASK = (1 << BITS) - 1


class UnaryOp(StrEnum):
    NOT = "!"
    INVERT = "~"
    NEGATE = "-"
    PLUS = "+"


class BinaryOp(StrEnum):
    OR_ELSE = "||"
    AND_THEN = "&&"
    OR = "|"
    XOR = "^"
    AND = "&"
    EQ = "=="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    SHL = "<<"
    SHR = ">>"
    ADD = "+"
    SUB = "-"


_COMPARISONS: dict[BinaryOp, Callable[[int, int], bool]] = {
    BinaryOp.EQ: lambda a, b: a == b,
    BinaryOp.NE: lambda a, b: a != b,
    BinaryOp.LT: lambda a, b: a < b,
    BinaryOp.LE: lambda a, b: a <= b,
    BinaryOp.GT: lambda a, b: a > b,
    BinaryOp.GE: lambda a, b: a >= b,
}

_ARITHMETIC: dict[BinaryOp, Callable[[int, int], int]] = {
    BinaryOp.OR: lambda a, b: a | b,
    BinaryOp.XOR: lambda a, b: a ^ b,
    BinaryOp.AND: lambda a, b: a & b,
    BinaryOp.ADD: lambda a, b: a + b,
    BinaryOp.SUB: lambda a, b: a - b,
}


@dataclass(frozen=True, slots=True)
class Number:
    """A constant, 0 to 2**64 - 1 (a minus sign is an operation on it)."""

    value: int

    @property
    def is_signed(self) -> bool:
        return self.value >> (BITS - 1) == 0


@dataclass(frozen=True, slots=True)
class Register:
    """The 64 bits of a register, by its pt_regs name."""

    name: str

    @property
    def is_signed(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Cast:
    """``s32(x)``: the low *bits* of *operand*, extended to 64 by sign or by zeros."""

    operand: Expr
    bits: int
    is_signed: bool


@dataclass(frozen=True, slots=True)
class Unary:
    op: UnaryOp
    operand: Expr

    @property
    def is_signed(self) -> bool:
        return self.op is UnaryOp.NOT or self.operand.is_signed


@dataclass(frozen=True, slots=True)
class Binary:
    op: BinaryOp
    left: Expr
    right: Expr

    @property
    def is_signed(self) -> bool:
        match self.op:
            case BinaryOp.SHL | BinaryOp.SHR:
                return self.left.is_signed
            case BinaryOp.OR | BinaryOp.XOR | BinaryOp.AND | BinaryOp.ADD | BinaryOp.SUB:
                return self.left.is_signed and self.right.is_signed
            case _:
                return True


Expr = Number | Register | Cast | Unary | Binary


def registers_of(expr: Expr) -> frozenset[str]:
    """Return the pt_regs names that *expr* reads."""
    match expr:
        case Number():
            return frozenset()
        case Register():
            return frozenset({expr.name})
        case Cast() | Unary():
            return registers_of(expr.operand)
        case Binary():
            return registers_of(expr.left) | registers_of(expr.right)
        case _:
            assert_never(expr)


def evaluate(expr: Expr, registers: Mapping[str, int]) -> int:
    """Return the value of *expr* in its own signedness: -2**63 .. 2**63 - 1, or 0 .. 2**64 - 1.

    :param registers: value by pt_regs name, at least those of :func:`registers_of`.
    """
    match expr:
        case Number():
            return expr.value
        case Register():
            return registers[expr.name] & _MASK
        case Cast():
            return _wrap(evaluate(expr.operand, registers), expr.bits, expr.is_signed)
        case Unary():
            return _unary(expr, evaluate(expr.operand, registers))
        case Binary(BinaryOp.OR_ELSE):
            return int(bool(evaluate(expr.left, registers) or evaluate(expr.right, registers)))
        case Binary(BinaryOp.AND_THEN):
            return int(bool(evaluate(expr.left, registers) and evaluate(expr.right, registers)))
        case Binary():
            return _binary(expr, evaluate(expr.left, registers), evaluate(expr.right, registers))
        case _:
            assert_never(expr)


def _unary(expr: Unary, value: int) -> int:
    match expr.op:
        case UnaryOp.NOT:
            return int(value == 0)
        case UnaryOp.INVERT:
            return _wrap(~value, BITS, expr.is_signed)
        case UnaryOp.NEGATE:
            return _wrap(-value, BITS, expr.is_signed)
        case UnaryOp.PLUS:
            return value
        case _:
            assert_never(expr.op)


def _binary(expr: Binary, left: int, right: int) -> int:
    if expr.op is BinaryOp.SHL:
        return _wrap(left << (right & (BITS - 1)), BITS, expr.is_signed)
    if expr.op is BinaryOp.SHR:
        return left >> (right & (BITS - 1))
    signed = expr.left.is_signed and expr.right.is_signed
    left, right = _wrap(left, BITS, signed), _wrap(right, BITS, signed)
    if expr.op in _COMPARISONS:
        return int(_COMPARISONS[expr.op](left, right))
    return _wrap(_ARITHMETIC[expr.op](left, right), BITS, signed)


def _wrap(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
