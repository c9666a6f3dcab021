"""The other end of the connection: a stub that answers as it is told, and a channel of a dictionary."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from gdb_kprobe.errors import ConnectionLostError
from gdb_kprobe.target.rsp import RspSocket

Answer = bytes | list[bytes] | None


def framed(body: bytes) -> bytes:
    """*body*, which is escaped already, as a packet."""
    return b"$%b#%02x" % (body, sum(body) & 0xFF)


class ScriptedStub:
    """Serves one client. *answers*: packet -> body or bodies to send; ``None`` closes the connection.

    What a client sends without being in *answers* is answered with an empty packet, as by any stub.
    """

    def __init__(self, path: Path, greeting: bytes = b"T02thread:p01.01;") -> None:
        self.address = str(path)
        self.answers: dict[bytes, Answer] = {b"qSupported:multiprocess+": b"PacketSize=1000", b"D;1": b"OK"}
        self.silent: set[bytes] = set()
        self.packets: list[bytes] = []
        self.raw = b""
        self.connection: socket.socket | None = None
        self._greeting = greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def send_raw(self, data: bytes) -> None:
        assert self.connection is not None
        self.connection.sendall(data)

    def close(self) -> None:
        for sock in (self.connection, self._listener):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            self.connection, _ = self._listener.accept()
            if self._greeting:
                self.send_raw(framed(self._greeting))
            buffer = b""
            while data := self.connection.recv(4096):
                self.raw += data
                buffer += data
                while b"#" in buffer and len(buffer) >= buffer.index(b"#") + 3:
                    packet, rest = buffer.split(b"#", 1)
                    buffer = rest[2:]
                    self._handle(packet.partition(b"$")[2])

    def _handle(self, packet: bytes) -> None:
        assert self.connection is not None
        self.packets.append(packet)
        if packet in self.silent:
            return
        answer = self.answers.get(packet, b"")
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for body in [answer] if isinstance(answer, bytes) else answer:
            self.send_raw(framed(body))


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedStub]:
    stub = ScriptedStub(tmp_path / "gdb")
    yield stub
    stub.close()


@pytest.fixture
def make_scripted(tmp_path: Path) -> Callable[[bytes], ScriptedStub]:
    return lambda greeting: ScriptedStub(tmp_path / "other", greeting)


@pytest.fixture
def channel(scripted: ScriptedStub) -> Iterator[RspSocket]:
    with RspSocket(scripted.address, timeout=5) as channel:
        scripted.packets.clear()
        yield channel


class FakeChannel:
    """A stub behind no socket at all: memory, registers, and physical mode, in QEMU's packets."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.answers: dict[bytes, bytes] = {}
        self.memory = {"physical": bytearray(0x4000), "virtual": bytearray(0x4000)}
        self.mode = "virtual"
        self.selected = b""
        self.broken_at: int | None = None
        self.monitor_texts: dict[str, str] = {}

    def send(self, packet: bytes) -> bytes:
        self.packets.append(packet)
        if self.broken_at is not None and len(self.packets) >= self.broken_at:
            self.broken_at = None
            raise ConnectionLostError("lost")
        if packet in self.answers:
            return self.answers[packet]
        if packet.startswith(b"Qqemu.PhyMemMode:"):
            self.mode = "physical" if packet.endswith(b"1") else "virtual"
            return b"OK"
        if packet.startswith(b"Hg"):
            self.selected = packet[2:]
            return b"OK"
        if packet[:1] in (b"m", b"M"):
            return self._memory_packet(packet)
        return b""

    def send_all(self, packets: Sequence[bytes]) -> list[bytes]:
        return [self.send(packet) for packet in packets]

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = b"vCont;c") -> bytes | None:
        return self.send(how)

    def check_can_run(self) -> None:
        pass

    def monitor(self, command: str) -> str:
        return self.monitor_texts.get(command, "Error: no such command\r\n")

    def _memory_packet(self, packet: bytes) -> bytes:
        head, _, data = packet[1:].partition(b":")
        addr, size = (int(word, 16) for word in head.split(b","))
        memory = self.memory[self.mode]
        assert len(packet) <= 4096, "QEMU's buffer"
        assert 2 * size <= 4096, "QEMU's buffer"
        if addr + size > len(memory):
            return b"E14"
        if packet[:1] == b"m":
            return bytes(memory[addr : addr + size]).hex().encode()
        memory[addr : addr + size] = bytes.fromhex(data.decode())
        return b"OK"


@pytest.fixture
def fake() -> FakeChannel:
    return FakeChannel()
