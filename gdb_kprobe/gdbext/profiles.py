"""The part of the Python API that finds a profile, and what a profile or its name stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.config.load import find_profile, load_profile
from gdb_kprobe.config.profile import KernelKind, Profile
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import settings


def profile(name: str | None = None, vmlinux: Path | None = None) -> Profile:
    """The profile called *name* (one in configs/, or a file; ``None``: that of ``set kprobe profile``).

    :param vmlinux: the kernel's file with debug info, in place of the one that the profile names.
    :raises ConfigError: there is no such profile, or it is wrong.
    :raises KprobeError: there is no such vmlinux, or the guest of the profile is no Linux; or no name is known.
    """
    wanted = name or settings.settings().profile
    if not wanted:
        raise KprobeError(
            "which guest? no profile was given",
            f"'kprobe attach NAME', with a file or one of {CONFIGS} ('plain' is for any 'qemu -s'); or 'set kprobe "
            "profile NAME' once",
        )
    found = load_profile(find_profile(wanted, (Path.cwd(), CONFIGS)))
    if vmlinux is None:
        return found
    path = vmlinux.expanduser().absolute()
    if found.kernel.kind is not KernelKind.LINUX:
        raise KprobeError("--vmlinux is for Linux guests", "load a bare-metal program with gdb's 'file'")
    if not path.is_file():
        raise KprobeError(f"--vmlinux: there is no file {path}", "the kernel's build has it at its top")
    return replace(found, kernel=replace(found.kernel, vmlinux=path))


def chosen(wanted: Profile | str | None) -> Profile:
    """*wanted*, or the profile of that name; errors are those of :func:`profile`."""
    return wanted if isinstance(wanted, Profile) else profile(wanted)
