"""What may follow in a definition that is being typed: for TAB."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.model import PT_REGS_NAMES

_KIND = re.compile(r"[pr](:\S*)?")
_LETTER = re.compile(r"[pr]")
_CASTS = tuple(f"{kind.value}(" for kind in FetchType if kind.value[0] in "su")
_NAME = re.compile(r"%?[A-Za-z_]\w*$|%$", re.ASCII)


def complete_definition(text: str, places: Callable[[str], Iterable[str]]) -> list[str]:
    """Return what the last word of *text*, a definition up to the cursor, may become; each is a whole word.

    *places* gives the places that begin with a text.
    """
    *before, token = _words(text)
    if before and _KIND.fullmatch(before[0]):
        del before[0]
    elif not before and (token[1:2] == ":" and _LETTER.match(token)):
        return []  # the probe's name, which is the user's to choose
    if not before:
        return list(places(token))
    if "if" in before:
        return _condition(token, before[1 : before.index("if")])
    return _argument(token)


def _words(text: str) -> list[str]:
    """The words of *text*; the last one is empty when a space is in front of the cursor."""
    return [*text.split(), ""] if not text or text[-1].isspace() else text.split()


def _argument(token: str) -> list[str]:
    name, equals, fetch = token.rpartition("=")
    register, colon, _ = fetch.partition(":")
    front = name + equals
    if colon:
        return [f"{front}{register}:{kind.value}" for kind in FetchType]
    registers = [f"{front}%{register}" for register in PT_REGS_NAMES]
    return registers if equals else [*registers, "if"]


def _condition(token: str, arguments: list[str]) -> list[str]:
    found = _NAME.search(token)
    front = token[: found.start()] if found else token
    names = [word.partition("=")[0] for word in arguments if "=" in word]
    if found and found[0].startswith("%"):
        return [f"{front}%{register}" for register in PT_REGS_NAMES]
    return [front + word for word in (*names, *PT_REGS_NAMES, *_CASTS)]
