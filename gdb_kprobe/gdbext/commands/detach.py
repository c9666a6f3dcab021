"""``kprobe detach``."""

from __future__ import annotations

import gdb

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write


class Detach(Command):
    """Undo everything in the guest and let it run.

    kprobe detach [--stay]

    The text of every probe is restored and verified, the region unmapped; then gdb disconnects and the guest runs.
    With --stay gdb stays connected, the guest stopped.
    A stack that leads into one of our slots (a task was preempted there) keeps the region mapped: a note says so.

    Example:
      kprobe detach"""

    def run(self, argument: str) -> None:
        args = _parser().parse_args(gdb.string_to_argv(argument))
        done = api.detach()
        write(f"{done.restored} site(s) restored; the region is {'unmapped' if done.unmapped else 'still mapped'}.")
        for note in done.notes:
            write(f"Note: {note}.")
        for problem in done.problems:
            write(f"left alone: {problem}")
        if not args.stay:
            gdb.execute("detach", to_string=True)
            write("Detached; the guest runs.")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), lambda token: (), text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("detach")
    parser.add_argument("--stay", action="store_true")
    return parser


def register() -> None:
    Detach("detach")
