"""``kprobe stats``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import gdb

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.arguments import check_stats, counted, stats_parser
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.output import InPlace, unpaged
from gdb_kprobe.render.stats import as_data, stats
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import Statistics, statistics

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
        check_stats(args, live=args.live)
        api.need_attached()
        probes = counted(args.names)
        if args.live:
            if api.is_running():
                raise GuestStateError("the guest runs already", "leave --live away: 'kprobe stats --interval 1'")
            if not args.json:
                write("Ctrl-C stops the guest, and ends it.")
                gdb.flush()
            live = _Tables(probes, args.count, args.top, args.json, InPlace())
            with unpaged():
                api.watch(probes, args.interval or _INTERVAL, live.show)
        elif args.interval is None:
            _show(statistics(probes, None, api.counts(probes), args.top), args.json)
        else:
            tables = _Tables(probes, args.count or 1, args.top, args.json)
            try:
                with unpaged():
                    api.sample(probes, args.interval, tables.show)
            except KeyboardInterrupt:
                write("Ended; the guest runs on.")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), complete.probes, text)


def _parser() -> ArgumentParser:
    made = stats_parser("stats")
    made.add_argument("--live", action="store_true")
    made.add_argument("--json", action="store_true")
    return made


def _show(found: Statistics, as_json: bool) -> None:
    write(json.dumps(as_data(found)) if as_json else stats(found))
    gdb.flush()


class _Tables:
    """Shows a table of each interval, *count* of them or any number; *screen*: each in the place of the one before."""

    def __init__(
        self, probes: Sequence[Probe], count: int | None, top: int | None, as_json: bool, screen: InPlace | None = None
    ) -> None:
        self._probes = probes
        self._left = count
        self._top = top
        self._as_json = as_json
        self._screen = screen

    def show(self, before: api.Reading, after: api.Reading) -> bool:
        """Show the next one; whether it was the last."""
        if self._screen is None or self._as_json:
            _show(statistics(self._probes, before, after, self._top), self._as_json)
        else:
            top = min(filter(None, (self._top, self._screen.rows)), default=None)
            self._screen.show(stats(statistics(self._probes, before, after, top)))
        if self._left is not None:
            self._left -= 1
        return self._left == 0


def register() -> None:
    Stats("stats")
