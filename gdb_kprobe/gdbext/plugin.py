"""The plugin: the one object that lives as long as gdb does, and what gdb calls it for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import gdb

from gdb_kprobe.config.load import find_profile, load_profile
from gdb_kprobe.config.profile import Profile
from gdb_kprobe.errors import ConnectionLostError, GuestStateError, KprobeError
from gdb_kprobe.gdbext import settings
from gdb_kprobe.gdbext.breakpoints import GdbBreakpoints
from gdb_kprobe.gdbext.channel import GdbChannel, find_socket, flush_registers, selected_cpu
from gdb_kprobe.gdbext.guard import Guard, guard_connection
from gdb_kprobe.gdbext.signals import InterruptWatch, interruptible, uninterrupted
from gdb_kprobe.session.attach import Attached, attach
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.rescue import cut, rescue
from gdb_kprobe.session.session import Detached, Session
from gdb_kprobe.target.stub import QemuStub

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Link:
    """One attachment: gdb's connection, what is behind it, and the session over it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.channel = GdbChannel()
        self.stub = QemuStub(self.channel)
        self.address = self.channel.address or profile.gdbstub
        self.descriptor = find_socket(self.channel.address)
        self.breakpoints = GdbBreakpoints(on_entry_stop)
        self.interrupts = InterruptWatch(self.descriptor)
        self.attached: Attached | None = None

    @property
    def session(self) -> Session:
        assert self.attached is not None
        session: Session = self.attached.session
        return session

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Around every act on the machine from a command.

        :raises GuestStateError: it runs.
        """
        with uninterrupted(), self.channel.borrowed(self.stub):
            yield
        self.breakpoints.tidy()


class Plugin:
    """What the commands work on."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.pending: list[Probe] = []
        """Defined before there was a guest; armed by the next attach."""
        self.stop_requested = False
        """A trace has shown all it was asked for: the next stop is the user's."""
        self._settling = False
        self._locking = ""
        """The user's scheduler-locking, to be set again after a ``stepi``."""
        self._guard: Guard | None = None
        self._connection = 0
        """gdb's number of the last connection that was looked at for what others left behind."""

    def need_link(self) -> Link:
        """:raises ConnectionLostError: not attached."""
        if self.link is None:
            raise ConnectionLostError("not attached to a guest", "'kprobe attach PROFILE' first; 'help kprobe attach'")
        return self.link

    def profile(self, name: str | None) -> Profile:
        """:raises ConfigError: there is no such profile, or it is wrong."""
        wanted = name or settings.settings().profile
        if not wanted:
            raise KprobeError(
                "which guest? no profile was given",
                f"'kprobe attach NAME', with a file or one of {CONFIGS}; or 'set kprobe profile NAME' once",
            )
        return load_profile(find_profile(wanted, (Path.cwd(), CONFIGS)))

    def attach(self, profile: Profile) -> tuple[Attached, list[tuple[Probe, str]]]:
        """Attach to the guest of *profile*, over gdb's connection if there is one, and arm what is pending.

        Returns what was found, and the pending probes that could not be armed, each with the reason.
        """
        if self.link is not None:
            raise KprobeError("attached already", "'kprobe detach' first")
        connect(profile)
        link = Link(profile)
        try:
            with link.stopped():
                link.attached = attach(link.stub, profile, link.breakpoints, interruptible)
                if self._guard is not None and self._guard.leftover.header.phys != link.session.region.header.phys:
                    self._guard.leftover.restore(link.stub)
        except BaseException:
            link.interrupts.close()
            raise
        self.link = link
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        refused: list[tuple[Probe, str]] = []
        waiting, self.pending = self.pending, []
        for probe in waiting:
            try:
                with link.stopped():
                    link.session.add(probe)
            except KprobeError as error:
                self.pending.append(probe)
                refused.append((probe, str(error)))
        return link.attached, refused

    def detach(self) -> Detached:
        """Undo everything in the guest. gdb stays connected, the machine stopped."""
        link = self.need_link()
        with link.stopped():
            done = link.session.detach()
        self.link = None
        link.interrupts.close()
        return done

    # -- what gdb calls -----------------------------------------------------------------------------------------

    def on_entry_stop(self) -> bool:
        """A vCPU stopped at the #BP entry; gdb's current thread is that vCPU."""
        link = self.link
        if link is None:
            return False
        link.stub.forget_selection()
        cpu = selected_cpu()
        try:
            stop = link.session.on_breakpoint(cpu)
            _tell_failures(link.session)
        finally:
            link.stub.forget_selection()
            link.stub.select(cpu)
            flush_registers()
        return stop or self.stop_requested or link.interrupts.overdue

    def on_resumed(self) -> None:
        """gdb has resumed the guest."""
        if self.link is not None:
            self.link.interrupts.resumed()

    def before_interrupt(self) -> None:
        """The user typed ``interrupt``."""
        if self.link is not None:
            self.link.interrupts.request()

    def before_stepi(self) -> None:
        """The user typed ``stepi``: one instruction of one vCPU, and no hit of another one in between.

        The stub tells of one vCPU that stopped. A hit elsewhere at the moment of the step hides that it was made, and
        gdb would make another one.
        """
        if self.link is not None and gdb.parameter("scheduler-locking") != "on":
            self._locking = str(gdb.parameter("scheduler-locking"))
            gdb.execute("set scheduler-locking on")

    def _unlock(self) -> None:
        if self._locking:
            gdb.execute(f"set scheduler-locking {self._locking}")
            self._locking = ""

    def on_stop(self) -> None:
        """The machine stopped for the user."""
        self._unlock()
        link = self.link
        if self._settling:
            return
        if link is None:
            self._look_for_leftovers()
            return
        self._settling = True
        try:
            link.interrupts.stopped()
            with contextlib.suppress(GuestStateError), link.stopped():
                link.session.settle()
                _tell_failures(link.session)
        except ConnectionLostError:
            pass  # the event of the lost connection follows
        except KprobeError as error:
            gdb.write(f"kprobe: {error}\n", gdb.STDERR)
        finally:
            self._settling = False

    def _look_for_leftovers(self) -> None:
        """At the first stop of each connection, which is made while gdb connects."""
        connection = gdb.selected_inferior().connection
        if connection is None or connection.num == self._connection:
            return
        self._connection = connection.num
        self._settling = True
        try:
            self._guard = guard_connection()
        finally:
            self._settling = False

    def before_detach(self) -> None:
        """The user is about to take gdb's connection away."""
        if self.link is None:
            self._leave_guarded()
            return
        try:
            done = self.detach()
        except GuestStateError:
            self.rescue()
            return
        if done.restored:
            gdb.write(f"kprobe: {done.restored} site(s) restored.\n")

    def on_lost(self, address: str) -> None:
        """gdb's connection is gone (it was lost, or an MI client detached)."""
        if self.link is not None:
            self.rescue()
        elif self._guard is not None:
            guard, self._guard = self._guard, None
            guard.rescue()

    def on_exit(self, killed: bool) -> None:
        """gdb ends. It may be in the middle of anything, also of a run.

        *killed*: by a SIGTERM. Then nothing may be asked of gdb: it would end at the first packet, the work half done.
        """
        if self.link is None:
            self._leave_guarded(killed=killed)
            return
        with uninterrupted():
            if not killed:
                with contextlib.suppress(KprobeError, gdb.error, KeyboardInterrupt):
                    self.detach()
            if self.link is not None:
                self.rescue()

    def _leave_guarded(self, *, killed: bool = False) -> None:
        """gdb leaves a guest that an earlier session left armed: not without its text."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with uninterrupted():
            try:
                if killed:
                    raise ConnectionLostError("gdb is being ended")
                guard.restore()
            except (KprobeError, gdb.error):
                guard.rescue()

    def rescue(self) -> None:
        """Restore the guest over a connection of our own."""
        link, self.link = self.link, None
        assert link is not None
        link.interrupts.close()
        if link.descriptor is not None:
            cut(link.descriptor)
        message = rescue(link.session, link.stub, link.address)
        print(message, file=sys.stderr, flush=True)


def _tell_failures(session: Session) -> None:
    while session.failed:
        probe = session.failed.pop()
        gdb.write(
            f"kprobe: the handler of {probe.name} failed; it is disabled, its text restored.\n{probe.last_error}",
            gdb.STDERR,
        )


def connect(profile: Profile) -> None:
    """Connect gdb to the profile's gdbstub, if it is not connected already.

    :raises ConnectionLostError: nobody answers there.
    """
    if isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection):
        return
    try:
        gdb.execute(f"target remote {profile.gdbstub}", to_string=True)
    except gdb.error as error:
        raise ConnectionLostError(
            f"cannot connect to the gdbstub at {profile.gdbstub}: {error}",
            "is QEMU running with -gdb, and no other gdb connected (the stub serves one client)? The address is "
            f"'gdbstub' in {profile.path}",
        ) from error


_plugin: Plugin | None = None


def the_plugin() -> Plugin:
    """The plugin of this gdb."""
    assert _plugin is not None, "create() was not called"
    return _plugin


def create() -> Plugin | None:
    """Make the plugin of this gdb; ``None`` when there is one already."""
    global _plugin
    if _plugin is not None:
        return None
    _plugin = Plugin()
    return _plugin


def on_entry_stop() -> bool:
    """For the breakpoint at the #BP entry."""
    return the_plugin().on_entry_stop()


def on_stop() -> None:
    """For ``hook-stop``."""
    the_plugin().on_stop()


def before_detach() -> None:
    """For ``hook-detach`` and its like."""
    the_plugin().before_detach()


def before_interrupt() -> None:
    """For ``hook-interrupt``."""
    the_plugin().before_interrupt()


def before_stepi() -> None:
    """For ``hook-stepi``."""
    the_plugin().before_stepi()
