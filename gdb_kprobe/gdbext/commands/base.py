"""What the commands have in common: errors, arguments, completion."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import gdb

from gdb_kprobe.errors import KprobeError, NotAttachedError
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.errors import user_errors

_TENTH = 10
"""Percent."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose mistakes are errors of ours and end nothing."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"kprobe {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise KprobeError(f"{self.prog}: {message}", f"{self.format_usage().strip()}; 'help {self.prog}'")


class Command(gdb.Command):
    """One sub-command; a subclass's docstring is its help, its :meth:`run` does the work."""

    def __init__(self, name: str) -> None:
        self._name = f"kprobe {name}"
        super().__init__(self._name, gdb.COMMAND_BREAKPOINTS)

    def invoke(self, argument: str, from_tty: bool) -> None:
        with user_errors(), naming(self._name):
            self.run(argument.strip())

    def run(self, argument: str) -> None:
        """Do the work; errors are :class:`~gdb_kprobe.errors.KprobeError`."""
        raise NotImplementedError

    def complete(self, text: str, word: str | None) -> list[str]:
        return complete.answer(self.candidates, text, word)

    def candidates(self, text: str) -> Iterable[str]:
        """What the last word of *text* may become: whole words, which need not begin with what there is of it."""
        return ()


@contextlib.contextmanager
def naming(command: str) -> Iterator[None]:
    """Name the *command* in the error that gdb is attached to no guest, which can be of any of them."""
    try:
        yield
    except NotAttachedError as error:
        error.message = f"{command}: {error.message}"
        raise


class Progress:
    """Tells every tenth of something long, but for the last; *line* makes the text of how much of how much is done."""

    def __init__(self, line: Callable[[int, int], str]) -> None:
        self._line = line
        self._told = 0

    def __call__(self, done: int, of: int) -> None:
        percent = done * 100 // of
        if self._told + _TENTH <= percent < 100:
            self._told = percent
            write(self._line(done, of))
            gdb.flush()


def write(text: str) -> None:
    """Show *text* (with a newline) to the user."""
    gdb.write(text.rstrip("\n") + "\n")
