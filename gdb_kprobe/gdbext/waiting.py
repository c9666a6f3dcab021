"""The part of the Python API that lets a booting guest run until its kernel is up (``kprobe attach --wait``)."""

from __future__ import annotations

import time
from collections.abc import Callable

from gdb_kprobe.config.profile import KernelKind, Profile
from gdb_kprobe.errors import GuestPanickedError, GuestResetError, KprobeError
from gdb_kprobe.gdbext.channel import GdbChannel, flush_registers
from gdb_kprobe.gdbext.connection import connect
from gdb_kprobe.gdbext.profiles import chosen
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.guest.bare import open_bare
from gdb_kprobe.guest.linux import open_linux
from gdb_kprobe.target.ram import RamView, SharedRam
from gdb_kprobe.target.stub import QemuStub

SLICE = 0.25
"""Seconds that the guest runs between two looks, at the least."""

_SHARE = 3
"""So much longer than a look takes does it run, at the least."""

MOST = 5.0
"""Seconds that it runs at the most. Ctrl-C ends each slice."""

PATIENCE = 300.0
"""Seconds after which a kernel that is still not up is not waited for any more."""


def wait_for_kernel(profile: Profile | str | None = None, tell: Callable[[str], None] = lambda why: None) -> None:
    """Let a guest that is booting run until its kernel is up; then it is stopped, and can be attached to.

    :param profile: that of the guest, or the name of one (:func:`profile`).
    :param tell: called with what the kernel lacks, whenever that is something else.
    :raises GuestPanickedError: its kernel has panicked.
    :raises GuestStateError: it is not up after 300 seconds; says what was seen last.
    :raises KeyboardInterrupt: by a Ctrl-C, which ends the waiting, the guest stopped.
    """
    profile = chosen(profile)
    connect(profile)
    channel = GdbChannel()
    channel.heeds_ctrl_c = True
    stub = QemuStub(channel)
    deadline = time.monotonic() + PATIENCE
    last = ""
    # Ctrl-C is heard between packets and while the guest runs, so that nothing is left half done.
    with uninterrupted():
        try:
            memory = RamView(stub, SharedRam.discover(stub))
            while True:
                started = time.monotonic()
                try:
                    _look(stub, memory, profile)
                    return
                except (KprobeError, GuestResetError) as error:
                    if isinstance(error, GuestPanickedError) or time.monotonic() > deadline:
                        raise
                    if error.message != last:
                        tell(error.message)
                    last = error.message
                looked = time.monotonic() - started
                channel.run_for(min(max(SLICE, _SHARE * looked), MOST))
                stub.forget()
        finally:
            channel.heeds_ctrl_c = False
            flush_registers()


def _look(stub: QemuStub, memory: RamView, profile: Profile) -> None:
    if profile.kernel.kind is KernelKind.LINUX:
        open_linux(stub, memory, profile.kernel.vmlinux)
    else:
        open_bare(stub, memory, {}, None)
