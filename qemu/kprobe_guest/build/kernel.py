"""Debian's kernels, by package name, unpacked into the cache without installing anything.

Nothing is pinned: ``linux-image-cloud-amd64`` is whatever Debian's package lists say it is today, ``newest`` is the
highest version of the signed cloud images in these lists.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kprobe_guest.build.apt import Apt
from kprobe_guest.build.cache import atomic_directory, build_lock, cache_directory, progress
from kprobe_guest.build.unpack import arrange, unpack
from kprobe_guest.errors import BuildError

META_PACKAGE = "linux-image-cloud-amd64"
_IMAGE_PACKAGE = re.compile(r"linux-image-(\d+\.\d+\.\d\S*-cloud-amd64)")
_PARTS: Final = ("binary", "modules", "base")
"""Since 6.19 ``linux-image-RELEASE`` is empty, and depends on ``linux-PART-RELEASE`` of these."""

LinuxKind = Literal["debian", "newest"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: *release* is what ``uname -r`` says in the guest."""

    release: str
    directory: Path

    @property
    def vmlinuz(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """``/lib/modules/RELEASE``, with ``modules.dep``."""
        return self.directory / "lib" / "modules" / self.release


def find_kernel(kind: LinuxKind) -> Kernel:
    """The kernel that the last set-up resolved *kind* to; set up now if there was none.

    :raises BuildError: there is none and it cannot be fetched.
    """
    return cached_kernel(kind) or fetch_kernel(kind)


def cached_kernel(kind: LinuxKind) -> Kernel | None:
    """The kernel that *kind* was resolved to last, without asking the network."""
    link = _kernels() / kind
    if not (link / "vmlinuz").exists():
        return None
    directory = link.resolve()
    return Kernel(directory.name, directory)


def fetch_kernel(kind: LinuxKind) -> Kernel:
    """Resolve *kind* by today's package lists and fetch it unless it is in the cache.

    Falls back to the cached kernel, and says so, when apt cannot resolve or fetch, or a package cannot be unpacked.

    :raises BuildError: nothing cached, nothing fetched.
    """
    with build_lock():
        try:
            kernel = _unpacked(_resolve(kind))
        except BuildError as error:
            cached = cached_kernel(kind)
            if cached is None:
                raise
            progress(f"using the cached kernel {cached.release}: {error}")
            return cached
        _point(kind, kernel)
        return kernel


def _kernels() -> Path:
    return cache_directory() / "kernels"


def _resolve(kind: LinuxKind) -> str:
    """Name of the real, signed image package."""
    apt = Apt()
    names = apt.depends(META_PACKAGE) if kind == "debian" else apt.names("linux-image-")
    images = list(apt.candidates(name for name in names if _IMAGE_PACKAGE.fullmatch(name)))
    if not images:
        raise BuildError(
            f"Debian's package lists name no {META_PACKAGE} image; run: sudo apt-get update"
            " (and see that /etc/apt/sources.list has Debian's main section)"
        )
    return max(images, key=functools.cmp_to_key(_compare_releases))


def _compare_releases(left: str, right: str) -> int:
    """Order of two image package names by dpkg's rules for versions (6.12.9 < 6.12.10, ~ before nothing)."""
    if left == right:
        return 0
    versions = [name.removeprefix("linux-image-") for name in (left, right)]
    compared = subprocess.run(["dpkg", "--compare-versions", versions[0], "lt", versions[1]], check=False)
    return -1 if compared.returncode == 0 else 1


def _unpacked(image: str) -> Kernel:
    """The kernel of the package *image*, from the cache or fetched.

    :raises BuildError: a package cannot be fetched, or holds something else than expected.
    """
    match = _IMAGE_PACKAGE.fullmatch(image)
    assert match, image
    release = match[1]
    kernel = Kernel(release, _kernels() / release)
    apt = Apt()
    version = apt.candidates([image])[image]
    stamp = {"package": image, "version": version}
    if _stamp(kernel) == stamp:
        return kernel
    parts = [part for part in apt.depends(image) if part in {f"linux-{part}-{release}" for part in _PARTS}]
    try:
        with (
            atomic_directory(kernel.directory) as building,
            tempfile.TemporaryDirectory(prefix=".unpacking-", dir=_kernels()) as temporary,
        ):
            files = Path(temporary) / "files"
            for package in [image, *parts]:
                progress(f"fetching {package} {version}")
                archive = apt.download(package, Path(temporary))
                progress(f"unpacking {archive.name}")
                unpack(archive, files)
            arrange(files, release, building)
            (building / "package.json").write_text(json.dumps(stamp))
    except OSError as error:
        raise BuildError(f"the packages of kernel {release} could not be unpacked: {error}") from error
    return kernel


def _stamp(kernel: Kernel) -> object:
    """What the cached kernel was made from; ``None`` if there is none, or if it cannot be told."""
    try:
        stamp: object = json.loads((kernel.directory / "package.json").read_text())
    except (OSError, ValueError):
        return None
    return stamp if kernel.vmlinuz.exists() else None


def _point(kind: LinuxKind, kernel: Kernel) -> None:
    """Make the link KIND -> RELEASE, in one step."""
    link = _kernels() / f".{kind}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.release)
    link.rename(_kernels() / kind)
