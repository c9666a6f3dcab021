"""Reading what probes have counted, at stops and while the guest runs: for ``kprobe stats`` and its twins."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.commands.base import ArgumentParser
from gdb_kprobe.gdbext.counters import read
from gdb_kprobe.gdbext.plugin import Link
from gdb_kprobe.gdbext.views import stats_view
from gdb_kprobe.render.stats import StatsView
from gdb_kprobe.session.probes import Probe


def parser(command: str) -> ArgumentParser:
    """The arguments that the command and its MI twin have in common."""
    made = ArgumentParser(command)
    made.add_argument("--interval", type=seconds)
    made.add_argument("--count", type=a_count)
    made.add_argument("--top", type=a_count)
    made.add_argument("names", nargs="*", metavar="NAME")
    return made


def check_arguments(args: argparse.Namespace, *, live: bool = False) -> None:
    """:raises KprobeError: *args* of :func:`parser` say how many tables, and not how far apart."""
    if args.count is not None and args.interval is None and not live:
        raise KprobeError("kprobe stats: --count needs an interval", "for example: --interval 1 --count 5")


def wanted(names: Sequence[str]) -> tuple[Probe, ...]:
    """The probes of *names*; all where none is named.

    :raises KprobeError: there is none of such a name, or none at all.
    """
    found = api.named(" ".join(names), "kprobe stats") if names else api.probes()
    if not found:
        raise KprobeError("kprobe stats: there are no probes", "'kprobe add SYMBOL' first")
    return found


def totals(link: Link, probes: Sequence[Probe], top: int | None) -> StatsView:
    """What *probes* have counted since they were added."""
    return stats_view(probes, None, read(link, probes), top)


def samples(link: Link, probes: Sequence[Probe], interval: float, count: int, top: int | None) -> Iterator[StatsView]:
    """*count* times what *probes* have counted in *interval* seconds, of a guest that runs in the background.

    gdb waits meanwhile. Whoever uses it lets Ctrl-C through (:meth:`InterruptWatch.lent`): then it is a
    KeyboardInterrupt, and the guest runs on.

    :raises GuestStateError: it does not run, or there are hits that gdb would have to handle.
    """
    if not is_running():
        raise GuestStateError(
            "the guest is stopped: nothing is hit meanwhile",
            "'kprobe stats --live' lets it run; or 'continue &' first; without --interval the totals are shown",
        )
    handled = [site for site in link.session.table.armed() if site.stops]
    if handled:
        place = link.session.guest.place_of(handled[0].addr)
        raise GuestStateError(
            f"hits of {place} are handled by gdb, which cannot do so while it waits here",
            "interrupt the guest, then 'kprobe stats --live'; or leave --interval away",
        )
    before = read(link, probes)
    due = before.moment
    for _ in range(count):
        due += interval
        time.sleep(max(0.0, due - time.monotonic()))
        after = read(link, probes)
        yield stats_view(probes, before, after, top)
        before = after


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
