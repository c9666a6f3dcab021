"""One attachment of gdb to a guest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import gdb

from gdb_kprobe.config.profile import Profile
from gdb_kprobe.errors import ConnectionLostError, GuestResetError, GuestStateError, KprobeError, TargetError
from gdb_kprobe.gdbext.breakpoints import GdbBreakpoints
from gdb_kprobe.gdbext.channel import GdbChannel, flush_registers, is_running, selected_cpu
from gdb_kprobe.gdbext.connection import PATIENCE
from gdb_kprobe.gdbext.signals import InterruptWatch, uninterrupted
from gdb_kprobe.model import CpuId, VirtAddr
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.session.attach import Attached
from gdb_kprobe.session.session import Session
from gdb_kprobe.target.ram import RamView
from gdb_kprobe.target.socket_peer import have_ended, peer_processes
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.watchdog.handle import Watchdog


class Link:
    """gdb's connection, what is behind it, and the session over it."""

    def __init__(self, profile: Profile, on_reset: Callable[[Link], None]) -> None:
        """*on_reset* is called when the guest turns out to be another one.

        :raises ConnectionLostError: gdb is connected to no machine.
        """
        self.profile = profile
        self.channel = GdbChannel()
        self.stub = QemuStub(self.channel)
        self.address = self.channel.address or profile.gdbstub
        self.descriptor = self.channel.descriptor
        self.breakpoints = GdbBreakpoints(self._on_gate, self._on_arrival, self.handed_over)
        self.interrupts = InterruptWatch(self.descriptor)
        self.watchdog = Watchdog(None)
        self.attached: Attached | None = None
        self.is_over = False
        """Nothing is done with the guest any more."""
        self.stop_requested = False
        """The next stop at a hit is the user's."""
        self._on_reset = on_reset
        self._qemu = self.peers()
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

    def peers(self) -> tuple[int, ...]:
        """The processes that may be the QEMU behind the connection."""
        return peer_processes(self.descriptor)

    def has_ended(self) -> bool:
        """Whether QEMU, which was on this host, is no more. One that is ending has a moment to do so."""
        return have_ended(self._qemu, PATIENCE)

    # -- acts ---------------------------------------------------------------------------------------------------

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
            self._on_reset(self)
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

    def tell_failures(self) -> None:
        """Show the user what handlers and listeners have raised, and what the session has noted."""
        session = self.session
        while session.failed:
            probe = session.failed.pop()
            gdb.write(
                f"kprobe: the handler of {probe.name} failed; it is disabled, its text restored.\n{probe.last_error}",
                gdb.STDERR,
            )
        while session.notes:
            gdb.write(f"kprobe: {session.notes.pop(0)}.\n")
        while session.listeners.failed:
            gdb.write(
                f"kprobe: a listener failed; it is not called again.\n{session.listeners.failed.pop()}", gdb.STDERR
            )

    # -- hits ---------------------------------------------------------------------------------------------------

    def _on_gate(self) -> bool:
        """A vCPU stopped at the gate; gdb's current thread is that vCPU."""
        return not self.is_over and self._handle(self.session.on_breakpoint)

    def _on_arrival(self, addr: VirtAddr) -> bool:
        """A step of the user's has brought a vCPU, gdb's current thread, to *addr*."""
        return not self.is_over and self._handle(lambda cpu: self.session.on_place(cpu, addr))

    def _handle(self, handle: Callable[[CpuId], bool]) -> bool:
        """Have gdb's current vCPU, stopped in the middle of a run, handled; whether the user gets the prompt."""
        self.stub.forget()
        cpu = selected_cpu()
        try:
            stop = handle(cpu)
            self.tell_failures()
        except GuestResetError:
            stop = True  # it is told of, and let go, when the machine is settled
        finally:
            self.stub.forget()
            self.stub.select(cpu)
            flush_registers()
        return stop or self.stop_requested or self.interrupts.overdue

    def original_of(self, rip: int, rsp: int) -> tuple[VirtAddr, int] | None:
        """RIP and RSP that a frame of ours with these stands for, in a slot or at the gate; else ``None``."""
        return self.session.original_of(rip, rsp, _read_memory)

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing of ours is in the guest any more, or nothing more can be done about it."""
        self.interrupts.close()
        self.abandon()

    def abandon(self) -> None:
        """The guest is another one, and is being resumed: gdb deletes no breakpoint then, and a Ctrl-C is still ours.

        :meth:`finish` does the rest, at the next stop.
        """
        self.is_over = True
        self.breakpoints.watch(())
        if self.attached is not None:
            self.memory.close()
        self.watchdog.end()

    def finish(self) -> None:
        """The guest of a link that was abandoned has stopped."""
        self.breakpoints.tidy()
        self.interrupts.close()


def _read_memory(addr: int, size: int) -> bytes | None:
    """By gdb, in the address space of its current vCPU."""
    try:
        return bytes(gdb.selected_inferior().read_memory(addr, size))
    except gdb.MemoryError:
        return None
