"""``kprobe until``."""

from __future__ import annotations

import argparse

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.arguments import a_count, seconds
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write


class RunUntil(Command):
    """Run the guest for a time, or until a probe was hit so often, and stop it again.

    kprobe until SECONDS
    kprobe until NAME COUNT [--within SECONDS]

    COUNT are hits from now on. Counters are read a hundred times a second: the guest is stopped with so many hits, or
    some more. With --within it is an error when they do not come in time; the guest is stopped then, too.
    Ctrl-C, a breakpoint and all else that stops the guest end it before. A front end that does not wait for the guest
    (MI with mi-async) gets the stop as that of an 'interrupt'.

    Example:
      kprobe until open 1000 --within 30"""

    def run(self, argument: str) -> None:
        args = _parser().parse_args(gdb.string_to_argv(argument))
        api.need_attached()
        if args.count is None:
            if args.within is not None:
                raise KprobeError("kprobe until: --within needs NAME and COUNT", "for example: open 10 --within 5")
            api.resume_until(_seconds_of(args.what))
            return
        probe = api.get(args.what)
        run = api.resume_until(args.within, probe, args.count)
        if not run.is_over:
            return
        if not run.is_reached and args.within is not None:
            raise KprobeError(
                f"{probe.name} was hit {run.hits} time(s), and not {args.count}, before the guest was stopped",
                "the guest had too little time, or something else has stopped it",
            )
        write(f"{probe.name}: {run.hits} hit(s).")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), complete.probes, text)


def _seconds_of(text: str) -> float:
    try:
        return seconds(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise KprobeError(
            f"kprobe until: {text} is no number of seconds", "'kprobe until 2'; of a probe: 'kprobe until NAME COUNT'"
        ) from None


def _parser() -> ArgumentParser:
    parser = ArgumentParser("until")
    parser.add_argument("what", metavar="SECONDS|NAME")
    parser.add_argument("count", type=a_count, nargs="?", metavar="COUNT")
    parser.add_argument("--within", type=seconds, metavar="SECONDS")
    return parser


def register() -> None:
    RunUntil("until")
