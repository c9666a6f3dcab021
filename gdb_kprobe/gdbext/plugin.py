"""The plugin: the one object that lives as long as gdb does, and what gdb calls it for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import gdb

from gdb_kprobe.config.profile import KernelKind, Profile, SharedMemory
from gdb_kprobe.errors import (
    ConnectionLostError,
    GuestResetError,
    GuestStateError,
    KprobeError,
    ReportedError,
    TargetError,
)
from gdb_kprobe.gdbext import settings
from gdb_kprobe.gdbext.breakpoints import GdbBreakpoints
from gdb_kprobe.gdbext.channel import GdbChannel, flush_registers, is_running, selected_cpu
from gdb_kprobe.gdbext.errors import STOPPED
from gdb_kprobe.gdbext.guard import Guard, guard_connection
from gdb_kprobe.gdbext.signals import InterruptWatch, sigint_takers, uninterrupted
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import PAGE_SIZE, CpuId, Dispatch, PhysAddr, VirtAddr
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.session.attach import Attached, attach
from gdb_kprobe.session.hits.stepping import Step
from gdb_kprobe.session.inspect import AdoptResult, AttachResult
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.recovery.orphans import find_leftover
from gdb_kprobe.session.rescue import ENDED, cut, rescue
from gdb_kprobe.session.session import Detached, Session
from gdb_kprobe.session.sites.probe_store import adopt
from gdb_kprobe.target.process_memory import find_process_memory
from gdb_kprobe.target.ram import RamView, SharedRam
from gdb_kprobe.target.rsp import is_served
from gdb_kprobe.target.socket_peer import clients_of, is_alive, peer_processes
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.watchdog.handle import Watchdog
from gdb_kprobe.watchdog.states import State

_MOVING_REGISTERS = (7, 16)
"""gdb's numbers of rsp and rip (amd64-tdep.h)."""

_PATIENCE = 0.5
"""Seconds in which a client of the stub that is leaving is gone."""
_MOST_PATIENCE = 10.0
"""The same where no process is known to be the client: QEMU may be busy."""


class Link:
    """One attachment: gdb's connection, what is behind it, and the session over it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.channel = GdbChannel()
        self.stub = QemuStub(self.channel)
        self.address = self.channel.address or profile.gdbstub
        self.descriptor = self.channel.descriptor
        self._qemu = self.peers()
        self.breakpoints = GdbBreakpoints(on_entry_stop, on_arrival, self.handed_over)
        self.interrupts = InterruptWatch(self.descriptor)
        self.watchdog = Watchdog(None)
        self.attached: Attached | None = None
        self.stop_requested = False
        """The next stop at a hit is the user's."""
        self._is_left_taken = False

    @property
    def session(self) -> Session:
        assert self.attached is not None
        session: Session = self.attached.session
        return session

    @property
    def memory(self) -> RamView:
        """The session's view of the guest's memory."""
        assert self.attached is not None
        return self.attached.memory

    def take_left(self) -> tuple[tuple[Definition, Counter | None], ...]:
        """The probes that a session before left in the guest; nothing the second time, for a counter has one owner."""
        assert self.attached is not None
        left, self._is_left_taken = () if self._is_left_taken else self.attached.left, True
        return left

    def has_ended(self) -> bool:
        """Whether QEMU, which was on this host, is no more. One that is ending has a moment to do so."""
        deadline = time.monotonic() + _PATIENCE
        while self._qemu and time.monotonic() < deadline:
            if not any(is_alive(pid) for pid in self._qemu):
                return True
            time.sleep(0.01)
        return False

    def peers(self) -> tuple[int, ...]:
        """The processes that may be the QEMU behind the connection."""
        return peer_processes(self.descriptor)

    def open_data_plane(self) -> None:
        """Find a way to read the region while the machine runs. It must be stopped now.

        That there is none is no error: :attr:`RamView.not_live` says why, and all is read at stops.
        """
        region = self.session.region.header
        if self.profile.shared_memory is SharedMemory.OFF:
            self.memory.not_live = "the profile says shared_memory: off"
        elif not isinstance(self.memory.live(region.phys, region.size), SharedRam):
            self.memory.close()  # its process was told by what another guest's might hold, too
            try:
                found = find_process_memory(self.stub, self.peers(), region.phys, region.size)
                self.memory.use_process(found)
                # And what tells whether it is still mapped. Its bytes could be anywhere, but its process is known now.
                for page in {PhysAddr(link.addr & -PAGE_SIZE) for link in self.session.region.links}:
                    self.memory.use_process(find_process_memory(self.stub, (found.pid,), page, PAGE_SIZE))
                self.memory.use_ram_of(self.stub, (found.pid,))
            except TargetError as error:
                self.memory.not_live = error.message

    def data_plane(self) -> str:
        """Where the region's data is read from, for the user."""
        region = self.session.region.header
        live = self.memory.live(region.phys, region.size)
        return f"only at stops ({self.memory.not_live})" if live is None else live.name

    def close(self) -> None:
        """Nothing of ours is in the guest any more, or nothing more can be done about it."""
        self.interrupts.close()
        self.breakpoints.watch(())
        if self.attached is not None:
            self.memory.close()
        self.watchdog.end()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[CpuId]:
        """Around every act on the machine from a command.

        :raises GuestStateError: it runs.
        :raises GuestResetError: it is another boot; this link is over then.
        """
        if is_running() and self.interrupts.is_requested:
            raise GuestStateError(
                "the guest has not stopped yet: 'interrupt' takes effect when gdb waits for the next command",
                "in a script use 'kprobe until', or run_until(), in place of 'continue &' "
                '(docs/guide/python.md, "Scripts")',
            )
        try:
            with uninterrupted(), self.channel.borrowed(self.stub) as cpu:
                yield cpu
        except GuestResetError:
            the_plugin().drop(self)
            raise
        finally:
            self.breakpoints.tidy()

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Around a user's handler, which may be interrupted, and may use gdb: select a vCPU, write registers."""
        try:
            with self.interrupts.handed_over():
                yield
        finally:
            self.stub.forget()

    def settle(self) -> None:
        """The machine stopped for the user: show it as it would be without probes."""
        with self.stopped():
            try:
                self.session.settle()
            except KprobeError:
                self.session.disarm_all()
                raise
            self.session.disarm_all()
            # gdb may have read our bytes for its own purposes while it stopped.
            gdb.execute("maintenance flush dcache", to_string=True)

    def arm_all(self) -> tuple[str, ...]:
        """The machine is about to run for the user. gdb calls its threads running already."""
        self.stub.forget()
        with self.channel.within_gdb():
            try:
                return self.session.arm_all()
            finally:
                with contextlib.suppress(TargetError, ConnectionLostError):
                    self.stub.forget()
                    self.stub.select(selected_cpu())


class Plugin:
    """What the commands work on."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.pending: list[Probe] = []
        """Defined before there was a guest; armed by the next attach."""
        self._settling = False
        self._takers: set[int] = set()
        """Threads of the user's that were warned of."""
        self._locking = ""
        """The user's scheduler-locking, to be set again after a ``stepi``."""
        self._guard: Guard | None = None
        self._running: Link | None = None
        """A link that was over when the guest was about to run: gdb deletes no breakpoint then, and Ctrl-C is its."""
        self._connection = 0
        """gdb's number of the last connection that was looked at for what others left behind."""

    def need_link(self) -> Link:
        """:raises KprobeError: not attached."""
        if self.link is None:
            raise KprobeError("not attached to a guest", "'kprobe attach PROFILE' first; 'help kprobe attach'")
        return self.link

    def attach(self, profile: Profile, dispatch: Dispatch, *, arm_noted: bool) -> AttachResult:
        """Attach to the guest of *profile*, over gdb's connection if there is one; *arm_noted*: arm what is pending."""
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
        link = Link(profile)
        try:
            # What is armed in a bare-metal guest is found by its profile only: the watchdog could not see to it.
            if settings.settings().watchdog and profile.kernel.kind is KernelKind.LINUX:
                link.watchdog = Watchdog(link.address)
            with link.stopped():
                link.attached = attach(link.stub, profile, link.breakpoints, dispatch, link.peers())
                link.open_data_plane()
                link.session.disarm_all()
                if self._guard is not None and self._guard.leftover.header.phys != link.session.region.header.phys:
                    self._guard.leftover.restore(link.stub)
        except BaseException:
            if link.attached is not None:
                # Cut off by a Ctrl-C, or by the last step: nothing is armed yet, and the region goes again.
                with contextlib.suppress(ReportedError), link.stopped():
                    link.session.detach()
            link.close()
            raise
        self.link = link
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        attached, refused = link.attached, self._arm_noted(link) if arm_noted else ()
        messages = (*attached.messages, *filter(None, [attached.lacks]))
        left = tuple(definition for definition, _ in attached.left)
        return AttachResult(messages, left, refused, attached.seconds)

    def _arm_noted(self, link: Link) -> tuple[tuple[Probe, KprobeError], ...]:
        """Arm what is pending; returns what cannot be, which stays pending, each with the reason."""
        refused: list[tuple[Probe, KprobeError]] = []
        waiting, self.pending = self.pending, []
        for number, probe in enumerate(waiting):
            try:
                with link.stopped():
                    link.session.add(probe)
            except KprobeError as error:
                self.pending.append(probe)
                refused.append((probe, error))
            except BaseException:
                self.pending += waiting[number:]
                raise
        return tuple(refused)

    def adopt(self) -> AdoptResult:
        """Add the probes that a session before left in the guest, with their counts."""
        link = self.need_link()
        probes: list[Probe] = []
        refused: list[tuple[str, KprobeError]] = []
        for definition, counter in link.take_left():
            try:
                probes.append(adopt(definition, parse_definition(definition.text), counter))
            except KprobeError as error:
                refused.append((definition.text, error))
        with link.stopped():
            link.session.guest.refresh()
            not_added = {id(probe): error for probe, error in link.session.add_many(probes)}
        refused += [(str(probe.spec), not_added[id(probe)]) for probe in probes if id(probe) in not_added]
        return AdoptResult(tuple(probe for probe in probes if id(probe) not in not_added), tuple(refused))

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

    def drop(self, link: Link, *, runs: bool = False) -> None:
        """The guest behind *link* is another one: let go of it without a write. Its probes are noted for the next.

        *runs*: it is being resumed.
        """
        self.link = None
        link.breakpoints.remove(link.session.gate)
        if runs:
            self._running = link
            link.breakpoints.watch(())
            link.memory.close()
            link.watchdog.end()
        else:
            link.close()
        self._note(link)

    # -- what gdb calls -----------------------------------------------------------------------------------------

    def on_entry_stop(self) -> bool:
        """A vCPU stopped at the gate; gdb's current thread is that vCPU."""
        link = self.link
        return link is not None and self._handle(link, link.session.on_breakpoint)

    def on_arrival(self, addr: VirtAddr) -> bool:
        """A step of the user's has brought a vCPU, gdb's current thread, to *addr*."""
        link = self.link
        return link is not None and self._handle(link, lambda cpu: link.session.on_place(cpu, addr))

    def _handle(self, link: Link, handle: Callable[[CpuId], bool]) -> bool:
        """Have gdb's current vCPU, stopped in the middle of a run, handled; whether the user gets the prompt."""
        link.stub.forget()
        cpu = selected_cpu()
        try:
            stop = handle(cpu)
            _tell_failures(link.session)
        except GuestResetError:
            stop = True  # it is told of, and let go, when the machine is settled
        finally:
            link.stub.forget()
            link.stub.select(cpu)
            flush_registers()
        return stop or link.stop_requested or link.interrupts.overdue

    def original_of(self, rip: int, rsp: int) -> tuple[VirtAddr, int] | None:
        """RIP and RSP that a frame of ours with these stands for, in a slot or at the gate; else ``None``."""
        link = self.link
        if link is None or link.attached is None:
            return None
        return link.session.original_of(rip, rsp, _read_memory)

    def on_resumed(self, interrupted: bool) -> None:
        """gdb is about to resume the guest for the user (not after a stop that is only ours).

        *interrupted*: a Ctrl-C came at the same time.
        """
        link = self.link
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
                    self.drop(link, runs=True)
                    self._restore_others(link)
            _tell_failures(link.session)
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

    def _restore_others(self, link: Link) -> None:
        """The guest is resumed with the armed sites of a session that is over, which a snapshot has brought."""
        try:
            leftover = find_leftover(link.stub)
            if leftover is not None and not leftover.dispatches_itself:
                leftover.restore(link.stub)
        except ReportedError as error:
            gdb.write(f"kprobe: what the snapshot has armed is not restored: {error}\n", gdb.STDERR)

    def on_register(self, event: gdb.RegisterChangedEvent) -> None:
        """The user has written a register."""
        if self.link is not None and int(event.regnum) in _MOVING_REGISTERS:
            self.link.session.moved()

    def before_move(self) -> None:
        """The user is about to make the program go on somewhere else."""
        if self.link is not None:
            self.link.session.moved()

    def before_interrupt(self) -> None:
        """The user typed ``interrupt``."""
        link = self.link or self._running
        if link is not None:
            link.interrupts.request()

    def before_stepi(self) -> None:
        """The user typed ``stepi``: one instruction of one vCPU, and no hit of another one in between.

        The stub tells of one vCPU that stopped. A hit elsewhere at the moment of the step hides that it was made, and
        gdb would make another one.
        """
        if self.link is not None and gdb.parameter("scheduler-locking") != "on":
            self._locking = str(gdb.parameter("scheduler-locking"))
            gdb.execute("set scheduler-locking on")
        self.before_step()

    def before_step(self) -> None:
        """The user typed a command that gdb executes by single steps, as far as it stays in a function."""
        link = self.link
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
        running, self._running = self._running, None
        if running is not None:
            running.breakpoints.tidy()
            running.interrupts.close()
        if link is None:
            self._look_for_leftovers()
            return
        self._settling = True
        link.stop_requested = False
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
            _tell_failures(link.session)
            self._settling = False
            link.interrupts.release()
        if self.link is None:
            self._look_for_leftovers(again=True)

    def after_monitor(self) -> None:
        """The user has given QEMU a command, which may have been ``loadvm`` or ``system_reset``."""
        if self._settling or gdb.selected_thread() is None or is_running():
            return
        if self.link is None and self._guard is None:
            self._look_for_leftovers(again=True)
        elif self.link is not None:
            flush_registers()
            self.on_stop()

    def _look_for_leftovers(self, *, again: bool = False) -> None:
        """At the first stop of each connection, which is made while gdb connects.

        *again*: also when that was done, for the guest may be another one meanwhile.
        """
        connection = gdb.selected_inferior().connection
        if connection is None or (connection.num == self._connection and not again):
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
        except GuestResetError as error:
            gdb.write(f"kprobe: {error.message}.\n", gdb.STDERR)
            return
        except GuestStateError:
            self.rescue()
            return
        except ReportedError as error:
            raise gdb.GdbError(str(error)) from error
        if done.restored:
            gdb.write(f"kprobe: {done.restored} site(s) restored.\n")
        for left in (*done.notes, *done.problems):
            gdb.write(f"kprobe: {left}.\n", gdb.STDERR)

    def on_lost(self, address: str) -> None:
        """gdb's connection is gone (it was lost, or an MI client detached)."""
        if self.link is not None:
            with uninterrupted():
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
                with contextlib.suppress(ReportedError, gdb.error, KeyboardInterrupt):
                    done = self.detach()
                    for left in (*done.notes, *done.problems):
                        print(f"kprobe: {left}.", file=sys.stderr, flush=True)
            # Reset: nothing is to be restored, and gdb's own way out lets the guest run.
            if self.link is not None:
                self.rescue(ends=True)

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
            except (ReportedError, gdb.error):
                guard.rescue()

    def rescue(self, *, ends: bool = False) -> None:
        """Restore the guest over a connection of our own. *ends*: gdb does."""
        link, self.link = self.link, None
        assert link is not None
        cut(link.descriptor)
        message = rescue(link.session, link.stub, link.address, link.has_ended)
        print(message, file=sys.stderr, flush=True)
        if not ends and len(link.session.probes) and message == ENDED:
            self._note(link)
            what = f"the definitions of {len(self.pending)} probe(s) are kept"
            print(f"kprobe: {what}: 'kprobe attach' arms them in the next guest.", file=sys.stderr, flush=True)
        link.close()

    def _note(self, link: Link) -> None:
        """The guest behind *link* is no more: keep its probes for the next one."""
        for probe in link.session.probes:
            probe.place, probe.gone, probe.counter = None, False, None
            self.pending.append(probe)


def _program_counters() -> tuple[int, ...]:
    """Where the two innermost frames of gdb's current thread are."""
    counters: list[int] = []
    with contextlib.suppress(gdb.error):
        frame: gdb.Frame | None = gdb.newest_frame()
        while frame is not None and len(counters) < 2:
            counters.append(int(frame.pc()))
            frame = frame.older()
    return tuple(counters)


def _read_memory(addr: int, size: int) -> bytes | None:
    """By gdb, in the address space of its current vCPU."""
    try:
        return bytes(gdb.selected_inferior().read_memory(addr, size))
    except gdb.MemoryError:
        return None


def _tell_failures(session: Session) -> None:
    while session.failed:
        probe = session.failed.pop()
        gdb.write(
            f"kprobe: the handler of {probe.name} failed; it is disabled, its text restored.\n{probe.last_error}",
            gdb.STDERR,
        )
    while session.notes:
        gdb.write(f"kprobe: {session.notes.pop(0)}.\n")
    while session.listeners.failed:
        gdb.write(f"kprobe: a listener failed; it is not called again.\n{session.listeners.failed.pop()}", gdb.STDERR)


def is_connected() -> bool:
    """Whether gdb is connected to a stub."""
    return isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection)


def connect(profile: Profile) -> None:
    """Connect gdb to the profile's gdbstub, if it is not connected already.

    :raises ConnectionLostError: no stub answers there.
    """
    if is_connected():
        return
    # A connection that was ended a moment ago, perhaps our own, is QEMU's until it has looked.
    started = time.monotonic()
    while is_served(profile.gdbstub):
        waited = time.monotonic() - started
        who = _named_clients(profile.gdbstub) if waited > _PATIENCE else ""
        if who or waited > _MOST_PATIENCE:
            raise ConnectionLostError(
                f"the gdbstub at {profile.gdbstub} has a client already, and serves only one{who}",
                "detach the other gdb first",
            )
        time.sleep(0.01 if waited < _PATIENCE else 0.1)  # to look for clients is to look at all processes
    try:
        with _one_try():
            gdb.execute(f"target remote {profile.gdbstub}", to_string=True)
    except gdb.error as error:
        raise ConnectionLostError(
            f"cannot connect to the gdbstub at {profile.gdbstub}: {error}",
            "is QEMU running with -gdb, and no other gdb connected (the stub serves one client)? The address is "
            f"'gdbstub' in {profile.path}",
        ) from error


def _named_clients(address: str) -> str:
    """Who they are, as far as /proc tells: for the end of a message."""
    clients = [f"{command[:60] or 'a process'} (pid {pid})" for pid, command in clients_of(address)]
    return f": {', '.join(clients)}" if clients else ""


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """Have gdb ask a TCP port once: it asks one that refuses again and again for 15 seconds."""
    again = gdb.parameter("tcp auto-retry")
    gdb.execute("set tcp auto-retry off", to_string=True)
    try:
        yield
    finally:
        gdb.execute(f"set tcp auto-retry {'on' if again else 'off'}", to_string=True)


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


def on_arrival(addr: VirtAddr) -> bool:
    """For the breakpoints at the places that the user's steps may come to."""
    return the_plugin().on_arrival(addr)


def before_step() -> None:
    """For ``hook-nexti`` and its like."""
    the_plugin().before_step()


def before_stepi() -> None:
    """For ``hook-stepi``."""
    the_plugin().before_stepi()


def after_monitor() -> None:
    """For ``hookpost-monitor``."""
    the_plugin().after_monitor()


def before_move() -> None:
    """For ``hook-jump`` and its like."""
    the_plugin().before_move()
