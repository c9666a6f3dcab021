"""Fetch arguments, ``[NAME=]%REGISTER[:TYPE]``, with the kernel's words for what is wrong with one.

The forms of the kernel's language that are not there yet are recognized, so that the answer is "not yet" and not
"wrong": memory (``+0(%si)``, ``@SYMBOL``), ``$stack``, ``$argN``, ``$comm``, immediates, parameter names, strings,
arrays and bitfields.
"""

from __future__ import annotations

import difflib
import re

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.registers import nearest_register
from gdb_kprobe.language.spec import FetchArg, FetchType
from gdb_kprobe.language.word import Word
from gdb_kprobe.model import PT_REGS_NAMES

_MAX_NAME = 32
_MAX_FETCH = 63

# What would look like a field of the record that every event has.
_RESERVED_NAMES = frozenset({
    "common_type", "common_flags", "common_preempt_count", "common_pid", "common_tgid",
    "__probe_ip", "__probe_ret_ip", "__probe_func",
})  # fmt: skip
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ONLY_REGISTERS = "for now an argument is a register, such as name=%di:s32"
_LATER_TYPES = re.compile(
    r"(char|string|ustring|symbol|symstr|%pd|%pD|b\d+@\d+/\d+|(u|s|x)(8|16|32|64)(?=\[))(\[\d*\])?", re.ASCII
)


def parse_fetch_arg(word: Word, number: int, taken: set[str]) -> FetchArg:
    """Parse argument *number* (from 1) of a definition.

    :param taken: the names of the arguments before it.
    """
    name, body = _split_name(word, number)
    if len(name) > _MAX_NAME:
        raise word.error("Argument name is too long", 0, f"at most {_MAX_NAME} characters")
    if not _IDENTIFIER.fullmatch(name):
        hint = "letters, digits and underscores, not beginning with a digit"
        raise word.error("Argument name must follow the same rules as C identifiers", 0, hint)
    if name in _RESERVED_NAMES:
        raise word.error("This argument name is already used", 0, f"{name} is a field of every event")
    if name in taken:
        raise word.error("This argument name is already used", 0, f"there is an argument {name!r} before this one")
    if not body.text:
        raise body.error("No argument expression", 0, _ONLY_REGISTERS)
    if len(body.text) > _MAX_FETCH:
        raise body.error("Argument expression is too long", 0, f"at most {_MAX_FETCH} characters")
    expression, colon, _ = body.text.partition(":")
    register = _parse_register(body, expression)
    type_ = _parse_type(body.part(len(expression) + 1)) if colon else FetchType.X64
    return FetchArg(name, register, type_)


def _split_name(word: Word, number: int) -> tuple[str, Word]:
    name, equals, _ = word.text.partition("=")
    if not equals:
        return f"arg{number}", word
    if not name:
        raise word.error("Argument name is not specified", 0, "write name=%di, or %di alone")
    return name, word.part(len(name) + 1)


def _parse_register(body: Word, expression: str) -> str:
    if not expression.startswith("%"):
        raise _not_a_register(body, expression)
    name = expression[1:]
    if name in PT_REGS_NAMES:
        return name
    if name == "orig_ax":
        raise body.error("not implemented yet: %orig_ax", 0, _ONLY_REGISTERS)
    near = nearest_register(name)
    hint = f"did you mean %{near}?" if near else f"registers are named as in struct pt_regs: {' '.join(PT_REGS_NAMES)}"
    raise body.error("Invalid register name", 0, hint)


def _not_a_register(body: Word, expression: str) -> SyntaxRefusedError:
    if expression == "$retval":
        return body.error("$retval is not available on probe", 0, "it needs a return probe, which is not there yet")
    if expression.startswith("$"):
        if re.fullmatch(r"\$(stack\d*|arg(\d+|\*)|comm|COMM)", expression):
            return body.error(f"not implemented yet: {expression}", 0, _ONLY_REGISTERS)
        return body.error("Invalid $-variable specified", 0, _ONLY_REGISTERS)
    if re.match(r"[+-]u?\d", expression):
        return body.error("not implemented yet: fetching from memory, +OFFSET(...)", 0, _ONLY_REGISTERS)
    if expression.startswith("@"):
        return body.error("not implemented yet: fetching from memory, @SYMBOL or @ADDRESS", 0, _ONLY_REGISTERS)
    if expression.startswith("\\"):
        return body.error("not implemented yet: immediate values", 0, _ONLY_REGISTERS)
    if expression in PT_REGS_NAMES:
        return body.error("Invalid fetch argument", 0, f"did you mean %{expression}?")
    if re.match(r"[A-Za-z_]", expression):
        return body.error("not implemented yet: arguments by the function's parameter names", 0, _ONLY_REGISTERS)
    return body.error("Invalid fetch argument", 0, _ONLY_REGISTERS)


_C_TYPES = {
    "char": FetchType.S8, "bool": FetchType.U8, "short": FetchType.S16, "int": FetchType.S32, "unsigned": FetchType.U32,
    "uint": FetchType.U32, "long": FetchType.S64, "ulong": FetchType.U64, "size_t": FetchType.U64,
    "ssize_t": FetchType.S64, "ptr": FetchType.X64, "pointer": FetchType.X64, "hex": FetchType.X64,
}  # fmt: skip
"""What a C programmer, or another tracer's user, calls a type: the type of ours."""


def _nearest_type(text: str) -> str:
    """The type that *text* will have meant, or nothing: by another case, by its name in C, by its spelling."""
    lower = text.lower()
    if lower in FetchType.__members__.values():
        return lower
    return _C_TYPES.get(lower) or next(iter(difflib.get_close_matches(lower, list(FetchType), n=1)), "")


def _parse_type(word: Word) -> FetchType:
    if word.text in FetchType.__members__.values():
        return FetchType(word.text)
    if _LATER_TYPES.fullmatch(word.text):
        raise word.error(f"not implemented yet: type {word.text}", 0, "for now: u8 to u64, s8 to s64, x8 to x64")
    near = _nearest_type(word.text)
    hint = f"did you mean {near}?" if near else "types are u8 to u64, s8 to s64, x8 to x64"
    raise word.error("Unknown type is specified", 0, hint)
