"""The part of the Python API that examines a guest, attached or not (``kprobe doctor``)."""

from __future__ import annotations

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext.channel import GdbChannel
from gdb_kprobe.gdbext.connection import is_connected
from gdb_kprobe.gdbext.link import Link
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.guest.doctor import Finding, examine
from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.session.data_plane import data_plane_of
from gdb_kprobe.target.ram import RamView, SharedRam
from gdb_kprobe.target.socket_peer import peer_processes
from gdb_kprobe.target.stub import QemuStub


def doctor() -> tuple[Finding, ...]:
    """What the stopped guest and its QEMU offer to probes. An attach is not needed; nothing is written.

    :raises KprobeError: gdb is connected to no guest.
    :raises GuestStateError: the guest runs, or is no Linux.
    """
    link = the_plugin().attachments.link
    return _connected() if link is None else _attached(link)


def _attached(link: Link) -> tuple[Finding, ...]:
    with link.stopped():
        guest = link.session.guest
        if not isinstance(guest, LinuxGuest):
            raise GuestStateError("'kprobe doctor' knows Linux guests only", "'kprobe info' shows the attachment")
        found = examine(link.stub, guest, len(link.session.machine.cpus()))
        return (*found, Finding("counters", data_plane_of(link.memory, link.session.region)))


def _connected() -> tuple[Finding, ...]:
    if not is_connected():
        raise KprobeError("not connected to a guest", "'target remote ADDRESS', or 'kprobe attach PROFILE'")
    channel = GdbChannel()
    stub = QemuStub(channel)
    with uninterrupted(), channel.borrowed(stub):
        memory = RamView(stub, SharedRam.discover(stub))
        try:
            memory.use_ram_of(stub, peer_processes(channel.descriptor))
            guest = open_linux(stub, memory)
            guest.prepare()
            return tuple(examine(stub, guest, len(stub.cpus())))
        finally:
            memory.close()
