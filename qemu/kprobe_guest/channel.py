"""The command channel: shell commands through the guest's second serial port, and their output and status back.

The guest's shell there has no echo and no prompt, so the stream holds only what commands print; each command is set
between two markers that carry a fresh token, which no earlier output and no kernel message can imitate.
"""

from __future__ import annotations

import itertools
import secrets
import select
import shlex
import socket
from pathlib import Path

from kprobe_guest.errors import GuestError

READY_MARKER = b"guest: ready"

# A terminal line discipline in canonical mode takes lines of up to 4095 characters (termios(3)).
LINE_LIMIT = 4000


class ChannelClosedError(Exception):
    """The other end went away."""


class CommandChannel:
    """A client of the channel's socket. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._received = bytearray()
        self._token = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        self._socket.close()

    def send(self, command: str, *, asks: bool = False) -> tuple[bytes, bytes]:
        """Send *command* and return the two markers between which its output will be.

        With *asks* the command's input is the channel, for :meth:`send_line`; else it has none.

        :raises GuestError: the command is too long for a terminal line.
        """
        tag = f"{self._token}-{next(self._numbers)}"
        source = "/dev/ttyS1" if asks else "/dev/null"
        line = f"echo '<<{tag}'; sh -c {shlex.quote(command)} <{source} 2>&1; echo '>>{tag}' $?\n"
        if max(map(len, line.encode().split(b"\n"))) > LINE_LIMIT:
            raise GuestError(f"a command line of {len(line)} bytes; the guest's terminal takes {LINE_LIMIT}")
        self._socket.sendall(line.encode())
        return f"<<{tag}\n".encode(), f">>{tag} ".encode()

    def send_line(self, line: str) -> None:
        """Send a line to the command that asks."""
        self._socket.sendall(line.encode() + b"\n")

    def send_end(self) -> None:
        """Tell the command that asks that there is nothing more (termios(3), VEOF)."""
        self._socket.sendall(b"\x04")

    def interrupt(self) -> None:
        """End what runs in the channel's shell, and the shell; the guest starts a new one."""
        self._socket.sendall(b"\x03")

    def receive(self, seconds: float) -> bool:
        """Wait for bytes for up to *seconds*; ``False`` when none came.

        :raises ChannelClosedError: QEMU closed the channel.
        """
        if not select.select([self._socket], [], [], seconds)[0]:
            return False
        data = self._socket.recv(1 << 20)
        if not data:
            raise ChannelClosedError
        self._received += data
        return True

    def take_ready(self) -> bool:
        """Whether the shell's ready line has arrived; if so, all up to it is dropped."""
        return self._take_through(READY_MARKER) is not None

    def take_line(self) -> str | None:
        """The next whole line that has arrived, without its end."""
        line = self._take_through(b"\n")
        return None if line is None else line.decode(errors="replace")

    def take_result(self, markers: tuple[bytes, bytes]) -> tuple[int, bytes] | None:
        """Exit status and output of the command that *markers* belong to, once all of it has arrived."""
        begin, end = markers
        at = self._received.find(end)
        if at < 0 or b"\n" not in self._received[at:]:
            return None
        line_end = self._received.index(b"\n", at)
        status = int(self._received[at + len(end) : line_end])
        start = self._received.find(begin)
        assert 0 <= start < at, "a command's end without its beginning"
        output = bytes(self._received[start + len(begin) : at])
        del self._received[: line_end + 1]
        return status, output

    def _take_through(self, marker: bytes) -> bytes | None:
        at = self._received.find(marker)
        if at < 0:
            return None
        taken = bytes(self._received[:at])
        del self._received[: at + len(marker)]
        return taken
