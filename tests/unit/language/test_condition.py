"""Conditions: C's grammar and C's arithmetic on 64 bits.

The oracle for both is Python: a random expression is written down once as C, with only those parentheses that C's
precedence needs, and once as Python calls on ctypes integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.language.expression import Binary, BinaryOp, Cast, Number, Register, Unary, UnaryOp, evaluate
from gdb_kprobe.language.registers import pt_regs
from gdb_kprobe.model import GENERAL_REGISTERS, PT_REGS_NAMES

MINUS_100 = 0xFFFF_FFFF_FFFF_FF9C


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("di", True),
        ("cx", False),
        ("di == 3", True),
        ("%di == 0x3", True),
        ("di==03", True),
        ("di != 3", False),
        ("!cx", True),
        ("!di == 0", True),
        ("di > 2 && si < 0x100", False),
        ("di > 2 || nothing_is_read_here", None),
        # a register is unsigned, and so is what it is compared with
        ("si > 100", True),
        ("si == -100", True),
        ("si < 0", False),
        ("s64(si) < 0", True),
        ("s64(si) == -100", True),
        ("s32(si) < -99", True),
        ("u32(si) == 0xffffff9c", True),
        ("u8(si) == 0x9c", True),
        ("s8(si) == -100", True),
        ("u16(si) == 0xff9c", True),
        ("s32(si) < di", False),
        ("-1 > 0xffffffff", False),
        ("-1 == 0xffffffffffffffff", True),
        # precedence
        ("di & 1 == 1", True),
        ("(di & 2) == 2", True),
        ("di & 2 == 2", True),
        ("4 & 6 == 6", False),
        ("1 | 2 ^ 3 & 1 == 1", True),
        ("1 + 1 << 2 == 8", True),
        ("8 - 4 - 2 == 2", True),
        ("5 > 4 > 0", True),
        ("5 > 4 > 1", False),
        ("0 == 0 == 0", False),
        ("1 || 0 && 0", True),
        ("-di + 3 == 0", True),
        ("- -di == 3", True),
        ("~0 == -1", True),
        ("~cx == 0xffffffffffffffff", True),
        ("!!di == 1", True),
        # shifts
        ("1 << 63 == 0x8000000000000000", True),
        ("s64(si) >> 4 == -7", True),
        ("si >> 4 == -7", False),
        ("-1 >> 1 == -1", True),
        ("1 << di + 61 == 1", True),  # 64: the low six bits of the count are used
        ("flags & 0x200", True),
        ("cs == 0x10 && (cs & 3) == 0", True),
        ("sp - 8 < sp", True),
    ],
)
def test_conditions(text: str, holds: bool | None) -> None:
    registers = {"di": 3, "si": MINUS_100, "cx": 0, "flags": 0x246, "cs": 0x10, "sp": 0xFFFF_8880_0000_1000}
    if holds is None:
        with pytest.raises(SyntaxRefusedError, match="Field not found"):
            parse_condition(text)
    else:
        assert parse_condition(text).evaluate(registers) is holds


def test_the_tree_is_made_of_typed_nodes() -> None:
    assert parse_condition("!di || s32(si) - 1 < ax").expr == Binary(
        BinaryOp.OR_ELSE,
        Unary(UnaryOp.NOT, Register("di")),
        Binary(
            BinaryOp.LT,
            Binary(BinaryOp.SUB, Cast(Register("si"), 32, is_signed=True), Number(1)),
            Register("ax"),
        ),
    )


def test_a_condition_knows_its_registers_and_its_text() -> None:
    condition = parse_condition("  di + 1 == s32(si) || !ip ")
    assert condition.registers == {"di", "si", "ip"}
    assert condition.text == "di + 1 == s32(si) || !ip"
    assert parse_condition("1").registers == frozenset()


def test_only_the_registers_that_are_named_are_read() -> None:
    assert parse_condition("di == 1 || si == 1").evaluate({"di": 1})


def test_values_by_hardware_name_are_turned_into_pt_regs() -> None:
    hardware = {name: number for number, name in enumerate((*GENERAL_REGISTERS, "gs_base"))}
    values = pt_regs(hardware)
    assert {PT_REGS_NAMES[name]: value for name, value in values.items()} == {
        name: hardware[name] for name in GENERAL_REGISTERS
    }
    assert parse_condition(f"ip == {hardware['rip']} && flags == {hardware['eflags']}").evaluate(values)


REFUSED = [
    ("", "Meaningless filter expression", "^"),
    ("   ", "Meaningless filter expression", "^"),
    ("di ==", "an operand is missing", "     ^"),
    ("== 3", "an operand is missing", "^"),
    ("di && ", "an operand is missing", "     ^"),
    ("di = 3", "Invalid operator", "   ^"),
    ("di === 3", "Invalid operator", "     ^"),
    ("di 3", "Invalid operator", "   ^"),
    ("di * 3", "Invalid operator '*'", "   ^"),
    ("di / 3", "Invalid operator '/'", "   ^"),
    ("di % 3", "Invalid operator '%'", "   ^"),
    ("di ? 1", "Invalid operator '?'", "   ^"),
    ("(di == 3", "Too many '('", "^"),
    ("((di) == 3", "Too many '('", "^"),
    ("di == 3)", "Too few '('", "       ^"),
    (")", "Too few '('", "^"),
    ("()", "an operand is missing", " ^"),
    ("(di 3)", "Invalid operator", "    ^"),
    ("s32(di", "Too many '('", "   ^"),
    ("u7(di)", "Field not found", "^"),
    ("s32 == 1", "Field not found", "^"),
    ("rdi == 1", "Field not found", "^"),
    ("%rdi == 1", "Invalid register name", "^"),
    ("%dfd == 1", "Invalid register name", "^"),
    ("vfs_read == ip", "Field not found", "^"),
    ("di == 08", "Illegal integer value", "      ^"),
    ("di == 10L", "Illegal integer value", "      ^"),
    ("di == 0x", "Illegal integer value", "      ^"),
    ("di == 1_000", "Illegal integer value", "      ^"),
    ("di == 0x10000000000000000", "Illegal integer value", "      ^"),
    ("di << 64", "shift by 64", "      ^"),
    ('di == "sh"', "not implemented yet: strings in conditions", "      ^"),
    ("$comm == 1", "not implemented yet: '$' in conditions", "^"),
    ("di == @jiffies", "not implemented yet: '@' in conditions", "      ^"),
    ("!" * 65 + "di", "Too many terms in predicate expression", " " * 64 + "^"),
    ("(" * 65 + "di" + ")" * 65, "Too many terms in predicate expression", " " * 64 + "^"),
    ("di" + " + 1" * 128, "Too many terms in predicate expression", " " * 513 + "^"),
]


@pytest.mark.parametrize(("text", "message", "caret"), REFUSED, ids=[text[:30] or "empty" for text, _, _ in REFUSED])
def test_refused(text: str, message: str, caret: str) -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_condition(text)
    assert caught.value.message.splitlines()[0] == message
    assert caught.value.column == caret.index("^")


def test_the_largest_conditions_can_be_evaluated() -> None:
    assert evaluate(parse_condition("di" + " + 1" * 127).expr, {"di": 1}) == 128
    assert parse_condition("(" * 64 + "di" + ")" * 64).evaluate({"di": 1})
    nested = "1||0|1^0&1==1<1<<1-" * 12
    assert parse_condition(nested + "1").evaluate({})


# -- the oracle --------------------------------------------------------------------------------------------------------

# C11, A.2.1, from loosest to tightest.
PRECEDENCE = {
    op: level
    for level, ops in enumerate(["||", "&&", "|", "^", "&", "== !=", "< <= > >=", "<< >>", "+ -"])
    for op in ops.split()
}
TIGHTEST = len(PRECEDENCE)
SIGNED = {8: ctypes.c_int8, 16: ctypes.c_int16, 32: ctypes.c_int32, 64: ctypes.c_int64}
UNSIGNED = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_uint64}
REGISTERS = ("di", "si", "ip", "flags", "r8")


def s64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


Word = ctypes.c_int64 | ctypes.c_uint64


@dataclass(frozen=True)
class Text:
    """An expression as C, how tightly its outermost operator binds, and its value as C's types have it."""

    c: str
    level: int
    value: Word

    def within(self, level: int) -> str:
        return self.c if self.level >= level else f"({self.c})"


def binary(op: str, left: Text, right: Text) -> Text:
    level = PRECEDENCE[op]
    text = f"{left.within(level)} {op} {right.within(level + 1)}"
    a, b = left.value.value, right.value.value
    if op in ("<<", ">>"):
        return Text(text, level, type(left.value)(a << b % 64 if op == "<<" else a >> b % 64))
    if op in ("&&", "||"):
        return Text(text, level, s64(bool(a and b) if op == "&&" else bool(a or b)))
    common = u64 if ctypes.c_uint64 in (type(left.value), type(right.value)) else s64
    names: dict[str, int] = {"a": common(a).value, "b": common(b).value}
    result = eval(f"a {op} b", names)
    return Text(text, level, s64(result) if isinstance(result, bool) else common(result))


def unary(op: str, operand: Text) -> Text:
    value = operand.value
    text = f"{op}{operand.within(TIGHTEST)}"
    match op:
        case "!":
            return Text(text, TIGHTEST, s64(value.value == 0))
        case "~":
            return Text(text, TIGHTEST, type(value)(~value.value))
        case "-":
            return Text(text, TIGHTEST, type(value)(-value.value))
        case _:
            return Text(text, TIGHTEST, value)


def cast(sign: str, bits: int, operand: Text) -> Text:
    low = (SIGNED if sign == "s" else UNSIGNED)[bits](operand.value.value).value
    return Text(f"{sign}{bits}({operand.c})", TIGHTEST + 1, s64(low) if sign == "s" else u64(low))


numbers = st.one_of(
    st.sampled_from([0, 1, 2, 63, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


def number(value: int, write: str) -> Text:
    return Text(write.format(value), TIGHTEST + 1, s64(value) if value < 2**63 else u64(value))


def expressions(registers: Mapping[str, int]) -> st.SearchStrategy[Text]:
    names = st.builds(
        lambda name, percent: Text(percent + name, TIGHTEST + 1, u64(registers[name])),
        st.sampled_from(REGISTERS),
        st.sampled_from(["", "%"]),
    )
    leaves = st.one_of(names, st.builds(number, numbers, st.sampled_from(["{:d}", "{:#x}"])))
    shifts = st.builds(
        binary, st.sampled_from(["<<", ">>"]), leaves, st.builds(number, st.integers(0, 63), st.just("{:d}"))
    )
    return st.recursive(
        st.one_of(leaves, shifts),
        lambda inner: st.one_of(
            st.builds(binary, st.sampled_from([op for op in PRECEDENCE if op not in ("<<", ">>")]), inner, inner),
            st.builds(binary, st.sampled_from(["<<", ">>"]), inner, names),
            st.builds(unary, st.sampled_from("!~-+"), inner),
            st.builds(cast, st.sampled_from("su"), st.sampled_from([8, 16, 32, 64]), inner),
        ),
        max_leaves=12,
    )


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_conditions_mean_what_they_mean_in_c(data: st.DataObject) -> None:
    registers = {name: data.draw(numbers, label=name) for name in REGISTERS}
    text = data.draw(expressions(registers))
    expr = parse_condition(text.c).expr
    assert evaluate(expr, registers) == text.value.value
    assert expr.is_signed is isinstance(text.value, ctypes.c_int64)
