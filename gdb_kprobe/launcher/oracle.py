"""Guest memory through the harness: an observer that has nothing to do with the plugin's own way."""

from __future__ import annotations

from gdb_kprobe.model import PhysAddr
from kprobe_guest import GuestVm


class GuestRam:
    """A :class:`~gdb_kprobe.target.protocols.PhysicalMemory`: the file that backs the guest's RAM."""

    def __init__(self, guest: GuestVm) -> None:
        self._guest = guest

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self._guest.read_ram(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        raise AssertionError("an observer does not write")


class GuestMonitor:
    """A :class:`~gdb_kprobe.target.protocols.Monitor`: the harness's QMP socket."""

    def __init__(self, guest: GuestVm) -> None:
        self._guest = guest

    def monitor(self, command: str) -> str:
        return self._guest.hmp(command)
