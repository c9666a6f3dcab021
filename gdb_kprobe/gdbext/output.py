"""Output that is read while it comes: gdb's pager does not stop it, and at a terminal it is drawn in place."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import gdb

_TO_FRONT_END = re.compile(r"--?i(nterpreter)?(=mi\d?|$)")
"""gdb's option that has it talk to a program (and, at the end of a word, has the interpreter in the next one)."""

_OF_TABLE = 5
"""Lines of a table that are no rows, and the one that the cursor is on."""


@contextlib.contextmanager
def unpaged() -> Iterator[None]:
    """Around output that comes as time goes on: a pager would wait for the user, and the guest with it."""
    if not gdb.parameter("pagination"):
        yield
        return
    gdb.execute("set pagination off", to_string=True)
    try:
        yield
    finally:
        gdb.execute("set pagination on", to_string=True)


class InPlace:
    """Shows one text after another: at a terminal each in the place of the one before, else all of them."""

    def __init__(self) -> None:
        self._redraws = is_terminal()
        self._shown = 0

    @property
    def rows(self) -> int | None:
        """Rows of a table that fit; ``None`` for any number."""
        height = gdb.parameter("height")
        return max(1, int(height) - _OF_TABLE) if self._redraws and height else None

    def show(self, text: str) -> None:
        """Show *text*, whole lines."""
        lines = text.rstrip("\n").splitlines()
        back = f"\x1b[{self._shown}A\x1b[J" if self._redraws and self._shown else ""
        gdb.write(back + "\n".join(lines) + "\n")
        gdb.flush()
        self._shown = len(lines)


def is_terminal() -> bool:
    """Whether gdb talks to a person at a terminal whose cursor can be moved."""
    if not os.isatty(1) or os.environ.get("TERM", "dumb") == "dumb":
        return False
    words = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    return not any(_TO_FRONT_END.fullmatch(word) for word in words)
