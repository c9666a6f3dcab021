"""``if CONDITION``: text to expression. What the expression means is in :mod:`gdb_kprobe.language.expression`.

From loosest to tightest, as in C: ``||``, ``&&``, ``|``, ``^``, ``&``, ``== !=``, ``< <= > >=``, ``<< >>``, ``+ -``,
and the prefixes ``! ~ - +``. Operands are numbers (``10``, ``0xa``, ``012``), registers (``di`` or ``%di``), names of
the probe's own arguments, casts (``s32(di)``) and parentheses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.expression import (
    Binary,
    BinaryOp,
    Cast,
    Expr,
    Number,
    Register,
    Unary,
    UnaryOp,
    evaluate,
    registers_of,
)
from gdb_kprobe.language.number import parse_number
from gdb_kprobe.language.registers import nearest_register
from gdb_kprobe.model import PT_REGS_NAMES

# Each row binds tighter than the one before.
_LEVELS: tuple[tuple[BinaryOp, ...], ...] = (
    (BinaryOp.OR_ELSE,),
    (BinaryOp.AND_THEN,),
    (BinaryOp.OR,),
    (BinaryOp.XOR,),
    (BinaryOp.AND,),
    (BinaryOp.EQ, BinaryOp.NE),
    (BinaryOp.LT, BinaryOp.LE, BinaryOp.GT, BinaryOp.GE),
    (BinaryOp.SHL, BinaryOp.SHR),
    (BinaryOp.ADD, BinaryOp.SUB),
)
_LEVEL_OF = {op: level for level, ops in enumerate(_LEVELS) for op in ops}
_UNARY = {op.value: op for op in UnaryOp}
_BINARY = {op.value: op for op in BinaryOp}

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]\w*)"
    r"|(?P<name>%?[A-Za-z_]\w*)"
    r"|(?P<op>\|\||&&|<<|>>|[=!<>]=|[-+|^&<>!~()]))",
    re.ASCII,
)
_WORDS = {"and": "&&", "or": "||", "not": "!", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
"""Operators of other languages."""
_C_TYPES = {
    "char": "s8", "short": "s16", "int": "s32", "long": "s64", "unsigned": "u32", "void": "u64", "struct": "u64",
    "size_t": "u64", "bool": "u8",
}  # fmt: skip
_CAST = re.compile(r"([us])(8|16|32|64)")

_MAX_TERMS = 256
"""Bound on operators and operands, which bounds the depth of every walk over the expression."""
_MAX_NESTING = 64


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on the registers at the probe point; true means that the hit counts."""

    text: str
    expr: Expr

    @property
    def registers(self) -> frozenset[str]:
        """The pt_regs names that the condition reads."""
        return registers_of(self.expr)

    def evaluate(self, registers: Mapping[str, int]) -> bool:
        """Say whether the condition holds.

        :param registers: values by pt_regs name (see :func:`gdb_kprobe.language.registers.pt_regs`), at least those
            of :attr:`registers`.
        """
        return evaluate(self.expr, registers) != 0


def parse_condition(text: str, names: Mapping[str, Expr] | None = None) -> Condition:
    """Parse the expression that is the whole of *text*.

    :param names: what further names stand for: the arguments of the probe. ``%di`` is always the register.
    :raises SyntaxRefusedError: with the column of the first thing that cannot be.
    """
    return parse_condition_at(text, 0, names or {})


def parse_condition_at(text: str, start: int, names: Mapping[str, Expr]) -> Condition:
    """Parse *text* from column *start* to its end; errors show the whole of *text*."""
    return Condition(text[start:].strip(), _Parser(text, start, names).parse())


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # "number", "name", "op", or "end"
    text: str
    column: int


class _Parser:
    """Precedence climbing over the tokens of one condition."""

    def __init__(self, text: str, start: int, names: Mapping[str, Expr]) -> None:
        self._text = text
        self._names = names
        self._tokens = self._tokenize(start)
        self._next = 0
        self._nesting = 0

    def parse(self) -> Expr:
        if self._peek.kind == "end":
            raise self._error(
                "Meaningless filter expression", self._peek.column, "write a condition, such as 'di == 3'"
            )
        expr = self._binary(0)
        if self._peek.text == ")":
            raise self._error("Too few '('", self._peek.column, "there is no '(' for this ')'")
        if self._peek.text in _WORDS:
            raise self._word_for_operator(self._peek)
        if self._peek.kind != "end":
            raise self._error(
                "Invalid operator", self._peek.column, f"an operator is missing before {self._peek.text!r}"
            )
        return expr

    def _tokenize(self, column: int) -> list[_Token]:
        tokens: list[_Token] = []
        while self._text[column:].strip():
            found = _TOKEN.match(self._text, column)
            if found is None:
                column += len(self._text[column:]) - len(self._text[column:].lstrip())
                raise self._error(*self._bad_character(column, behind=tokens[-1] if tokens else None))
            kind = found.lastgroup
            assert kind is not None
            tokens.append(_Token(kind, found[kind], found.start(kind)))
            column = found.end()
            if len(tokens) > _MAX_TERMS:
                raise self._error("Too many terms in predicate expression", tokens[-1].column)
        return [*tokens, _Token("end", "", len(self._text.rstrip()))]

    def _bad_character(self, column: int, behind: _Token | None) -> tuple[str, int, str]:
        """What is wrong with the character at *column*, which comes after the token *behind*."""
        wants_operand = behind is None or (behind.kind == "op" and behind.text != ")") or behind.text in _C_TYPES
        match self._text[column]:
            case "*" if wants_operand:
                hint = "compare registers; a handler in Python reads memory: hit.read_int(hit.regs.di)"
                return "not implemented yet: reading memory in conditions", column, hint
            case "=":
                misplaced = self._text[column + 1 : column + 2] == "%"
                return "Invalid operator", column, "arguments come before 'if'" if misplaced else "equality is '=='"
            case "*" | "/" | "%" as op:
                return f"Invalid operator {op!r}", column, "there is no multiplication, division or remainder"
            case '"' | "'":
                return "not implemented yet: strings in conditions", column, "compare numbers and registers"
            case "$" | "@" as sign:
                hint = "fetch into an argument or use a register"
                return f"not implemented yet: '{sign}' in conditions", column, hint
            case other:
                return f"Invalid operator {other!r}", column, ""

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek
        self._next += 1
        return token

    def _binary(self, lowest: int) -> Expr:
        left = self._unary()
        while (op := _BINARY.get(self._peek.text)) is not None and _LEVEL_OF[op] >= lowest:
            self._take()
            at = self._peek.column
            right = self._binary(_LEVEL_OF[op] + 1)
            if op in (BinaryOp.SHL, BinaryOp.SHR) and isinstance(right, Number) and right.value > 63:
                raise self._error(f"shift by {right.value}", at, "values have 64 bits: shift by 0 to 63")
            left = Binary(op, left, right)
        return left

    def _unary(self) -> Expr:
        token = self._peek
        if (op := _UNARY.get(token.text)) is not None:
            self._take()
            return Unary(op, self._nested(self._unary, token.column))
        return self._primary()

    def _primary(self) -> Expr:
        token = self._take()
        match token.kind:
            case "number":
                return self._number(token)
            case "name":
                return self._name(token)
            case "op" if token.text == "(":
                return self._parenthesized(token)
            case "op" if token.text == ")" and self._nesting == 0:
                raise self._error("Too few '('", token.column, "there is no '(' for this ')'")
            case _:
                what = "the condition ends here" if token.kind == "end" else f"{token.text!r} is not one"
                raise self._error("an operand is missing", token.column, f"expected a number or a register; {what}")

    def _parenthesized(self, opening: _Token) -> Expr:
        inner = self._nested(lambda: self._binary(0), opening.column)
        if self._peek.text != ")":
            if self._peek.kind == "end":
                raise self._error("Too many '('", opening.column, "the ')' for this '(' is missing")
            if self._peek.text in _WORDS:
                raise self._word_for_operator(self._peek)
            hint = f"an operator is missing before {self._peek.text!r}"
            raise self._error("Invalid operator", self._peek.column, hint)
        self._take()
        return inner

    def _nested(self, parse: Callable[[], Expr], column: int) -> Expr:
        self._nesting += 1
        if self._nesting > _MAX_NESTING:
            raise self._error("Too many terms in predicate expression", column, f"nested more than {_MAX_NESTING} deep")
        expr = parse()
        self._nesting -= 1
        return expr

    def _number(self, token: _Token) -> Number:
        value = parse_number(token.text)
        if value is None:
            hint = "write 10, 0xa or 012 (octal), without a suffix, of at most 64 bits"
            raise self._error("Illegal integer value", token.column, hint)
        return Number(value)

    def _name(self, token: _Token) -> Expr:
        if token.text.startswith("%"):
            return self._register(token.text[1:], token.column)
        if (cast := _CAST.fullmatch(token.text)) is not None and self._peek.text == "(":
            operand = self._parenthesized(self._take())
            return Cast(operand, int(cast[2]), cast[1] == "s")
        if token.text in self._names:
            return self._names[token.text]
        return self._register(token.text, token.column)

    def _register(self, name: str, column: int) -> Register:
        if name in PT_REGS_NAMES:
            return Register(name)
        if name in _WORDS:
            raise self._word_for_operator(_Token("name", name, column))
        if name in _C_TYPES:
            raise self._error("Invalid cast", column, f"casts are written like calls: {_C_TYPES[name]}(di)")
        if self._text[column] == "%":
            near = nearest_register(name)
            raise self._error("Invalid register name", column, f"did you mean %{near}?" if near else "")
        near = next(iter(difflib.get_close_matches(name, self._names, n=1)), "") or nearest_register(name)
        known = f"arguments: {', '.join(self._names)}; " if self._names else ""
        hint = (
            f"did you mean '{near}'?" if near else f"{known}registers are named as in struct pt_regs: di, si, ip, flags"
        )
        raise self._error("Field not found", column, hint)

    def _word_for_operator(self, token: _Token) -> SyntaxRefusedError:
        return self._error(f"Invalid operator {token.text!r}", token.column, f"write {_WORDS[token.text]!r}, as in C")

    def _error(self, message: str, column: int, hint: str = "") -> SyntaxRefusedError:
        return SyntaxRefusedError(message, self._text, column, hint)
