"""Packets of the gdb remote serial protocol over an open descriptor: a socket, or whatever else gdb connects by.

Framing is section "Overview" of gdb's manual, appendix "Remote Protocol". Nothing here changes the descriptor's mode:
it may be shared with gdb, whose own reads and writes are to block as ever.
"""

from __future__ import annotations

import os
import select
import time

from gdb_kprobe.errors import ConnectionLostError, TargetError

INTERRUPT = b"\x03"
"""Stops a running machine; a stopped stub ignores it."""

RUN = b"vCont;c"
"""Let all vCPUs run."""

_RESUMES = (b"c", b"s", b"vCont;", b"?")
"""Requests whose reply is a stop reply. For all others a stop reply in between is news, not the answer."""

_MOST = 1 << 16


class PacketStream:
    """Frames what is written to *descriptor* and unframes what is read; *address* is for messages.

    The caller owns the descriptor. One request is on its way at a time, so that nothing is read that belongs to others.
    """

    def __init__(self, descriptor: int, address: str) -> None:
        self._descriptor = descriptor
        self._address = address
        self._buffer = bytearray()
        self._readable = select.poll()
        self._readable.register(descriptor, select.POLLIN)

    def close(self) -> None:
        """Forget the descriptor, which its owner is about to close: its number may soon be that of something else."""
        self._descriptor = -1

    def ask(self, packet: bytes, timeout: float) -> bytes:
        """Send *packet* and return the reply's payload, unescaped.

        :raises ConnectionLostError: there is none in *timeout* seconds; one that comes later would be another's.
        """
        self.write(packet)
        reply = self.reply(timeout)
        while reply[:1] in (b"T", b"S") and not packet.startswith(_RESUMES):
            reply = self.reply(timeout)
        return reply

    def monitor(self, command: str, timeout: float) -> str:
        """Run *command* of QEMU's text monitor (``qRcmd``) and return what it printed.

        :raises TargetError: QEMU refuses it.
        :raises ConnectionLostError: QEMU is silent for *timeout* seconds.
        """
        self.write(b"qRcmd," + command.encode().hex().encode())
        output = bytearray()
        while True:
            reply = self.reply(timeout)
            if reply == b"OK" or not reply:
                return output.decode(errors="replace")
            if reply[:1] == b"E":
                raise TargetError(f"monitor command {command!r} failed: {reply.decode()}")
            if reply[:1] == b"O":
                output += bytes.fromhex(reply[1:].decode())

    def reply(self, timeout: float) -> bytes:
        """Return the payload of the next packet.

        :raises ConnectionLostError: none comes in *timeout* seconds.
        """
        try:
            return self.read(timeout)
        except TimeoutError as error:
            raise ConnectionLostError(
                f"no answer from the gdbstub at {self._address} within {timeout:g} s",
                "is another gdb connected (the stub serves one client), or QEMU itself stopped?",
            ) from error

    def write(self, packet: bytes) -> None:
        """Send *packet*, framed and escaped."""
        escaped = packet
        if any(byte in packet for byte in b"#$}*"):
            escaped = b"".join(b"}%c" % (byte ^ 0x20) if byte in b"#$}*" else b"%c" % byte for byte in packet)
        self.write_raw(b"$%b#%02x" % (escaped, sum(escaped) & 0xFF))

    def write_raw(self, data: bytes) -> None:
        """Send *data* as it is.

        :raises ConnectionLostError: the other end is gone.
        """
        try:
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # gdb, which opened it, has made it so
                    select.select([], [self._descriptor], [])
        except OSError as error:
            raise ConnectionLostError(f"the connection to {self._address} is lost: {error}") from error

    def read(self, timeout: float) -> bytes:
        """Return the payload of the next packet, acknowledged.

        :raises TimeoutError: it is not complete after *timeout* seconds; what has come of it is kept.
        :raises ConnectionLostError: the other end is gone.
        """
        deadline = time.monotonic() + timeout
        while True:
            start = self._buffer.find(b"$")
            end = self._buffer.find(b"#", start + 1) if start >= 0 else -1
            if end >= 0 and len(self._buffer) >= end + 3:
                body = bytes(self._buffer[start + 1 : end])
                del self._buffer[: end + 3]
                self.write_raw(b"+")
                return _unescape(body)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            if self._descriptor < 0 or self._readable.poll(remaining * 1000):
                self._buffer += self._read_some()

    def _read_some(self) -> bytes:
        try:
            data = os.read(self._descriptor, _MOST)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConnectionLostError(f"the connection to {self._address} is lost: {error}") from error
        if not data:
            raise ConnectionLostError(f"the gdbstub at {self._address} closed the connection")
        return data


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
