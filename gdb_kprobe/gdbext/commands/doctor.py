"""``kprobe doctor``."""

from __future__ import annotations

import gdb

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.channel import GdbChannel
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.guest.doctor import Finding, examine
from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.render.doctor import doctor
from gdb_kprobe.target.ram import RamView, SharedRam
from gdb_kprobe.target.socket_peer import peer_processes
from gdb_kprobe.target.stub import QemuStub


class Doctor(Command):
    """Say what the guest and its QEMU offer to probes, and what would make it better.

    kprobe doctor

    The guest must be stopped; an attach is not needed, a connection of gdb's ('target remote ...') is enough.
    Nothing is written. Lines that begin with '!' have a hint.

    Example:
      kprobe doctor"""

    def run(self, argument: str) -> None:
        findings = _attached() if plugin.the_plugin().link is not None else _connected()
        write(doctor([(found.what, found.state, found.remedy) for found in findings]))


def _attached() -> list[Finding]:
    link = plugin.the_plugin().need_link()
    with link.stopped():
        guest = link.session.guest
        if not isinstance(guest, LinuxGuest):
            raise GuestStateError("'kprobe doctor' knows Linux guests only", "'kprobe info' shows the attachment")
        return [
            *examine(link.stub, guest, len(link.session.machine.cpus())),
            Finding("counters", link.data_plane()),
        ]


def _connected() -> list[Finding]:
    if not isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection):
        raise KprobeError("not connected to a guest", "'target remote ADDRESS', or 'kprobe attach PROFILE'")
    channel = GdbChannel()
    stub = QemuStub(channel)
    with uninterrupted(), channel.borrowed(stub):
        memory = RamView(stub, SharedRam.discover(stub))
        try:
            memory.use_ram_of(stub, peer_processes(channel.descriptor))
            guest = open_linux(stub, memory)
            guest.prepare()
            return list(examine(stub, guest, len(stub.cpus())))
        finally:
            memory.close()


def register() -> None:
    Doctor("doctor")
