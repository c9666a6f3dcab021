"""``kprobe doctor``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.render.doctor import doctor


class Doctor(Command):
    """Say what the guest and its QEMU offer to probes, and what would make it better.

    kprobe doctor

    The guest must be stopped; an attach is not needed, a connection of gdb's ('target remote ...') is enough.
    Nothing is written. Lines that begin with '!' have a hint.

    Example:
      kprobe doctor"""

    def run(self, argument: str) -> None:
        write(doctor(api.doctor()))


def register() -> None:
    Doctor("doctor")
