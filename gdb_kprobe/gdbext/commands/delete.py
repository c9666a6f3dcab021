"""``kprobe delete``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write

_TOLD = 20
"""Of more probes than that only the sum is told."""


class Delete(Command):
    """Delete probes: the guest's text is restored.

    kprobe delete NAME ... | all

    Example:
      kprobe delete open"""

    def run(self, argument: str) -> None:
        delete_named(argument)

    def candidates(self, text: str) -> list[str]:
        return complete.probes(text)


def delete_named(argument: str) -> None:
    """Delete the probes that *argument* names."""
    found = api.named(argument, "kprobe delete")
    api.delete_many(found)
    if len(found) <= _TOLD:
        for probe in found:
            write(f"{probe.name}: deleted after {probe.hits} hit(s).")
    else:
        write(f"{len(found)} probes deleted after {sum(probe.hits for probe in found)} hit(s).")


def register() -> None:
    Delete("delete")
