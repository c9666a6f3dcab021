"""A debugger without gdb, for tests that cut it off: our own connection to the stub, and breakpoints of the stub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection

from gdb_kprobe.model import CpuId, VirtAddr
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub


class StubClient:
    """A client over *channel*; its machine is stopped. (A :class:`~gdb_kprobe.target.protocols.Breakpoints`.)"""

    def __init__(self, channel: RspSocket) -> None:
        self._channel = channel
        self.stub = QemuStub(channel)

    def insert(self, addr: VirtAddr) -> None:
        assert self._channel.send(b"Z1,%x,1" % addr) == b"OK"

    def remove(self, addr: VirtAddr) -> None:
        assert self._channel.send(b"z1,%x,1" % addr) == b"OK"

    def is_taken(self, addr: VirtAddr) -> bool:
        return False

    def taken(self) -> tuple[int, ...]:
        return ()

    def watch(self, addrs: Collection[VirtAddr]) -> None:
        assert not addrs, "no user steps here"

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def hardware_taken(self) -> int:
        return 0

    def wait_stop(self, seconds: float = 10) -> CpuId:
        """Wait until the resumed machine stops; which vCPU did."""
        reply = self._channel.wait_stop(seconds)
        assert reply is not None, "no stop"
        self.stub.forget()
        thread = re.search(rb"thread:p[0-9a-f]+\.([0-9a-f]+)", reply)
        return CpuId(int(thread[1], 16) if thread else 1)
