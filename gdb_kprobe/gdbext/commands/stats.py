"""``kprobe stats``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import gdb

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.counters import need_live, read
from gdb_kprobe.gdbext.output import InPlace, unpaged
from gdb_kprobe.gdbext.plugin import Link
from gdb_kprobe.gdbext.sampling import check_arguments, parser, samples, totals, wanted
from gdb_kprobe.gdbext.ticker import Ticker
from gdb_kprobe.gdbext.views import stats_view
from gdb_kprobe.render.stats import StatsView, as_data, stats
from gdb_kprobe.session.probes import Probe

_INTERVAL = 1.0
"""Seconds between two tables of ``--live``, unless it is told."""


class Stats(Command):
    """Show how often probes are hit, and how fast; also while the guest runs.

    kprobe stats [--top N] [--json] [NAME ... | all]
    kprobe stats --interval SECONDS [--count N] [--top N] [--json] [NAME ...]
    kprobe stats --live [--interval SECONDS] [--count N] [--top N] [--json] [NAME ...]

    The first shows totals. With --interval it waits, and shows the hits a second; with --count so many times. The guest
    must be running then ('continue &'); Ctrl-C ends it, and the guest runs on.
    With --live the guest is resumed, a table shown every second (or SECONDS) until Ctrl-C or COUNT of them, and the
    guest is stopped again.
    The fastest probes come first; --top N shows N of them, the total is that of all. --json writes a line of JSON for
    each table. 'kprobe info' says whether counters can be read while the guest runs.

    Example:
      kprobe stats --live --interval 0.5 --count 10"""

    def run(self, argument: str) -> None:
        args = _parser().parse_args(gdb.string_to_argv(argument))
        check_arguments(args, live=args.live)
        link = plugin.the_plugin().need_link()
        probes = wanted(args.names)
        if args.live:
            if is_running():
                raise GuestStateError("the guest runs already", "leave --live away: 'kprobe stats --interval 1'")
            if not args.json:
                write("Ctrl-C stops the guest, and ends it.")
                gdb.flush()
            live = _Live(link, probes, args.count, args.top, args.json)
            with unpaged():
                Ticker(link, args.interval or _INTERVAL, live.look).run()
        elif args.interval is None:
            _show(totals(link, probes, args.top), args.json)
        else:
            try:
                with unpaged(), link.interrupts.lent():
                    for view in samples(link, probes, args.interval, args.count or 1, args.top):
                        _show(view, args.json)
            except KeyboardInterrupt:
                write("Ended; the guest runs on.")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), complete.probes, text)


def _parser() -> ArgumentParser:
    made = parser("stats")
    made.add_argument("--live", action="store_true")
    made.add_argument("--json", action="store_true")
    return made


def _show(view: StatsView, as_json: bool) -> None:
    write(json.dumps(as_data(view)) if as_json else stats(view))
    gdb.flush()


class _Live:
    """Shows a table each time that it is asked, *count* times."""

    def __init__(self, link: Link, probes: Sequence[Probe], count: int | None, top: int | None, as_json: bool) -> None:
        """:raises GuestStateError: the counters cannot be read while the guest runs."""
        need_live(link, probes)
        self._link = link
        self._probes = probes
        self._left = count
        self._top = top
        self._as_json = as_json
        self._screen = InPlace()
        self._before = read(link, probes)

    def look(self) -> bool:
        """Show the next one; whether it was the last."""
        after = read(self._link, self._probes)
        if self._as_json:
            _show(stats_view(self._probes, self._before, after, self._top), as_json=True)
        else:
            top = min(filter(None, (self._top, self._screen.rows)), default=None)
            self._screen.show(stats(stats_view(self._probes, self._before, after, top)))
        self._before = after
        if self._left is not None:
            self._left -= 1
        return self._left == 0


def register() -> None:
    Stats("stats")
