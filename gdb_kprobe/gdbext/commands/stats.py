"""``kprobe stats``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

import gdb

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.output import InPlace, unpaged
from gdb_kprobe.gdbext.plugin import Link
from gdb_kprobe.gdbext.sampling import check_arguments, need_live, parser, read, samples, totals, wanted
from gdb_kprobe.gdbext.signals import uninterrupted
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
            if not args.json:
                write("Ctrl-C stops the guest, and ends it.")
                gdb.flush()
            with unpaged():
                _run_live(link, _Live(link, probes, args.interval or _INTERVAL, args.count, args.top, args.json))
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


def _run_live(link: Link, live: _Live) -> None:
    live.start()
    try:
        gdb.execute("continue")
    except KeyboardInterrupt:
        pass
    except BaseException:
        live.end()
        raise
    # Should the guest still run (a front end that does not wait for it), the stop ends it.
    if not is_running():
        live.end()
    if plugin.the_plugin().link is not link:
        raise KprobeError("the connection to the guest was lost meanwhile", "'kprobe attach' again")


class _Live:
    """Shows a table every *interval* seconds while the guest runs for the user, *count* of them; ends at the next stop.

    A thread tells the time and nothing else: it posts an event, never a second one before the first was served, for
    gdb 13 crashes when it ends with many of them waiting.
    """

    def __init__(
        self, link: Link, probes: Sequence[Probe], interval: float, count: int | None, top: int | None, as_json: bool
    ) -> None:
        self._link = link
        self._probes = probes
        self._interval = interval
        self._left = count
        self._top = top
        self._as_json = as_json
        self._screen = InPlace()
        self._over = threading.Event()
        self._posted = False
        self._thread = threading.Thread(target=self._tick, name="kprobe-stats", daemon=True)

    def start(self) -> None:
        """Begin to count. The guest is stopped, and is resumed next.

        :raises GuestStateError: it runs already, or its counters cannot be read while it does.
        """
        if is_running():
            raise GuestStateError("the guest runs already", "leave --live away: 'kprobe stats --interval 1'")
        need_live(self._link, self._probes)
        self._before = read(self._link, self._probes)
        gdb.events.stop.connect(self._on_end)
        gdb.events.gdb_exiting.connect(self._on_end)
        with uninterrupted():  # a new thread inherits the mask
            self._thread.start()

    def end(self) -> None:
        """Show nothing any more. Nothing happens the second time."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        gdb.events.stop.disconnect(self._on_end)
        gdb.events.gdb_exiting.disconnect(self._on_end)

    def _on_end(self, event: object) -> None:
        self.end()

    def _tick(self) -> None:
        due = time.monotonic()
        while True:
            due += self._interval
            if self._over.wait(max(0.0, due - time.monotonic())):
                return
            if not self._posted:
                self._posted = True
                gdb.post_event(self._on_tick)

    def _on_tick(self) -> None:
        self._posted = False
        if self._over.is_set() or self._left == 0:
            return
        if plugin.the_plugin().link is not self._link:
            self.end()
            return
        try:
            after = read(self._link, self._probes)
            if self._as_json:
                _show(stats_view(self._probes, self._before, after, self._top), as_json=True)
            else:
                top = min(filter(None, (self._top, self._screen.rows)), default=None)
                self._screen.show(stats(stats_view(self._probes, self._before, after, top)))
        except KprobeError as error:
            gdb.write(f"kprobe: {error}\n", gdb.STDERR)
            self._left = 0
        else:
            self._before = after
            if self._left is not None:
                self._left -= 1
        if self._left == 0:
            self._link.interrupts.request()


def register() -> None:
    Stats("stats")
