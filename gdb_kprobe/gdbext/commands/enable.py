"""``kprobe enable`` and ``kprobe disable``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write


class _Switch(Command):
    verb = ""
    enabled = True

    def run(self, argument: str) -> None:
        for probe in api.named(argument, f"kprobe {self.verb}"):
            api.set_enabled(probe, self.enabled)
            write(f"{probe.name}: {self.verb}d.")

    def candidates(self, text: str) -> list[str]:
        return complete.probes(text)


class Enable(_Switch):
    """Arm probes again that were disabled.

    kprobe enable NAME ... | all

    Example:
      kprobe enable open"""

    verb = "enable"


class Disable(_Switch):
    """Disable probes: the guest's text is restored, the probes and their counts stay.

    While the guest runs ('continue &') a probe that is handled inside the guest is switched by one store.

    kprobe disable NAME ... | all

    Example:
      kprobe disable open"""

    verb = "disable"
    enabled = False


def register() -> None:
    Enable("enable")
    Disable("disable")
