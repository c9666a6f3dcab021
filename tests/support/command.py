"""The commands of ``./install.sh`` that are rooms of the tests, such as ``./install.sh torture``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from gdb_kprobe.errors import ReportedError
from kprobe_guest.errors import GuestError


@dataclass(frozen=True, slots=True)
class Command:
    """The package ``tests.NAME`` as a program: *arguments* declares its options, *run* returns the exit status."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run it with the words *argv*, those of the process by default; returns the exit status.

        *run* finds the words in ``options.words``.
        """
        words = sys.argv[1:] if argv is None else list(argv)
        parser = argparse.ArgumentParser(prog=f"./install.sh {self.name}", description=self.summary)
        self.arguments(parser)
        options = parser.parse_args(words)
        options.words = words
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)
        try:
            return self.run(options)
        except (ReportedError, GuestError) as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 1
        except ValueError as error:  # of a guest that cannot be
            parser.error(str(error))
        except KeyboardInterrupt:
            return 130


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Undo on the way out what was begun: guests, chroots, what runs in them."""
    raise SystemExit(128 + number)


def python_words(name: str, *words: str) -> list[str]:
    """Return what follows ``python`` to run the command *name* with *words*, as ``./install.sh`` does.

    -P: the current directory may hold another package ``tests``.
    """
    return ["-P", "-m", f"tests.{name}", *words]
