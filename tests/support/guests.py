"""What gdb is told of a guest of the harness, and the guest that nobody has prepared."""

from __future__ import annotations

from collections.abc import Sequence

from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.spec import PROFILES


def environment(guest: GuestVm) -> dict[str, str]:
    """What the profiles in configs/ refer to."""
    return {"KPROBE_GUEST": str(guest.directory), "KPROBE_STUB": guest.gdb_address}


def profile(guest: GuestVm) -> str:
    """The name of the profile in configs/ that is for *guest*."""
    return PROFILES[guest.spec.region]


def unprepared(kernel: str = "debian", vcpus: int = 1, extra_cmdline: Sequence[str] = ()) -> GuestSpec:
    """A guest as of ``qemu-system-x86_64 -s -kernel ...``: all else is QEMU's default, but for 128 MiB of memory."""
    return GuestSpec(
        kernel=kernel,
        vcpus=vcpus,
        cpu="default",
        machine="pc",
        region="none",
        shared_ram=False,
        gdb="tcp",
        extra_cmdline=tuple(extra_cmdline),
    )
