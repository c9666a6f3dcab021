"""gdb's own connection to the stub as a carrier of packets, shared with gdb itself.

gdb keeps in its head which vCPU it last selected, and the registers it read. Neither hears of our packets, so who
uses the channel does it inside :meth:`GdbChannel.borrowed`.

The packets go over gdb's descriptor, not through gdb (``RemoteTargetConnection.send_packet``): that takes one reply for
each packet, and a monitor command has many; it waits no longer than ``remotetimeout``; and gdb 16 and later hold
Python's lock while they wait for it, so that nothing in this process could end the wait. gdb reads nothing of its own
accord between a stop and the next command, and has nothing in its buffer then: it has read each reply that it asked
for. What the texts of its own commands look like (gdb 18 gives MI records) is of no moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gdb

from gdb_kprobe.errors import ConnectionLostError, GuestStateError, TargetError
from gdb_kprobe.gdbext.signals import ctrl_c_is_pending, raise_ctrl_c, uninterrupted
from gdb_kprobe.model import CpuId
from gdb_kprobe.target.packets import INTERRUPT, RUN, PacketStream
from gdb_kprobe.target.socket_peer import is_input_of_another
from gdb_kprobe.target.stub import QemuStub

_PATIENCE = 30.0
"""Seconds to wait for a reply, or gdb's own ``remotetimeout`` if that is more."""

_LOOK_EVERY = 0.02
"""Seconds between two looks for a Ctrl-C while the guest runs."""


class GdbChannel:
    """A :class:`~gdb_kprobe.target.protocols.PacketChannel` over the connection of gdb's current inferior.

    :raises ConnectionLostError: gdb is connected to no machine.
    :raises GuestStateError: it is, but its descriptor is not to be found.
    """

    def __init__(self) -> None:
        self._connection = _connection()
        # gdb 13 asserts that no connection object is freed while its connection is open, and frees them all when it
        # exits by a signal with one open. One reference more than is ever given back keeps it from aborting there.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        descriptor = find_descriptor(self.address)
        if descriptor is None:
            raise GuestStateError(
                f"gdb's descriptor of its connection {self.address!r} is not to be found among its open files",
                "connect by 'target remote HOST:PORT' or 'target remote PATH'",
            )
        self.descriptor = descriptor
        """gdb's own, not a duplicate: QEMU serves a client until the last one is closed."""
        self._file = _identity(descriptor)
        self._stream = PacketStream(descriptor, self.address)
        self.heeds_ctrl_c = False
        """Whether a Ctrl-C that is held back is raised as KeyboardInterrupt before the next packet is sent."""
        self._tells_gdb = True

    @contextlib.contextmanager
    def within_gdb(self) -> Iterator[None]:
        """Around packets that are sent while gdb itself resumes, or handles a stop.

        gdb must not find out there that the connection is lost: it would free the threads that it is working on, and
        crash (gdb 13). gdb finds out by its own next packet.
        """
        before, self._tells_gdb = self._tells_gdb, False
        try:
            yield
        finally:
            self._tells_gdb = before

    @property
    def address(self) -> str:
        """What the user gave to ``target remote``."""
        return self._connection.details or ""

    def send(self, packet: bytes) -> bytes:
        if self.heeds_ctrl_c:
            raise_ctrl_c()
        with self._exchange():
            return self._stream.ask(packet, self._patience)

    def send_all(self, packets: Sequence[bytes]) -> list[bytes]:
        if self.heeds_ctrl_c:
            raise_ctrl_c()
        with self._exchange():
            patience = self._patience
            return [self._stream.ask(packet, patience) for packet in packets]

    def monitor(self, command: str) -> str:
        with self._exchange():
            return self._stream.monitor(command, self._patience)

    def check_can_run(self) -> None:
        if gdb.parameter("breakpoint always-inserted"):
            # It could go on from none of them: that takes gdb.
            raise GuestStateError(
                "gdb keeps its breakpoints in the guest, so that it cannot run without gdb for a moment",
                "'set breakpoint always-inserted off'",
            )

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        # gdb gives no way to resume for a while inside a command, so the packets are ours.
        with self._exchange():
            self._stream.write(how)
            reply: bytes | None = None
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0 and not (heed and ctrl_c_is_pending()):
                with contextlib.suppress(TimeoutError):
                    reply = self._stream.read(min(left, _LOOK_EVERY))
                    break
            else:
                self._stream.write_raw(INTERRUPT)
                self._stream.reply(self._patience)
        if how == RUN:
            gdb.execute("maintenance flush dcache", to_string=True)
        if heed:
            raise_ctrl_c()
        return reply

    @property
    def _patience(self) -> float:
        configured = gdb.parameter("remotetimeout")
        return max(_PATIENCE, float(configured) if isinstance(configured, int) else 0.0)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around a request with its reply: gdb is to find neither a part of them, nor a connection that is lost."""
        with uninterrupted():
            if not self._connection.is_valid() or _identity(self.descriptor) != self._file:
                raise ConnectionLostError("the connection to the guest is lost")
            try:
                yield
            except ConnectionLostError:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.descriptor)) as sock:
                    sock.shutdown(socket.SHUT_RDWR)  # a reply that is late would be taken for another's
                # gdb notices, and tells of it by its event, at a packet of its own.
                if self._tells_gdb:
                    with contextlib.suppress(gdb.error, RuntimeError):
                        self._connection.send_packet(b"qC")
                raise

    @contextlib.contextmanager
    def borrowed(self, stub: QemuStub) -> Iterator[CpuId]:
        """Use the connection through *stub*; yields gdb's current vCPU, which is selected again at the end.

        :raises GuestStateError: the machine is running.
        """
        cpu = stopped_cpu()
        # Make gdb select its current thread now: then both sides are known to agree.
        flush_registers()
        try:
            gdb.selected_frame().pc()
        except gdb.error as error:
            raise _translated(error) from error
        stub.forget()
        stub.shown = cpu
        try:
            yield cpu
        finally:
            with contextlib.suppress(TargetError, ConnectionLostError):
                stub.forget()
                stub.select(cpu)
            flush_registers()


def selected_cpu() -> CpuId:
    """The vCPU that gdb shows.

    :raises ConnectionLostError: gdb has no thread.
    """
    thread = gdb.selected_thread()
    if thread is None or not thread.is_valid():
        raise ConnectionLostError("gdb is connected to no machine", "connect with 'kprobe attach PROFILE'")
    return CpuId(thread.ptid[1])


def stopped_cpu() -> CpuId:
    """The vCPU that gdb shows. Not for use in a breakpoint's ``stop()``, where gdb calls its threads running.

    :raises GuestStateError: it runs.
    """
    cpu = selected_cpu()
    if is_running():
        raise GuestStateError("the guest is running", "stop it first (Ctrl-C, or 'interrupt')")
    return cpu


def flush_registers() -> None:
    """Have gdb forget the registers it has read."""
    gdb.execute("maintenance flush register-cache", to_string=True)


def find_descriptor(address: str) -> int | None:
    """The file descriptor of gdb's own connection to *address*, found among this process's.

    *address* is what gdb was given: of a TCP or unix socket, of a terminal, or ``| COMMAND``.
    """
    wanted = address.removeprefix("unix:").removeprefix("tcp:")
    port = wanted.rpartition(":")[2]
    pipes: list[int] = []
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        try:
            opened = os.readlink(entry)
            if opened == wanted:
                return number
            if not opened.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(number)) as sock:
                peer = sock.getpeername()
                if sock.family == socket.AF_UNIX and not peer and not sock.getsockname() and number > _STANDARD:
                    pipes.append(number)
        except OSError:
            continue
        if peer == wanted or (isinstance(peer, tuple) and str(peer[1]) == port):
            return number
    # gdb gives a command that it starts one end of a pair of sockets without names, and of another pair for its errors.
    ends = [number for number in pipes if is_input_of_another(number)] if wanted.startswith("|") else []
    return ends[0] if len(ends) == 1 else None


_STANDARD = 2
"""The highest descriptor of standard input, output and errors, which a front end may have made sockets, too."""


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Device and inode of an open file: of a socket there is no other one with the same, as long as it is open."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connection() -> gdb.RemoteTargetConnection:
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        raise ConnectionLostError(
            "gdb is connected to no machine", "connect with 'kprobe attach PROFILE', or 'target remote ADDRESS' first"
        )
    return connection


def _translated(error: Exception) -> TargetError | ConnectionLostError:
    """*error* is gdb's, of the connection; only whether gdb still has one tells what it means."""
    if isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection):
        return TargetError(str(error))
    return ConnectionLostError(f"the connection to the guest is lost: {error}")


def is_running() -> bool:
    """Whether the guest runs, as far as gdb knows. QEMU's stub runs all vCPUs, or none."""
    # Not by way of all threads: gdb asks the stub for the list of them, which does not answer while it runs.
    thread = gdb.selected_thread()
    return thread is not None and thread.is_running()
