"""A kernel given by the path of its vmlinuz: any that QEMU's ``-kernel`` boots and that says its release."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Final

from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.errors import BuildError

_INSTALLED: Final = Path("/lib/modules")


def given_kernel(vmlinuz: Path, modules: Path | None) -> Kernel:
    """The kernel at *vmlinuz*, with *modules* or those that are where a distribution has them for that release.

    :raises BuildError: it is no bzImage; the modules have no ``modules.dep``.
    """
    release = read_release(vmlinuz)
    if modules is None:
        # Beside the vmlinuz: Debian since 6.19, Fedora, Arch.
        places = (vmlinuz.resolve().parent, _INSTALLED / release)
        modules = next((place for place in places if (place / "modules.dep").exists()), None)
    elif not (modules / "modules.dep").exists():
        raise BuildError(f"{modules} has no modules.dep; give the directory lib/modules/{release}, after depmod")
    files = [vmlinuz, *([modules / "modules.dep"] if modules is not None else [])]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Kernel(release, vmlinuz.resolve(), modules, repr((release, stats)).encode())


def read_release(vmlinuz: Path) -> str:
    """What ``uname -r`` will say, by the header (Documentation/arch/x86/boot.rst).

    :raises BuildError: there is no such file, or it is no bzImage.
    """
    try:
        with vmlinuz.open("rb") as file:
            setup = file.read(0x10000)
    except OSError as error:
        raise BuildError(f"the kernel cannot be read: {error}") from error
    if setup[0x202:0x206] != b"HdrS":
        raise BuildError(f"{vmlinuz} is no kernel that QEMU boots: give the bzImage (arch/x86/boot/bzImage, vmlinuz)")
    (at,) = struct.unpack_from("<H", setup, 0x20E)
    words = setup[0x200 + at :].partition(b"\0")[0].decode("ascii", "replace").split() if at else []
    if not words or not re.fullmatch(r"[\w.+~-]+", words[0]):
        raise BuildError(f"{vmlinuz} does not say which release it is")
    return words[0]
