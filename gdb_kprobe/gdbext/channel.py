"""gdb's own connection to the stub as a carrier of packets, shared with gdb itself.

gdb keeps in its head which vCPU it last selected, and the registers it read. Neither hears of our packets, so whoever
uses the channel does it inside :meth:`GdbChannel.borrowed`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import gdb

from gdb_kprobe.errors import ConnectionLostError, GuestStateError, TargetError
from gdb_kprobe.model import CpuId
from gdb_kprobe.target.stub import QemuStub

_monitoring = False


def is_monitoring() -> bool:
    """Whether a ``monitor`` command that gdb executes is ours, and not the user's."""
    return _monitoring


class GdbChannel:
    """A :class:`~gdb_kprobe.target.protocols.PacketChannel` over the connection of gdb's current inferior."""

    def __init__(self) -> None:
        self._connection = _connection()
        # gdb 13 asserts that no connection object is freed while its connection is open, and frees them all when it
        # exits by a signal with one open. One reference more than is ever given back keeps it from aborting there.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))

    @property
    def address(self) -> str:
        """What the user gave to ``target remote``."""
        return self._connection.details or ""

    def send(self, packet: bytes) -> bytes:
        try:
            return bytes(self._connection.send_packet(packet) or b"")
        except (gdb.error, RuntimeError) as error:
            raise _translated(error) from error

    def check_can_run(self) -> None:
        if gdb.parameter("breakpoint always-inserted"):
            # It could go on from none of them: that takes gdb.
            raise GuestStateError(
                "gdb keeps its breakpoints in the guest, so that it cannot run without gdb for a moment",
                "'set breakpoint always-inserted off'",
            )
        self._descriptor()

    def _descriptor(self) -> int:
        """gdb's own socket."""
        descriptor = find_socket(self.address)
        if descriptor is None:
            raise GuestStateError("cannot find gdb's socket to the guest", "is it another kind of connection?")
        return descriptor

    def run_for(self, seconds: float) -> None:
        # gdb gives no way to resume for a while inside a command, so the packets are ours: the stop reply to vCont
        # comes at the latest when a thread has sent the interrupt byte over gdb's own socket.
        timer = threading.Timer(seconds, os.write, (self._descriptor(), b"\x03"))
        timer.start()
        try:
            self.send(b"vCont;c")
            timer.cancel()  # else it must still stop the guest
        finally:
            timer.join()
        gdb.execute("maintenance flush dcache", to_string=True)

    def monitor(self, command: str) -> str:
        global _monitoring
        _monitoring = True
        try:
            return gdb.execute(f"monitor {command}", to_string=True) or ""
        except gdb.error as error:
            raise _translated(error) from error
        finally:
            _monitoring = False

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
        stub.forget_selection()
        stub.shown = cpu
        try:
            yield cpu
        finally:
            with contextlib.suppress(TargetError):
                stub.forget_selection()
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


def find_socket(address: str) -> int | None:
    """The file descriptor of gdb's own socket to *address*, found among this process's.

    Needed when gdb can no longer be asked for anything (:mod:`gdb_kprobe.gdbext.rescue`).
    """
    wanted = address.removeprefix("unix:").removeprefix("tcp:")
    port = wanted.rpartition(":")[2]
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                peer = sock.getpeername()
        except OSError:
            continue
        if peer == wanted or (isinstance(peer, tuple) and str(peer[1]) == port):
            return int(entry.name)
    return None


def _connection() -> gdb.RemoteTargetConnection:
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        raise ConnectionLostError(
            "gdb is connected to no machine", "connect with 'kprobe attach PROFILE', or 'target remote ADDRESS' first"
        )
    return connection


def _translated(error: Exception) -> TargetError:
    text = str(error)
    if "closed" in text or "is lost" in text or "invalid" in text:
        return ConnectionLostError(f"the connection to the guest is lost: {text}")
    return TargetError(text)


def is_running() -> bool:
    """Whether the guest runs, as far as gdb knows. QEMU's stub runs all vCPUs, or none."""
    # Not by way of all threads: gdb asks the stub for the list of them, which does not answer while it runs.
    thread = gdb.selected_thread()
    return thread is not None and thread.is_running()
