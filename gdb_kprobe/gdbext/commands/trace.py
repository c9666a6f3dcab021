"""``kprobe trace``."""

from __future__ import annotations

import os
import time

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.arguments import seconds
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.output import unpaged
from gdb_kprobe.render.hit import folded, hit_line
from gdb_kprobe.session.probes import Hit, Probe, State


class Trace(Command):
    """Run the guest and print hits as they come, until Ctrl-C.

    kprobe trace [-n COUNT] [--for SECONDS] [NAME ...]

    Prints the hits of the named probes, or of all. With -n the guest is stopped after COUNT of them, with --for after
    so many seconds. Each hit that is printed stops the guest for a moment, some 10 ms; other probes go on counting.
    Afterwards the guest is stopped and at your disposal, at an address of its own.

    Example:
      kprobe trace -n 10 open"""

    def run(self, argument: str) -> None:
        args = _parser().parse_args(gdb.string_to_argv(argument))
        if args.count is not None and args.count < 1:
            raise KprobeError(f"kprobe trace: -n {args.count} is not a count", "give a number from 1")
        api.need_attached()
        wanted = api.named(" ".join(args.names), "kprobe trace") if args.names else api.probes()
        if not any(api.state(probe) is State.ARMED for probe in wanted):
            raise KprobeError("kprobe trace: no probe is armed", "'kprobe add SYMBOL' first; 'kprobe list'")
        for probe in wanted:
            site = api.site(probe)
            if site is not None and site.is_saved:
                write(f"{probe.name}: its hits are counted, and not shown: a kprobe of the guest's is on its jump.")
        trace = _Trace(wanted, args.count)
        try:
            write("Tracing; Ctrl-C ends it.")
            gdb.flush()
            with unpaged():
                if args.seconds is None:
                    api.run()
                else:
                    api.resume_until(args.seconds)
        except BaseException:
            trace.end()
            raise
        # Under an asynchronous MI front end the guest still runs here; then the stop ends the trace.
        if not api.is_running():
            trace.end()

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), complete.probes, text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("trace")
    parser.add_argument("-n", dest="count", type=int)
    parser.add_argument("--for", dest="seconds", type=seconds, metavar="SECONDS")
    parser.add_argument("names", nargs="*")
    return parser


class _Trace:
    """Prints hits, and asks for the prompt after *count* of them; ends at the next stop for the user."""

    def __init__(self, wanted: tuple[Probe, ...], count: int | None) -> None:
        self._count = count
        self._shown = 0
        self._started = time.monotonic()
        self._unsubscribe = api.on_hit(self._print, wanted)
        self._over = False
        gdb.events.stop.connect(self._on_stop)

    def end(self) -> None:
        """Stop printing, and say how many there were. Nothing happens the second time."""
        if self._over:
            return
        self._over = True
        gdb.events.stop.disconnect(self._on_stop)
        self._unsubscribe()
        write(f"{self._shown} hit(s) in {time.monotonic() - self._started:.2f} s.")

    def _on_stop(self, event: gdb.StopEvent) -> None:
        self.end()

    def _print(self, hit: Hit) -> None:
        if self._count is not None and self._shown >= self._count:
            return
        self._shown += 1
        write(folded(hit_line(hit, time.monotonic() - self._started), _width()))
        gdb.flush()
        if self._shown == self._count:
            api.stop_after_hit()


def _width() -> int | None:
    """The characters of a line of the terminal; ``None`` where there is none, or lines may have any length."""
    width = gdb.parameter("width")
    # One less: gdb breaks a line that fills the last column.
    return width - 1 if isinstance(width, int) and width > 1 and os.isatty(1) else None


def register() -> None:
    Trace("trace")
