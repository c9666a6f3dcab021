"""A small client of the gdb remote serial protocol with a connection of its own.

For what must work when gdb's own connection does not: the rescue after a lost connection, and tests that drive a
guest without gdb.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.target.packets import INTERRUPT, RUN, PacketStream

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for one reply."""


def open_socket(address: str, timeout: float) -> socket.socket:
    """Connect to ``/path/of/a/unix/socket`` or ``host:port``.

    :raises ConnectionLostError: no process listens there.
    """
    try:
        if "/" in address:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout)
            sock.connect(address.removeprefix("unix:"))
            return sock
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        sock = socket.create_connection((host or "localhost", int(port)), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except (OSError, ValueError) as error:
        raise ConnectionLostError(
            f"cannot connect to the gdbstub at {address}: {error}",
            "is QEMU running with -gdb, and no other gdb connected (the stub serves one client)?",
        ) from error


def is_served(address: str) -> bool:
    """Whether the stub at *address*, on this host, has a client already, or one waits; as far as ``/proc/net`` tells.

    Asked before connecting: QEMU would keep a second connection waiting, serve it when the first ends, and stop the
    machine for a client that has long gone.
    """
    path = address.removeprefix("unix:")
    with contextlib.suppress(OSError, ValueError):
        if "/" in path:
            # Num RefCount Protocol Flags Type State Inode Path; 03 is connected, 02 waits to be accepted
            rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
            return any(row[5] in ("02", "03") and row[7:] == [path] for row in rows)
        host, _, number = path.removeprefix("tcp:").rpartition(":")
        port = f":{int(number):04X}"
        if not _is_of_this_host(host):
            return False
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            # sl local_address remote_address state ...; 01 is established
            rows = (line.split() for line in Path(table).read_text().splitlines()[1:])
            if any(row[1].endswith(port) and row[3] == "01" for row in rows):
                return True
    return False


def _is_of_this_host(host: str) -> bool:
    """Whether a socket can have this address here.

    :raises OSError: the name does not resolve.
    """
    family, kind, proto, _, found = socket.getaddrinfo(host or "localhost", 0, type=socket.SOCK_STREAM)[0]
    with contextlib.suppress(OSError), socket.socket(family, kind, proto) as sock:
        sock.bind(found)
        return True
    return False


class RspSocket:
    """A :class:`~gdb_kprobe.target.protocols.PacketChannel` of our own.

    QEMU stops the machine when a client connects; :meth:`detach` lets it run again.
    """

    def __init__(self, address: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.address = address
        self._timeout = timeout
        self._sock = open_socket(address, timeout)
        self._sock.settimeout(None)
        self._stream = PacketStream(self._sock.fileno(), address)
        try:
            # QEMU 7.2 answers register packets with nothing until the description was read once (and with it the
            # initial, unasked stop reply is behind us).
            self.send(b"qSupported:multiprocess+")
            self.send(b"qXfer:features:read:target.xml:0,ffb")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RspSocket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. The machine stays as it is (stopped, when it was)."""
        self._stream.close()
        self._sock.close()

    def detach(self) -> None:
        """Remove the stub's breakpoints and let the machine run.

        :raises TargetError: the stub refused; the machine stays stopped.
        """
        reply = self.send(b"D;1")  # with multiprocess a bare "D" is an error (E22), and the machine stays stopped
        self.close()
        if reply != b"OK":
            raise TargetError(f"the gdbstub at {self.address} would not detach: it answered {reply!r}")

    def send(self, packet: bytes) -> bytes:
        return self._stream.ask(packet, self._timeout)

    def send_all(self, packets: Sequence[bytes]) -> list[bytes]:
        return [self._stream.ask(packet, self._timeout) for packet in packets]

    def monitor(self, command: str) -> str:
        return self._stream.monitor(command, self._timeout)

    def check_can_run(self) -> None:
        """It always can."""

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        """Nobody has asked this client for anything: a Ctrl-C (*heed*) is a KeyboardInterrupt as everywhere."""
        self.resume(how)
        reply = self.wait_stop(seconds)
        if reply is None:
            self.interrupt()
            self._stream.reply(self._timeout)
        return reply

    def resume(self, how: bytes = RUN) -> None:
        """Let vCPUs run, all or as *how* says; :meth:`wait_stop` or :meth:`interrupt` ends it."""
        self._stream.write(how)

    def interrupt(self) -> None:
        """Ask the running machine to stop (the stop reply is for :meth:`wait_stop`)."""
        self._stream.write_raw(INTERRUPT)

    def wait_stop(self, timeout: float) -> bytes | None:
        """Return the stop reply of a resumed machine, or ``None`` after *timeout* seconds."""
        try:
            return self._stream.read(timeout)
        except TimeoutError:
            return None
