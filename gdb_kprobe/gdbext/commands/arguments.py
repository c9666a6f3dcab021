"""Arguments that several commands have: what is counted, how often, how long."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands.base import ArgumentParser
from gdb_kprobe.session.probes import Probe


def stats_parser(command: str) -> ArgumentParser:
    """The arguments that ``kprobe stats`` and its MI twin have in common."""
    made = ArgumentParser(command)
    made.add_argument("--interval", type=seconds)
    made.add_argument("--count", type=a_count)
    made.add_argument("--top", type=a_count)
    made.add_argument("names", nargs="*", metavar="NAME")
    return made


def check_stats(args: argparse.Namespace, *, live: bool = False) -> None:
    """:raises KprobeError: *args* of :func:`stats_parser` say how many tables, and not how far apart."""
    if args.count is not None and args.interval is None and not live:
        raise KprobeError("kprobe stats: --count needs an interval", "for example: --interval 1 --count 5")


def counted(names: Sequence[str]) -> tuple[Probe, ...]:
    """The probes of *names*; all where none is named.

    :raises KprobeError: there is none of such a name, or none at all.
    """
    found = api.named(" ".join(names), "kprobe stats") if names else api.probes()
    if not found:
        raise KprobeError("kprobe stats: there are no probes", "'kprobe add SYMBOL' first")
    return found


def seconds(text: str) -> float:
    """Read a time that is given as an argument.

    :raises ValueError: it is no number.
    :raises ArgumentTypeError: it is no time to wait.
    """
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= 86400):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds: give one above 0, at most a day")
    return value


def a_count(text: str) -> int:
    """Read a count that is given as an argument; errors are those of :func:`seconds`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count: give a number from 1")
    return value
