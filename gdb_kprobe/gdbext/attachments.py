"""Which guest gdb is attached to: how gdb comes to that, and how away from it."""

from __future__ import annotations

import contextlib
import sys

import gdb

from gdb_kprobe.config.profile import KernelKind, Profile
from gdb_kprobe.errors import KprobeError, NotAttachedError, ReportedError
from gdb_kprobe.gdbext import settings
from gdb_kprobe.gdbext.connection import connect, is_connected
from gdb_kprobe.gdbext.errors import STOPPED
from gdb_kprobe.gdbext.guard import ConnectionGuard
from gdb_kprobe.gdbext.link import Link
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.model import Dispatch, VirtAddr
from gdb_kprobe.session.adoption import adopt_left
from gdb_kprobe.session.attach import attach
from gdb_kprobe.session.data_plane import open_data_plane
from gdb_kprobe.session.inspect import AdoptResult, AttachResult
from gdb_kprobe.session.noted import NotedProbes
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.recovery.orphans import find_leftover
from gdb_kprobe.session.rescue import ENDED, cut, rescue
from gdb_kprobe.session.session import Detached
from gdb_kprobe.watchdog.handle import Watchdog


class Attachments:
    """At most one :class:`Link`; probes that are *noted* come into it, and go back when its guest is no more."""

    def __init__(self, noted: NotedProbes, guard: ConnectionGuard) -> None:
        self.link: Link | None = None
        self._noted = noted
        self._guard = guard
        self._abandoned: Link | None = None
        """A link that was over when the guest was about to run, until that stops."""

    def need_link(self) -> Link:
        """:raises NotAttachedError: there is none."""
        if self.link is None:
            raise NotAttachedError("not attached to a guest", "'kprobe attach PROFILE' first; 'help kprobe attach'")
        return self.link

    # -- the begin ----------------------------------------------------------------------------------------------

    def attach(self, profile: Profile, dispatch: Dispatch, *, arm_noted: bool) -> AttachResult:
        """Attach to the guest of *profile*, over gdb's connection if there is one; *arm_noted*: arm what is noted."""
        if self.link is not None:
            raise KprobeError("attached already", "'kprobe detach' first")
        if gdb.parameter("non-stop"):
            raise KprobeError("gdb is in non-stop mode, which QEMU's stub does not have", "'set non-stop off'")
        was_connected = is_connected()
        connect(profile)
        try:
            return self._attach(profile, dispatch, arm_noted)
        except ReportedError as error:
            if not was_connected and is_connected():
                error.hint = "; ".join(filter(None, (error.hint, STOPPED)))
            raise

    def _attach(self, profile: Profile, dispatch: Dispatch, arm_noted: bool) -> AttachResult:
        link: Link | None = None
        try:
            with uninterrupted():  # half a link would keep the connection open, and a thread that takes each SIGINT
                link = Link(profile, self.drop)
            # What is armed in a bare-metal guest is found by its profile only: the watchdog could not see to it.
            if settings.settings().watchdog and profile.kernel.kind is KernelKind.LINUX:
                link.watchdog = Watchdog(link.address)
            with link.stopped():
                attached = link.attached = attach(link.stub, profile, link.breakpoints, dispatch, link.peers())
                region = link.session.region
                open_data_plane(link.stub, link.memory, region, link.peers(), profile.shared_memory)
                link.session.disarm_all()
                self._guard.restore_elsewhere(link.stub, region.header.phys)
        except BaseException:
            if link is not None and link.attached is not None:
                # Cut off by a Ctrl-C, or by the last step: nothing is armed yet, and the region goes again.
                with contextlib.suppress(ReportedError), link.stopped():
                    link.session.detach()
            if link is not None:
                link.close()
            raise
        self.link = link
        self._guard.release()

        def add(probe: Probe) -> None:
            with link.stopped():
                link.session.add(probe)

        refused = self._noted.arm(add) if arm_noted else ()
        messages = (*attached.messages, *filter(None, [attached.lacks]))
        return AttachResult(messages, tuple(definition for definition, _ in attached.left), refused, attached.seconds)

    def adopt(self) -> AdoptResult:
        """Add the probes that a session before left in the guest, with their counts."""
        link = self.need_link()
        with link.stopped():
            return adopt_left(link.session, link.take_left())

    # -- the end ------------------------------------------------------------------------------------------------

    def detach(self) -> Detached:
        """Undo everything in the guest. gdb stays connected, the machine stopped.

        :raises KprobeError: a site still holds our int3. Then we stay attached, for the guest must not run without us.
        """
        link = self.need_link()
        with link.stopped():
            done = link.session.detach()
        if done.still_armed:
            raise KprobeError(
                f"not restored: {', '.join(done.still_armed)} ({'; '.join(done.problems)})",
                "the guest stays stopped and attached: it would die at the next hit. Try 'kprobe detach' again",
            )
        self.link = None
        link.close()
        return done

    def drop(self, link: Link) -> None:
        """The guest behind *link* is another one: let go of it without a write. Its probes are noted for the next."""
        self.link = None
        link.breakpoints.remove(link.session.gate)
        link.close()
        self._noted.keep(link.session)

    def drop_running(self, link: Link) -> None:
        """The same of a guest that is being resumed. What it has armed, which a snapshot has brought, is restored."""
        self.link, self._abandoned = None, link
        link.breakpoints.remove(link.session.gate)
        link.abandon()
        self._noted.keep(link.session)
        try:
            leftover = find_leftover(link.stub)
            if leftover is not None and not leftover.dispatches_itself:
                leftover.restore(link.stub)
        except ReportedError as error:
            gdb.write(f"kprobe: what the snapshot has armed is not restored: {error}\n", gdb.STDERR)

    def rescue(self, *, ends: bool = False) -> None:
        """Restore the guest over a connection of our own. *ends*: gdb does."""
        link, self.link = self.link, None
        assert link is not None
        cut(link.descriptor)
        message = rescue(link.session, link.stub, link.address, link.has_ended)
        print(message, file=sys.stderr, flush=True)
        if not ends and len(link.session.probes) and message == ENDED:
            self._noted.keep(link.session)
            what = f"the definitions of {len(self._noted)} probe(s) are kept"
            print(f"kprobe: {what}: 'kprobe attach' arms them in the next guest.", file=sys.stderr, flush=True)
        link.close()

    # -- meanwhile ----------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Ask for a stop, as Ctrl-C does."""
        link = self.link or self._abandoned
        if link is not None:
            link.interrupts.request()

    def stopped(self) -> None:
        """The machine has stopped for the user: nothing is left of a link that was abandoned while it ran."""
        abandoned, self._abandoned = self._abandoned, None
        if abandoned is not None:
            abandoned.finish()

    def original_of(self, rip: int, rsp: int) -> tuple[VirtAddr, int] | None:
        """RIP and RSP that a frame of ours with these stands for, in a slot or at the gate; else ``None``."""
        return None if self.link is None else self.link.original_of(rip, rsp)
