"""What happens on gdb's events: the guest is resumed, it stops, the connection goes, gdb ends."""

from __future__ import annotations

import contextlib
import sys

import gdb

from gdb_kprobe.errors import ConnectionLostError, GuestResetError, GuestStateError, ReportedError
from gdb_kprobe.gdbext.attachments import Attachments
from gdb_kprobe.gdbext.channel import flush_registers, is_running
from gdb_kprobe.gdbext.guard import ConnectionGuard
from gdb_kprobe.gdbext.signals import sigint_takers, uninterrupted
from gdb_kprobe.gdbext.steps import UserSteps
from gdb_kprobe.watchdog.states import State

_MOVING_REGISTERS = (7, 16)
"""gdb's numbers of rsp and rip (amd64-tdep.h)."""


class Events:
    """What :mod:`gdb_kprobe.gdbext.stops` has gdb call."""

    def __init__(self, attachments: Attachments, guard: ConnectionGuard, steps: UserSteps) -> None:
        self._attachments = attachments
        self._guard = guard
        self._steps = steps
        self._settling = False
        self._takers: set[int] = set()
        """Threads of the user's that were warned of."""

    def on_resumed(self, interrupted: bool) -> None:
        """gdb is about to resume the guest for the user (not after a stop that is only ours).

        *interrupted*: a Ctrl-C came at the same time.
        """
        link = self._attachments.link
        if link is None:
            return
        link.interrupts.resumed()
        if interrupted:
            link.interrupts.request()
        self._tell_takers()
        with uninterrupted():
            # Before there is a site that needs it, and when gdb knows what it has in QEMU.
            if link.breakpoints.any_inserted:
                link.watchdog.tell(State.WATCHED)
            try:
                for problem in link.arm_all():
                    gdb.write(f"kprobe: {problem}\n", gdb.STDERR)
            except ReportedError as error:
                gdb.write(f"kprobe: no probe is armed: {error}\n", gdb.STDERR)
                if isinstance(error, GuestResetError):
                    self._attachments.drop_running(link)
            link.tell_failures()
            link.watchdog.tell(State.WATCHED if link.breakpoints.any_inserted else State.RUNNING)
            if link.watchdog.problem:
                gdb.write(f"kprobe: {link.watchdog.problem}.\n", gdb.STDERR)
                link.watchdog.problem = ""

    def _tell_takers(self) -> None:
        """Warn, once, of each thread of the user's that may be given a Ctrl-C."""
        takers = sigint_takers()
        for number in takers.keys() - self._takers:
            gdb.write(
                f"kprobe: the thread {takers[number]} may be given a Ctrl-C, which is lost then (and ends gdb 16 and "
                'later): start it with SIGINT held back (docs/guide/python.md, "Scripts").\n',
                gdb.STDERR,
            )
        self._takers |= takers.keys()

    def on_stop(self) -> None:
        """The machine stopped for the user."""
        self._steps.made()
        if self._settling:
            return
        link = self._attachments.link
        self._attachments.stopped()
        if link is None:
            self._look()
            return
        link.stop_requested = False
        self._settling = True
        try:
            link.interrupts.stopped()
            link.settle()
            link.watchdog.tell(State.STOPPED)
        except ConnectionLostError:
            pass  # the event of the lost connection follows
        except ReportedError as error:
            if not isinstance(error, GuestStateError):
                gdb.write(f"kprobe: {error}\n", gdb.STDERR)
                link.watchdog.tell(State.STOPPED)  # no int3 is in the text all the same
        finally:
            link.tell_failures()
            self._settling = False
            link.interrupts.release()
        if self._attachments.link is None:
            self._look(again=True)

    def after_monitor(self) -> None:
        """The user has given QEMU a command, which may have been ``loadvm`` or ``system_reset``."""
        if self._settling or gdb.selected_thread() is None or is_running():
            return
        if self._attachments.link is not None:
            flush_registers()
            self.on_stop()
        elif not self._guard.is_on:
            self._look(again=True)

    def _look(self, *, again: bool = False) -> None:
        """Look for what earlier sessions have left in the guest."""
        self._settling = True
        try:
            self._guard.look(again=again)
        finally:
            self._settling = False

    def on_register(self, event: gdb.RegisterChangedEvent) -> None:
        """The user has written a register."""
        if int(event.regnum) in _MOVING_REGISTERS:
            self.before_move()

    def before_move(self) -> None:
        """The user is about to make the program go on somewhere else."""
        if self._attachments.link is not None:
            self._attachments.link.session.moved()

    def before_detach(self) -> None:
        """The user is about to take gdb's connection away."""
        if self._attachments.link is None:
            self._guard.leave()
            return
        try:
            done = self._attachments.detach()
        except GuestResetError as error:
            gdb.write(f"kprobe: {error.message}.\n", gdb.STDERR)
            return
        except GuestStateError:
            self._attachments.rescue()
            return
        except ReportedError as error:
            raise gdb.GdbError(str(error)) from error
        if done.restored:
            gdb.write(f"kprobe: {done.restored} site(s) restored.\n")
        for left in (*done.notes, *done.problems):
            gdb.write(f"kprobe: {left}.\n", gdb.STDERR)

    def on_lost(self) -> None:
        """gdb's connection is gone (it was lost, or an MI client detached)."""
        if self._attachments.link is not None:
            with uninterrupted():
                self._attachments.rescue()
        else:
            self._guard.rescue()

    def on_exit(self, killed: bool) -> None:
        """gdb ends. It may be in the middle of anything, also of a run.

        *killed*: by a SIGTERM. Then nothing may be asked of gdb: it would end at the first packet, the work half done.
        """
        if self._attachments.link is None:
            self._guard.leave(killed=killed)
            return
        with uninterrupted():
            if not killed:
                with contextlib.suppress(ReportedError, gdb.error, KeyboardInterrupt):
                    done = self._attachments.detach()
                    for left in (*done.notes, *done.problems):
                        print(f"kprobe: {left}.", file=sys.stderr, flush=True)
            # Reset: nothing is to be restored, and gdb's own way out lets the guest run.
            if self._attachments.link is not None:
                self._attachments.rescue(ends=True)
