"""At every connection: if the guest has probes that an earlier gdb left armed, it cannot run without their breakpoint.

gdb may be connected by hand, long before or without ``kprobe attach``. The first stop of a connection, which gdb makes
while it connects, is where this happens; the guest has not run since QEMU stopped it for us.
"""

from __future__ import annotations

import sys

import gdb

from gdb_kprobe.errors import ConnectionLostError, RegionError, ReportedError
from gdb_kprobe.gdbext.breakpoints import GdbBreakpoints
from gdb_kprobe.gdbext.channel import GdbChannel, selected_cpu
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.session.recovery.orphans import Leftover, find_leftover
from gdb_kprobe.session.rescue import cut, rescue_leftover
from gdb_kprobe.target.stub import QemuStub

_ATTACH = "'kprobe adopt PROFILE' goes on with them, 'kprobe restore PROFILE' puts their text back"


class Guard:
    """One connection to a guest whose probes have no session."""

    def __init__(self, stub: QemuStub, channel: GdbChannel, leftover: Leftover) -> None:
        self.leftover = leftover
        self._stub = stub
        self._channel = channel
        self._descriptor = channel.descriptor
        self._breakpoints = GdbBreakpoints(self._on_entry)
        self._breakpoints.insert(leftover.bp_entry)

    def release(self) -> None:
        """Take the breakpoint away: the text is restored, or a session takes over."""
        self._breakpoints.remove(self.leftover.bp_entry)
        self._breakpoints.tidy()

    def restore(self) -> None:
        """Put the text back over gdb's connection, before it goes away.

        :raises KprobeError: the guest runs, or does not answer.
        """
        with uninterrupted(), self._channel.borrowed(self._stub):
            notes = self.leftover.restore(self._stub)
        self.release()
        gdb.write(f"kprobe: {self.leftover.sites} site(s) of an earlier session restored.\n")
        for note in notes:
            gdb.write(f"kprobe: {note}.\n")

    def rescue(self) -> None:
        """Put the text back over a connection of our own."""
        cut(self._descriptor)
        print(rescue_leftover(self.leftover, self._stub, self._channel.address), file=sys.stderr, flush=True)

    def _on_entry(self) -> bool:
        self._stub.forget()
        cpu = selected_cpu()
        try:
            hit = self.leftover.is_hit(self._stub, cpu)
        finally:
            self._stub.forget()
            self._stub.select(cpu)
        if hit:
            gdb.write(f"kprobe: the guest ran into a probe of an earlier session; {_ATTACH}.\n")
        return hit


class ConnectionGuard:
    """The guard of the guest that gdb is connected to, if that needs one; and whether it was looked at for that."""

    def __init__(self) -> None:
        self._guard: Guard | None = None
        self._looked_at = 0
        """gdb's number of the last connection whose guest was looked at."""

    @property
    def is_on(self) -> bool:
        """Whether there is a guard."""
        return self._guard is not None

    def look(self, *, again: bool = False) -> None:
        """At the first stop of each connection, which is made while gdb connects.

        *again*: also when that was done, for the guest may be another one meanwhile.
        """
        connection = gdb.selected_inferior().connection
        if connection is not None and (connection.num != self._looked_at or again):
            self._looked_at = connection.num
            self._guard = _guard_guest()

    def restore_elsewhere(self, stub: QemuStub, region: PhysAddr) -> None:
        """A session is about to take over, and has restored what was in the *region*: restore all else."""
        if self._guard is not None and self._guard.leftover.header.phys != region:
            self._guard.leftover.restore(stub)

    def release(self) -> None:
        """A session has taken over."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.release()

    def rescue(self) -> None:
        """The connection is lost."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.rescue()

    def leave(self, *, killed: bool = False) -> None:
        """gdb leaves a guest that an earlier session left armed: not without its text.

        *killed*: nothing may be asked of gdb any more.
        """
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with uninterrupted():
            try:
                if killed:
                    raise ConnectionLostError("gdb is being ended")
                guard.restore()
            except (ReportedError, gdb.error):
                guard.rescue()


def _guard_guest() -> Guard | None:
    """Look at the guest that gdb is connected to, and guard it if it needs that."""
    try:
        if gdb.selected_frame().architecture().name() != "i386:x86-64":
            return None
        channel = GdbChannel()
        stub = QemuStub(channel)
        with uninterrupted(), channel.borrowed(stub):
            # Of a client that was killed, with or without the plugin. Ours are not inserted now.
            stub.drop_breakpoints()
            leftover = find_leftover(stub)
            if leftover is None:
                return None
            # gdb would step a vCPU that stands at the breakpoint over it; one that takes the int3 again comes to it.
            # And a vCPU whose instruction was being stepped has no gdb any more that puts right what the step does.
            leftover.bring_out(stub)
            if leftover.dispatches_itself:
                gdb.write(
                    f"kprobe: an earlier session left {leftover.sites} site(s) armed in this guest, which dispatches "
                    f"their hits by itself. {_ATTACH}.\n"
                )
                return None
        guard = Guard(stub, channel, leftover)
    except RegionError as error:
        # Probes of an earlier gdb may be armed, and nothing can be known of them: an attach says the same.
        gdb.write(f"kprobe: {error}\n", gdb.STDERR)
        return None
    except (ReportedError, gdb.error):
        # Whatever gdb is connected to: it has no probes of ours that we could know of.
        return None
    gdb.write(
        f"kprobe: an earlier session left {leftover.sites} site(s) armed in this guest; a breakpoint at its #BP "
        f"entry guards them. {_ATTACH}.\n"
    )
    return guard
