"""A small client of the gdb remote serial protocol over a socket.

For what must work when gdb's own connection does not: the rescue after a lost connection, and tests that drive a
guest without gdb. Framing is section "Overview" of gdb's manual, appendix "Remote Protocol".
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from types import TracebackType

from gdb_kprobe.errors import ConnectionLostError, TargetError

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for one reply."""

_RESUMES = (b"c", b"s", b"vCont;", b"?")
"""Requests whose reply is a stop reply. For all others a stop reply in between is news, not the answer."""


def open_socket(address: str, timeout: float) -> socket.socket:
    """Connect to ``/path/of/a/unix/socket`` or ``host:port``.

    :raises ConnectionLostError: nobody listens there.
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

    :raises OSError: nobody knows the name.
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
        self._buffer = bytearray()
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
        self._put(packet)
        reply = self._reply()
        while reply[:1] in (b"T", b"S") and not packet.startswith(_RESUMES):
            reply = self._reply()
        return reply

    def monitor(self, command: str) -> str:
        self._put(b"qRcmd," + command.encode().hex().encode())
        output: list[str] = []
        while True:
            reply = self._reply()
            if reply == b"OK" or not reply:
                return "".join(output)
            if reply[:1] == b"E":
                raise TargetError(f"monitor command {command!r} failed: {reply.decode()}")
            if reply[:1] == b"O":
                output.append(bytes.fromhex(reply[1:].decode()).decode(errors="replace"))

    def check_can_run(self) -> None:
        """It always can."""

    def run_for(self, seconds: float) -> None:
        self.resume()
        if self.wait_stop(seconds) is None:
            self.interrupt()
            self._reply()

    def resume(self) -> None:
        """Let all vCPUs run; :meth:`wait_stop` or :meth:`interrupt` ends it."""
        self._put(b"vCont;c")

    def interrupt(self) -> None:
        """Ask the running machine to stop (the stop reply is for :meth:`wait_stop`)."""
        self._raw(b"\x03")

    def wait_stop(self, timeout: float) -> bytes | None:
        """Return the stop reply of a resumed machine, or ``None`` after *timeout* seconds."""
        try:
            return self._get(timeout)
        except TimeoutError:
            return None

    def _reply(self) -> bytes:
        """:raises ConnectionLostError: there is none in time; one that comes later would be taken for another's."""
        try:
            return self._get(self._timeout)
        except TimeoutError as error:
            raise ConnectionLostError(
                f"no answer from the gdbstub at {self.address} within {self._timeout:g} s",
                "is another gdb connected (the stub serves one client), or QEMU itself stopped?",
            ) from error

    def _raw(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise ConnectionLostError(f"the connection to {self.address} is lost: {error}") from error

    def _put(self, packet: bytes) -> None:
        escaped = bytearray()
        for byte in packet:
            if byte in b"#$}*":
                escaped += bytes((0x7D, byte ^ 0x20))
            else:
                escaped.append(byte)
        self._raw(b"$%b#%02x" % (bytes(escaped), sum(escaped) & 0xFF))

    def _get(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while True:
            start = self._buffer.find(b"$")
            end = self._buffer.find(b"#", start + 1) if start >= 0 else -1
            if end >= 0 and len(self._buffer) >= end + 3:
                body = bytes(self._buffer[start + 1 : end])
                del self._buffer[: end + 3]
                self._raw(b"+")
                return _unescape(body)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._sock.settimeout(remaining)
            with contextlib.suppress(TimeoutError):
                try:
                    data = self._sock.recv(1 << 16)
                except TimeoutError:
                    raise
                except OSError as error:
                    raise ConnectionLostError(f"the connection to {self.address} is lost: {error}") from error
                if not data:
                    raise ConnectionLostError(f"the gdbstub at {self.address} closed the connection")
                self._buffer += data


def _unescape(body: bytes) -> bytes:
    """Undo ``}`` escapes and ``*`` run lengths."""
    if b"}" not in body and b"*" not in body:
        return body
    out = bytearray()
    index = 0
    while index < len(body):
        byte = body[index]
        if byte == 0x7D:
            index += 1
            out.append(body[index] ^ 0x20)
        elif byte == 0x2A:
            index += 1
            out += out[-1:] * (body[index] - 29)
        else:
            out.append(byte)
        index += 1
    return bytes(out)
