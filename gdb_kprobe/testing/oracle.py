"""Guest memory through the harness: an observer that has nothing to do with the plugin's own way."""

from __future__ import annotations

import contextlib

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.testing.text import TextSnapshot
from kprobe_guest import GuestVm


class GuestRam:
    """A :class:`~gdb_kprobe.target.protocols.PhysicalMemory`: the file that backs the guest's RAM.

    Of a guest whose RAM is private: what QEMU's monitor saves to a file.
    """

    def __init__(self, guest: GuestVm) -> None:
        self._guest = guest

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if self._guest.ram_path is not None:
            return self._guest.read_ram(addr, size)
        saved = self._guest.directory / "memory"
        self._guest.qmp("pmemsave", val=addr, size=size, filename=str(saved))
        return saved.read_bytes()

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        raise AssertionError("an observer does not write")

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class GuestMonitor:
    """A :class:`~gdb_kprobe.target.protocols.Monitor`: the harness's QMP socket."""

    def __init__(self, guest: GuestVm) -> None:
        self._guest = guest

    def monitor(self, command: str) -> str:
        return self._guest.hmp(command)


def text_of(guest: GuestVm, known: LinuxGuest | None = None) -> TextSnapshot:
    """The guest's text as it is now; no gdb is connected.

    The guest is held meanwhile: where its kernel is, is found by the page table that a vCPU uses, which may be gone in
    the next moment. *known*: what was found out before.
    """
    with guest.held():
        return TextSnapshot(GuestMonitor(guest), GuestRam(guest), known)
