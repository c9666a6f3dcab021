"""Kernel packages to files: where distributions put what a kernel consists of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kprobe_guest.build.cache import run_tool
from kprobe_guest.errors import BuildError

_MODULES: Final = ("lib/modules", "usr/lib/modules")
"""Packages made for a merged /usr, as Debian's from 13 on, have the second."""


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a Debian package into *directory*.

    :raises BuildError: dpkg-deb is missing, or fails.
    """
    run_tool(["dpkg-deb", "-x", str(archive), str(directory)], package="dpkg")


def arrange(unpacked: Path, release: str, directory: Path) -> None:
    """Move what the unpacked packages of kernel *release* hold to *directory*.

    That is ``vmlinuz``, and, as far as the packages have them, ``lib/modules/RELEASE`` with ``modules.dep``, ``config``
    and ``System.map``.

    :raises BuildError: there is no vmlinuz, or depmod fails.
    """
    modules = _first_directory(unpacked / place / release for place in _MODULES)
    for name in ("vmlinuz", "config", "System.map"):
        # Beside the modules: Debian since 6.19, Fedora, Arch.
        places = (unpacked / "boot" / f"{name}-{release}", *(() if modules is None else (modules / name,)))
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            found.rename(directory / name)
        elif name == "vmlinuz":
            raise BuildError(_no_vmlinuz(unpacked, places))
    if modules is None:
        return
    final = directory / "lib" / "modules" / release
    final.parent.mkdir(parents=True)
    modules.rename(final)
    # The package's installation would run this; busybox and the initramfs need modules.dep.
    depmod = "/sbin/depmod" if Path("/sbin/depmod").exists() else "depmod"
    run_tool([depmod, "-b", str(directory), release], package="kmod")


def _first_directory(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_dir()), None)


def _no_vmlinuz(unpacked: Path, places: tuple[Path, ...]) -> str:
    wanted = " or ".join(str(place.relative_to(unpacked)) for place in places)
    held = sorted({str(path.relative_to(unpacked).parent) for path in unpacked.rglob("*") if path.is_file()})
    return f"the kernel's packages hold no {wanted}; there are files in: {', '.join(held[:8]) or 'no directory'}"
