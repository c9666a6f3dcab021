"""A connection to the stub that is lost at a packet of one's choice, as that of a killed gdb is."""

from __future__ import annotations

from collections.abc import Callable

from gdb_kprobe.errors import ConnectionLostError
from gdb_kprobe.model import CpuId
from gdb_kprobe.target.rsp import RspSocket

RUN = b"vCont;c"


def change_of(packet: bytes) -> str:
    """What a packet changes, or that it lets vCPUs run, by the name of its kind; empty for one that only asks."""
    if packet.startswith(b"vCont;"):
        return "vCont"
    kind = packet[:1].decode()
    return kind if kind in ("M", "X", "G", "P", "Z", "z") else ""


class CutChannel(RspSocket):
    """A connection that is lost when *left* more packets are through for which *counts* is true (``None``: never).

    *behind*: not before the packet that is one too many but right after it; with :meth:`resume`, before the machine has
    stopped again. *cut_at* is that packet, empty while the connection stands. Steps of one vCPU with none of the
    packets that count between them are one: QEMU executes nothing in one step of some 500, and it is made again.
    """

    left: int | None = None
    behind = False
    cut_at = b""

    def __init__(self, address: str, counts: Callable[[bytes], object] = change_of) -> None:
        self._counts = counts
        self._last = b""
        super().__init__(address)

    def send(self, packet: bytes) -> bytes:
        self._count(packet)
        return super().send(packet)

    def resume(self, how: bytes = RUN) -> None:
        self._count(how)
        super().resume(how)
        self._end_if_cut()

    def _count(self, packet: bytes) -> None:
        self._end_if_cut()
        if self.left is None or not self._counts(packet) or (packet == self._last and packet.startswith(b"vCont;s")):
            return
        self._last = packet
        if not self.left:
            self.cut_at = packet
            if not self.behind:
                self._end_if_cut()
        self.left -= 1

    def _end_if_cut(self) -> None:
        if self.cut_at:
            raise ConnectionLostError("cut")


def is_cut(act: Callable[[CpuId], object], cpu: CpuId) -> bool:
    """Whether the connection is lost while *act* does something to *cpu*."""
    try:
        act(cpu)
    except ConnectionLostError:
        return True
    return False
