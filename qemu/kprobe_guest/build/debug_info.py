"""A kernel's vmlinux with debug info, from the package that Debian has beside each kernel. No set-up fetches it.

A kernel that was built here has its own beside it.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from kprobe_guest.build.apt import Apt
from kprobe_guest.build.cache import atomic_directory, build_lock, progress
from kprobe_guest.build.kernel_files import Kernel, kernels_directory
from kprobe_guest.errors import BuildError

_NAME: Final = "vmlinux"


def fetch_debug_info(kernel: Kernel) -> Path:
    """The vmlinux of *kernel*; fetched unless it is in the cache: 300 MB of a package, of which as much again is kept.

    :raises BuildError: it cannot be fetched, or the package has none.
    """
    built_here = kernel.vmlinuz.parent / _NAME
    if built_here.exists():
        return built_here
    directory = kernels_directory() / f"{kernel.release}-debug"
    with build_lock():
        if not (directory / _NAME).exists():
            package = f"linux-image-{kernel.release}-dbg"
            with (
                atomic_directory(directory) as building,
                tempfile.TemporaryDirectory(prefix="gdb-kprobe-deb-") as temporary,
            ):
                progress(f"fetching {package}: this takes minutes")
                archive = Apt().download(package, Path(temporary))
                _extract(archive, _members(kernel.release), building / _NAME)
    return directory / _NAME


def _members(release: str) -> frozenset[str]:
    """Where a package of debug info has the vmlinux of *release*: as long as vmlinuz is in /boot, and since."""
    return frozenset(
        f"./usr/lib/debug/{place}"
        for place in (f"boot/vmlinux-{release}", f"lib/modules/{release}/vmlinux", f"usr/lib/modules/{release}/vmlinux")
    )


def _extract(archive: Path, members: frozenset[str], to: Path) -> None:
    """Unpack one file of a Debian package, the first of *members*; there is much more in this one."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:
                found = next((file for file in files if file.name in members and file.isfile()), None)
                data = None if found is None else files.extractfile(found)
                if data is None:
                    raise BuildError(f"{archive.name} has none of {', '.join(sorted(members))}")
                with to.open("wb") as out:
                    shutil.copyfileobj(data, out)
        except (tarfile.TarError, OSError) as error:
            raise BuildError(f"{archive.name} cannot be unpacked: {error}") from error
        finally:
            unpacking.kill()  # there is much more in it
