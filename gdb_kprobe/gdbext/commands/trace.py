"""``kprobe trace``."""

from __future__ import annotations

import time

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api, plugin
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.views import hit_view
from gdb_kprobe.render.hit import hit_line
from gdb_kprobe.session.probes import Hit, Probe


class Trace(Command):
    """Run the guest and print hits as they come, until Ctrl-C.

    kprobe trace [-n COUNT] [NAME ...]

    Prints the hits of the named probes, or of all. With -n the guest is stopped after COUNT of them.
    Afterwards the guest is stopped and at your disposal, at an address of its own.

    Example:
      kprobe trace -n 10 open"""

    def run(self, argument: str) -> None:
        parser = ArgumentParser("trace")
        parser.add_argument("-n", dest="count", type=int)
        parser.add_argument("names", nargs="*")
        args = parser.parse_args(gdb.string_to_argv(argument))
        if args.count is not None and args.count < 1:
            raise KprobeError(f"kprobe trace: -n {args.count} is not a count", "give a number from 1")
        link = plugin.the_plugin().need_link()
        wanted = api.named(" ".join(args.names), "kprobe trace") if args.names else api.probes()
        if not any(probe.enabled for probe in wanted):
            raise KprobeError("kprobe trace: no probe is armed", "'kprobe add SYMBOL' first; 'kprobe list'")
        printer = _Printer(wanted, args.count)
        end = api.on_hit(printer)
        try:
            write("Tracing; Ctrl-C ends it.")
            gdb.flush()
            gdb.execute("continue")
        except KeyboardInterrupt:
            pass
        finally:
            end()
            plugin.the_plugin().stop_requested = False
        write(f"{printer.shown} hit(s) in {time.monotonic() - printer.started:.2f} s.")
        if plugin.the_plugin().link is not link:
            raise KprobeError("the connection to the guest was lost while tracing", "'kprobe attach' again")

    def complete(self, text: str, word: str) -> list[str]:
        return complete.probes(word)


class _Printer:
    """A listener that prints, and asks for the prompt after *count* hits."""

    def __init__(self, wanted: tuple[Probe, ...], count: int | None) -> None:
        self._wanted = wanted
        self._count = count
        self.shown = 0
        self.started = time.monotonic()

    def __call__(self, hit: Hit) -> None:
        if hit.probe not in self._wanted:
            return
        if self._count is not None and self.shown >= self._count:
            return
        self.shown += 1
        gdb.write(hit_line(hit_view(hit, time.monotonic() - self.started)) + "\n")
        gdb.flush()
        if self.shown == self._count:
            plugin.the_plugin().stop_requested = True


def register() -> None:
    Trace("trace")
