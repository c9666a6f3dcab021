"""Conditions to eBPF: what :func:`gdb_kprobe.language.expression.evaluate` says, as instructions.

Values are 64 bits in registers; whether a value is signed is known here, and decides which comparison, shift or
extension is emitted. Where an expression only decides, it becomes jumps and never a 0 or 1. Of two operands the one
that needs more registers comes first, so that even 256 terms need fewer than there are; beyond that the stack is used.
"""

from __future__ import annotations

from typing import Final, assert_never

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Builder, Label, Reg
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Size
from gdb_kprobe.language.expression import BITS, Binary, BinaryOp, Cast, Expr, Number, Register, Unary, UnaryOp
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import PT_REGS_NAMES

CONTEXT: Final = R1
"""Points to the ``struct pt_regs``, and is left alone."""

# Those that cost least where the code is put in line come first: r4 is rcx, which shifts need; r6-r9 are callee-saved.
_REGISTERS: Final = (R0, R2, R3, R5, R4, R6, R7, R8, R9)

_SIZES: Final = {8: Size.B, 16: Size.H, 32: Size.W, 64: Size.DW}

_ARITHMETIC: Final = {
    BinaryOp.OR: AluOp.OR, BinaryOp.XOR: AluOp.XOR, BinaryOp.AND: AluOp.AND, BinaryOp.ADD: AluOp.ADD,
    BinaryOp.SUB: AluOp.SUB,
}  # fmt: skip
_UNSIGNED: Final = {
    BinaryOp.EQ: JmpOp.JEQ, BinaryOp.NE: JmpOp.JNE, BinaryOp.LT: JmpOp.JLT, BinaryOp.LE: JmpOp.JLE,
    BinaryOp.GT: JmpOp.JGT, BinaryOp.GE: JmpOp.JGE,
}  # fmt: skip
_SIGNED: Final = _UNSIGNED | {
    BinaryOp.LT: JmpOp.JSLT, BinaryOp.LE: JmpOp.JSLE, BinaryOp.GT: JmpOp.JSGT, BinaryOp.GE: JmpOp.JSGE,
}  # fmt: skip
_OPPOSITE: Final = {
    JmpOp.JEQ: JmpOp.JNE, JmpOp.JNE: JmpOp.JEQ, JmpOp.JGT: JmpOp.JLE, JmpOp.JLE: JmpOp.JGT, JmpOp.JGE: JmpOp.JLT,
    JmpOp.JLT: JmpOp.JGE, JmpOp.JSGT: JmpOp.JSLE, JmpOp.JSLE: JmpOp.JSGT, JmpOp.JSGE: JmpOp.JSLT,
    JmpOp.JSLT: JmpOp.JSGE,
}  # fmt: skip
_MIRRORED: Final = {
    JmpOp.JEQ: JmpOp.JEQ, JmpOp.JNE: JmpOp.JNE, JmpOp.JGT: JmpOp.JLT, JmpOp.JLT: JmpOp.JGT, JmpOp.JGE: JmpOp.JLE,
    JmpOp.JLE: JmpOp.JGE, JmpOp.JSGT: JmpOp.JSLT, JmpOp.JSLT: JmpOp.JSGT, JmpOp.JSGE: JmpOp.JSLE,
    JmpOp.JSLE: JmpOp.JSGE, JmpOp.JSET: JmpOp.JSET,
}  # fmt: skip
_LOGIC: Final = frozenset({BinaryOp.AND_THEN, BinaryOp.OR_ELSE})

_Registers = tuple[Reg, ...]


def jump_unless(out: Builder, expr: Expr, target: Label) -> None:
    """Emit code that goes to *target* if *expr* is 0, and on if it is not. It changes all registers but r1 and r10."""
    _Compiler(out).decide(expr, target, False, _REGISTERS)


def _constant(expr: Expr) -> int | None:
    """The number of an operand that fits an instruction: sign-extended from 32 bits."""
    if isinstance(expr, Number):
        signed = expr.value - (1 << BITS) if expr.value >> (BITS - 1) else expr.value
        return signed if -0x8000_0000 <= signed <= 0x7FFF_FFFF else None
    if isinstance(expr, Unary) and expr.op is UnaryOp.NEGATE and isinstance(expr.operand, Number):
        return -expr.operand.value if expr.operand.value <= 0x8000_0000 else None
    return None


def _needs(expr: Expr) -> int:
    """How many registers the value of *expr* takes when nothing is put on the stack."""
    match expr:
        case Number() | Register():
            return 1
        case Cast() | Unary():
            return _needs(expr.operand)
        case Binary():
            left, right = _needs(expr.left), _needs(expr.right)
            if expr.op in _LOGIC or _constant(expr.right) is not None:
                return max(left, right)
            return left + 1 if left == right else max(left, right)
        case _:
            assert_never(expr)


class _Compiler:
    def __init__(self, out: Builder) -> None:
        self.out = out
        self.spilled = 0

    # Decisions

    def decide(self, expr: Expr, target: Label, when: bool, free: _Registers) -> None:
        """Go to *target* if *expr*, as true or false, is *when*."""
        match expr:
            case Number():
                if bool(expr.value) is when:
                    self.out.jump(target)
            case Unary(UnaryOp.NOT, operand):
                self.decide(operand, target, not when, free)
            case Unary(UnaryOp.NEGATE | UnaryOp.PLUS, operand):
                self.decide(operand, target, when, free)
            case Binary(BinaryOp.AND_THEN | BinaryOp.OR_ELSE):
                # One operand settles it when it is false (&&) or true (||).
                settles = expr.op is BinaryOp.OR_ELSE
                if when is settles:
                    self.decide(expr.left, target, when, free)
                    self.decide(expr.right, target, when, free)
                else:
                    settled = Label()
                    self.decide(expr.left, settled, settles, free)
                    self.decide(expr.right, target, when, free)
                    self.out.bind(settled)
            case Binary() if expr.op in _UNSIGNED:
                signed = expr.left.is_signed and expr.right.is_signed
                op = (_SIGNED if signed else _UNSIGNED)[expr.op]
                self.compare(expr, op if when else _OPPOSITE[op], target, free)
            case Binary(BinaryOp.AND):
                if when:
                    self.compare(expr, JmpOp.JSET, target, free)
                else:
                    other = Label()
                    self.compare(expr, JmpOp.JSET, other, free)
                    self.out.jump(target)
                    self.out.bind(other)
            case _:
                self.value(expr, free)
                self.out.jump_if(JmpOp.JNE if when else JmpOp.JEQ, free[0], 0, target)

    def compare(self, expr: Binary, op: JmpOp, target: Label, free: _Registers) -> None:
        if (constant := _constant(expr.right)) is not None:
            self.value(expr.left, free)
            self.out.jump_if(op, free[0], constant, target)
        elif (constant := _constant(expr.left)) is not None:
            self.value(expr.right, free)
            self.out.jump_if(_MIRRORED[op], free[0], constant, target)
        else:
            left, right = self.both(expr, free)
            self.out.jump_if(op, left, right, target)

    # Values

    def value(self, expr: Expr, free: _Registers) -> None:
        """The 64 bits of *expr* into the first of the *free* registers; the others may change."""
        out, dst = self.out, free[0]
        match expr:
            case Number():
                out.load_number(dst, expr.value)
            case Register():
                self.load(dst, expr, BITS, signed=False)
            case Cast(Register() as register, bits, signed):
                self.load(dst, register, bits, signed=signed)
            case Cast():
                self.value(expr.operand, free)
                self.cast(dst, expr)
            case Unary(UnaryOp.NOT):
                self.truth(expr, free)
            case Unary():
                self.value(expr.operand, free)
                if expr.op is UnaryOp.NEGATE:
                    out.neg(dst)
                elif expr.op is UnaryOp.INVERT:
                    out.alu(AluOp.XOR, dst, -1)
            case Binary() if expr.op in _UNSIGNED or expr.op in _LOGIC:
                self.truth(expr, free)
            case Binary():
                self.binary(expr, free)
            case _:
                assert_never(expr)

    def load(self, dst: Reg, register: Register, bits: int, *, signed: bool) -> None:
        offset = pt_regs.OFFSETS[PT_REGS_NAMES[register.name]]
        self.out.load(dst, CONTEXT, offset, _SIZES[bits], signed=signed and bits < BITS)

    def cast(self, dst: Reg, cast: Cast) -> None:
        if cast.bits == BITS:
            return
        if cast.is_signed:
            self.out.sign_extend(dst, dst, cast.bits)
        elif cast.bits == 32:
            self.out.mov(dst, dst, bits=32)
        else:
            self.out.alu(AluOp.AND, dst, (1 << cast.bits) - 1)

    def truth(self, expr: Expr, free: _Registers) -> None:
        """1 or 0. The register is needed while it is decided, so that it is written on each way out."""
        no, done = Label(), Label()
        self.decide(expr, no, False, free)
        self.out.mov(free[0], 1)
        self.out.jump(done)
        self.out.bind(no)
        self.out.mov(free[0], 0)
        self.out.bind(done)

    def binary(self, expr: Binary, free: _Registers) -> None:
        if expr.op in _ARITHMETIC:
            op = _ARITHMETIC[expr.op]
        elif expr.op is BinaryOp.SHL:
            op = AluOp.LSH
        else:
            op = AluOp.ARSH if expr.left.is_signed else AluOp.RSH
        if (constant := _constant(expr.right)) is not None:
            self.value(expr.left, free)
            self.out.alu(op, free[0], constant)
            return
        left, right = self.both(expr, free)
        self.out.alu(op, left, right)
        if left is not free[0]:
            self.out.mov(free[0], left)

    def both(self, expr: Binary, free: _Registers) -> tuple[Reg, Reg]:
        """Both operands, in the first two of the *free* registers; which is where is returned, left first."""
        right_first = _needs(expr.right) > _needs(expr.left)
        first, second = (expr.right, expr.left) if right_first else (expr.left, expr.right)
        self.value(first, free)
        places = (free[0], free[1])
        if _needs(second) < len(free):
            self.value(second, free[1:])
        else:
            self.spilled += 1
            slot = -8 * self.spilled
            self.out.store(R10, slot, free[0], Size.DW)
            self.value(second, free)
            self.out.load(free[1], R10, slot, Size.DW)
            self.spilled -= 1
            places = (free[1], free[0])
        return (places[1], places[0]) if right_first else places
