"""``kprobe delete``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write


class Delete(Command):
    """Delete probes: the guest's text is restored.

    kprobe delete NAME ... | all

    Example:
      kprobe delete open"""

    def run(self, argument: str) -> None:
        delete_named(argument)

    def complete(self, text: str, word: str) -> list[str]:
        return complete.probes(word)


def delete_named(argument: str) -> None:
    """Delete the probes that *argument* names."""
    for probe in api.named(argument, "kprobe delete"):
        api.delete(probe)
        write(f"{probe.name}: deleted after {probe.hits} hit(s).")


def register() -> None:
    Delete("delete")
