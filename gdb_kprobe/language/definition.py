"""The kernel's ``kprobe_events`` language: a definition's text to a :class:`ProbeSpec`.

::

    p[:[GROUP/]NAME] PLACE [[ARG=]%REGISTER[:TYPE]]... [if CONDITION]      # comment
    PLACE := [MODULE:]SYMBOL[+OFFSET|-OFFSET] | ADDRESS

Words, limits, default names and error texts are the kernel's (``kernel/trace/trace_kprobe.c``, ``trace_probe.c``), and
so is the order of the checks: the place, then the names, then the arguments. Ours alone are ``if`` and the negative
offset. What the kernel has and this has not yet is refused by name.
"""

from __future__ import annotations

import re

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.condition import Condition, parse_condition_at
from gdb_kprobe.language.expression import Cast, Expr, Register
from gdb_kprobe.language.fetch import parse_fetch_arg
from gdb_kprobe.language.number import parse_number
from gdb_kprobe.language.spec import (
    DEFAULT_GROUP,
    MAX_EVENT_NAME,
    FetchArg,
    FetchType,
    Location,
    ProbeSpec,
    default_name,
)
from gdb_kprobe.language.word import Word
from gdb_kprobe.model import VirtAddr

__all__ = ["FetchArg", "FetchType", "Location", "ProbeSpec", "parse_definition"]

_MAX_LINE = 4094
_MAX_ARGS = 128
_MAX_OFFSET = 0xFFFF_FFFF

_SYMBOL = re.compile(r"[A-Za-z_.$][\w.$@]*", re.ASCII)
_GROUP = re.compile(r"[A-Za-z_-][\w-]*", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)

_USAGE = "p[:[GROUP/]NAME] SYMBOL[+OFFSET] [ARG=%REGISTER]... [if CONDITION]"
_PLACES = "write SYMBOL, SYMBOL+OFFSET, MODULE:SYMBOL or 0xADDRESS"
_BAD_PLACE = "Invalid probed address or symbol"
_RULE = "must follow the same rules as C identifiers"


def parse_definition(text: str) -> ProbeSpec:
    """Parse one definition.

    :raises SyntaxRefusedError: with the column (in *text*) of what is wrong.
    """
    line = _one_line(text)
    words, condition_at = _split(line.partition("#")[0].rstrip())
    if not words:
        raise SyntaxRefusedError("the definition is empty", line, 0, _USAGE)
    names = _check_type(words[0])
    if len(words) == 1:
        raise words[0].error("no probe point is given", len(words[0].text), _USAGE)
    location = _parse_place(words[1])
    name, group = _parse_names(names) if names is not None else ("", DEFAULT_GROUP)
    _check_spaces(words[1:])
    args = _parse_args(words[2:])
    condition = None if condition_at is None else _parse_condition(words[0].line, condition_at, args)
    return ProbeSpec(name or default_name(location), location, group, args, condition, text.strip())


def _one_line(text: str) -> str:
    """Return *text* with every character one column wide, so that a caret under it stands right."""
    line = text.replace("\t", " ")
    if (found := re.search(r"[^ -~]", line)) is not None:
        shown = re.sub(r"[^ -~]", "?", line)
        hint = "a definition is one line of ASCII text"
        raise SyntaxRefusedError(f"{found[0]!r} in a probe definition", shown, found.start(), hint)
    if len(line) > _MAX_LINE:
        raise SyntaxRefusedError("the definition is too long", line[:60], 59, f"at most {_MAX_LINE} characters")
    return line


def _split(line: str) -> tuple[list[Word], int | None]:
    """Split *line* into words up to ``if``; with an ``if``, the column after it comes second."""
    words = [Word(found[0], found.start(), line) for found in re.finditer(r"\S+", line)]
    for index, word in enumerate(words):
        if index > 1 and word.text == "if":
            return words[:index], word.column + len(word.text)
    return words, None


def _check_type(word: Word) -> Word | None:
    """Check what is before the colon; return what is after it, if there is one."""
    letters, colon, _ = word.text.partition(":")
    if letters.startswith("r"):
        raise word.error("not implemented yet: return probes", 0, "probe the function's entry: p:NAME SYMBOL")
    if letters.startswith(("-", "!")):
        raise word.error("not implemented yet: deleting by a definition", 0, "use 'kprobe delete NAME'")
    if re.fullmatch(r"p\d+", letters):
        raise word.error("Maxactive is only for function exit", 1, _USAGE)
    if letters != "p":
        raise word.error(f"{letters!r} is not a type of probe", 0, _USAGE)
    return word.part(len(letters) + 1) if colon else None


def _parse_place(word: Word) -> Location:
    if (address := parse_number(word.text)) is not None:
        return Location(address=VirtAddr(address))
    if word.text.startswith(("*", "&")) and len(word.text) > 1:
        raise word.error(_BAD_PLACE, 0, f"leave the {word.text[0]!r} away: {word.text[1:]}")
    place, percent, suffix = word.text.partition("%")
    if percent and suffix == "return":
        raise word.error("not implemented yet: return probes", len(place), "probe the function's entry")
    if percent:
        raise word.error("Invalid probed address suffix", len(place), _PLACES)
    name, sign, digits = _partition_sign(place)
    module, colon, symbol = name.rpartition(":")
    if "-" in module:
        raise word.error(_BAD_PLACE, 0, f"the kernel writes module names with '_': {module.replace('-', '_')}:{symbol}")
    if not _SYMBOL.fullmatch(symbol) or (colon and not _IDENTIFIER.fullmatch(module)):
        raise word.error(_BAD_PLACE, 0, _PLACES)
    if not sign:
        return Location(symbol, module)
    count = parse_number(digits)
    if count is None or count > _MAX_OFFSET:
        raise word.error(_BAD_PLACE, len(name), f"{digits!r} is not an offset: 10, 0xa or 012, of at most 32 bits")
    return Location(symbol, module, -count if sign == "-" else count)


def _partition_sign(place: str) -> tuple[str, str, str]:
    """Split at the first sign after the module, whose name may hold a (wrong) hyphen."""
    start = place.find(":") + 1
    found = re.compile(r"[+-]").search(place, start)
    if found is None:
        return place, "", ""
    return place[: found.start()], found[0], place[found.end() :]


def _parse_names(word: Word) -> tuple[str, str]:
    """Parse ``[GROUP/]NAME`` to name (empty: not given) and group."""
    found = re.search(r"[/.]", word.text)
    if found is None:
        if not word.text:
            raise word.error("Event name is not specified", 0, "leave out the ':' for an automatic name")
        return _checked_name(word), DEFAULT_GROUP
    group = word.text[: found.start()]
    if not group:
        raise word.error("Group name is not specified", 0, "write GROUP/NAME, or NAME alone")
    if len(group) > MAX_EVENT_NAME:
        raise word.error("Group name is too long", 0, f"at most {MAX_EVENT_NAME} characters")
    if not _GROUP.fullmatch(group):
        raise word.error(f"Group name {_RULE}", 0, "letters, digits, '_' and '-', not beginning with a digit")
    event = word.part(found.end())
    return (_checked_name(event) if event.text else ""), group


def _checked_name(word: Word) -> str:
    if len(word.text) > MAX_EVENT_NAME:
        raise word.error("Event name is too long", 0, f"at most {MAX_EVENT_NAME} characters")
    if not _IDENTIFIER.fullmatch(word.text):
        raise word.error(f"Event name {_RULE}", 0, "letters, digits and '_', not beginning with a digit")
    return word.text


def _check_spaces(words: list[Word]) -> None:
    """Refuse what was torn apart by spaces: ``SYMBOL +5`` and ``x = %di`` are single words."""
    place, *args = words
    for index, word in enumerate(args):
        if index == 0 and (found := re.fullmatch(r"([+-])(\w*)", word.text, re.ASCII)):
            number = found[2] or (args[1].text if len(args) > 1 else "")
            raise word.error(
                "a space in front of the offset", 0, f"write it as one word: {place.text}{found[1]}{number or 'OFFSET'}"
            )
        before = args[index - 1].text
        if index and word.text.startswith("=") and word.text != "==":
            value = word.text[1:] or (args[index + 1].text if index + 1 < len(args) else "%di")
            raise word.error("a space in front of '='", 0, f"write the argument as one word: {before}={value}")
        if word.text.endswith("=") and index + 1 < len(args):
            hint = f"write the argument as one word: {word.text}{args[index + 1].text}"
            raise word.error("a space behind '='", len(word.text), hint)


def _parse_args(words: list[Word]) -> tuple[FetchArg, ...]:
    if len(words) > _MAX_ARGS:
        raise words[_MAX_ARGS].error("too many arguments", 0, f"at most {_MAX_ARGS}")
    args: list[FetchArg] = []
    for number, word in enumerate(words, start=1):
        args.append(parse_fetch_arg(word, number, {arg.name for arg in args}))
    return tuple(args)


def _parse_condition(line: str, column: int, args: tuple[FetchArg, ...]) -> Condition:
    """Parse the condition; a name of an argument in it stands for the fetched value, with its type's sign."""
    names: dict[str, Expr] = {arg.name: Cast(Register(arg.register), arg.type.bits, arg.type.is_signed) for arg in args}
    return parse_condition_at(line, column, names)
