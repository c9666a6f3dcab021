"""The user's steps: what is done before gdb makes one."""

from __future__ import annotations

import contextlib

import gdb

from gdb_kprobe.errors import ReportedError
from gdb_kprobe.gdbext.attachments import Attachments
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.session.hits.stepping import Step


class UserSteps:
    """What :mod:`gdb_kprobe.gdbext.stops` has gdb call before the user's stepping commands, and after them."""

    def __init__(self, attachments: Attachments) -> None:
        self._attachments = attachments
        self._locking = ""
        """The user's scheduler-locking, to be set again after a ``stepi``."""

    def before_stepi(self) -> None:
        """The user typed ``stepi``: one instruction of one vCPU, and no hit of another one in between.

        The stub tells of one vCPU that stopped. A hit elsewhere at the moment of the step hides that it was made, and
        gdb would make another one.
        """
        if self._attachments.link is not None and gdb.parameter("scheduler-locking") != "on":
            self._locking = str(gdb.parameter("scheduler-locking"))
            gdb.execute("set scheduler-locking on")
        self.before_step()

    def before_step(self) -> None:
        """The user typed a command that gdb executes by single steps, as far as it stays in a function."""
        link = self._attachments.link
        if link is None or gdb.selected_thread() is None or is_running():
            return
        alone = gdb.parameter("scheduler-locking") == "on"
        # Whatever goes wrong here, the resume finds it, too, and says so.
        with contextlib.suppress(ReportedError, gdb.error):
            level = gdb.selected_frame().level()
            frames = _program_counters()
            with link.stopped() as cpu:
                link.session.prepare_step(Step(cpu, alone, frames))
            if level:
                gdb.execute(f"frame level {level}", to_string=True)

    def made(self) -> None:
        """The machine has stopped for the user, perhaps after a step."""
        if self._locking:
            gdb.execute(f"set scheduler-locking {self._locking}")
            self._locking = ""


def _program_counters() -> tuple[int, ...]:
    """Where the two innermost frames of gdb's current thread are."""
    counters: list[int] = []
    with contextlib.suppress(gdb.error):
        frame: gdb.Frame | None = gdb.newest_frame()
        while frame is not None and len(counters) < 2:
            counters.append(int(frame.pc()))
            frame = frame.older()
    return tuple(counters)
