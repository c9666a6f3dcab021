"""``kprobe list``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.render.probes import probe_list


class List(Command):
    """List all probes: address, place, rung, state, hits and misses.

    kprobe list

    Example:
      kprobe list"""

    def run(self, argument: str) -> None:
        write(probe_list([api.info(probe) for probe in api.probes()]))


def register() -> None:
    List("list")
