"""``kprobe plan``."""

from __future__ import annotations

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.render.plan import plan as render_plan


class Plan(Command):
    """Show what a probe would do, and change nothing.

    kprobe plan DEFINITION

    The instruction, the bytes before and after, the rung, the slot with its code, and why no better rung.

    Example:
      kprobe plan vfs_read+5"""

    def run(self, argument: str) -> None:
        if not argument:
            raise KprobeError("kprobe plan: where? nothing was given", "for example: kprobe plan vfs_read+5")
        write(render_plan(*api.plan(argument)))

    def candidates(self, text: str) -> list[str]:
        return complete.definition(text)


def register() -> None:
    Plan("plan")
