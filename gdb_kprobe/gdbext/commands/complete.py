"""What TAB offers: gdb's questions, and where the answers come from.

gdb asks a command twice, ``complete(text, word)``. First *word* is None: gdb wants to know where words break, and takes
its own rule for any answer that is no number. (gdb 16 and later show what is raised there, and complete nothing
then.) Then *word* is what stands behind the last of the characters that gdb breaks words at, such as ``:``, ``=`` and
``/``; it puts the answers there instead. So ours, which are for the whole word between blanks, lose what is in front.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.config.load import profile_names
from gdb_kprobe.errors import ReportedError
from gdb_kprobe.gdbext import api
from gdb_kprobe.language.completion import complete_definition

Positional = Callable[[str], Iterable[str]]
"""What a word may become that is no option, by what there is of it."""

_PROFILES = (".yaml", ".yml")


def answer(candidates: Callable[[str], Iterable[str]], text: str, word: str | None) -> list[str]:
    """Answer gdb: what *word*, the end of *text*, may become. *candidates* are for the whole last word of a text."""
    if word is None:
        return []
    token = "" if not text or text[-1].isspace() else text.split()[-1]
    if not token.endswith(word):
        return []  # gdb sees a quotation where we see words
    found: list[str] = []
    with contextlib.suppress(ReportedError, OSError):  # of a guest that is gone, or a folder that is not to be read
        found = sorted({item for item in candidates(text) if item.startswith(token)})
    return [item[len(token) - len(word) :] for item in found]


def arguments(parser: argparse.ArgumentParser, positional: Positional, text: str) -> list[str]:
    """What the last word of *text* may become by *parser*: an option, the value of one, or else *positional*."""
    token = "" if not text or text[-1].isspace() else text.split()[-1]
    before = text.split()[: None if not token else -1]
    options = {name: action for action in parser._actions for name in action.option_strings}
    last = options.get(before[-1]) if before else None
    if last is not None and last.nargs != 0:
        return _values(last, token)
    names = [name for name, action in options.items() if not set(action.option_strings) & set(before)]
    if token.startswith("-"):
        return names
    return list(positional(token)) or ([] if token else names)


def _values(option: argparse.Action, token: str) -> list[str]:
    if option.choices is not None:
        return [str(choice) for choice in option.choices]
    return paths(token) if option.type is Path else []


def definition(text: str) -> list[str]:
    """What the last word of a definition may become."""
    return complete_definition(text, places)


def places(token: str) -> list[str]:
    """Functions of the guest, and of one of its modules behind ``MODULE:``; nothing while not attached."""
    return list(api.matching(token)) if token else []


def probes(token: str) -> list[str]:
    """Names of probes, and ``all``."""
    known = api.probes()
    return [*(probe.name for probe in known), *(["all"] if known else [])]


def profiles(token: str) -> list[str]:
    """Names of profiles; where a path is begun, folders and profiles there."""
    if "/" in token or token.startswith("~"):
        return paths(token, _PROFILES)
    return [*profile_names((Path.cwd(), CONFIGS)), *paths(token, _PROFILES)]


def paths(token: str, suffixes: Sequence[str] = ("",)) -> list[str]:
    """Files whose names end in one of *suffixes*, and folders."""
    front = token[: token.rfind("/") + 1]
    folder = Path(front).expanduser() if front else Path()
    return [
        f"{front}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in folder.iterdir()
        if (entry.is_dir() or entry.name.endswith(tuple(suffixes)))
        and (not entry.name.startswith(".") or token[len(front) :].startswith("."))
    ]
