"""Docstrings as Markdown: those of commands, which gdb shows as they are, and those of Python in its usual markup."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 116
_COMMAND = re.compile(r"'((?:kprobe|show|set|help|continue|source|target|interrupt)\b[^']*)'")
_SPECIAL = re.compile(r"[*<]")


def filled(text: str, *, first: str = "", rest: str = "") -> list[str]:
    """*text* in lines; *first* and *rest* begin them."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def row(*cells: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def command(name: str, doc: str) -> list[str]:
    """The entry of a command: what gdb's help says of it."""
    summary, *blocks = re.split(r"\n\s*\n", doc)
    lines = ["", f"## kprobe {name}", "", *filled(prose(summary))]
    for block in blocks:
        lines += _block(name, block.splitlines())
    return lines


def _block(name: str, lines: Sequence[str]) -> list[str]:
    if all(line.startswith(f"kprobe {name}") for line in lines):
        return ["", *code(lines)]
    if lines[0] == "Example:":
        return ["", "Example:", "", *code([line.strip() for line in lines[1:]])]
    return ["", *filled(prose(" ".join(lines)))]


def code(lines: Sequence[str]) -> list[str]:
    return ["```text", *lines, "```"]


def prose(text: str) -> str:
    """Text for a terminal: commands in quotes become code, and no character has a meaning of its own."""
    parts = _COMMAND.split(" ".join(text.split()))
    return "".join(f"`{part}`" if at % 2 else _SPECIAL.sub(r"\\\g<0>", part) for at, part in enumerate(parts))


def python(doc: str) -> list[str]:
    """A docstring of Python: literals, roles and fields become Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc).replace("``", "`")
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith(":"):
            fields = re.split(r"^:(?=\w)", paragraph, flags=re.M)[1:]
            lines += ["", *(line for field in fields for line in _field(field))]
        else:
            lines += ["", *filled(" ".join(paragraph.split()))]
    return lines


def _field(text: str) -> list[str]:
    kind, _, said = " ".join(text.split()).partition(": ")
    word, _, name = kind.partition(" ")
    label = f"raises `{name}`" if word == "raises" else f"`{name}`"
    return filled(f"{label}: {said}", first="- ", rest="  ")
