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
from typing import Literal

from kprobe_guest.build.cache import atomic_directory, build_lock, cache_directory, progress, run_tool
from kprobe_guest.errors import BuildError

META_PACKAGE = "linux-image-cloud-amd64"
_IMAGE_PACKAGE = re.compile(r"linux-image-(\d+\.\d+\.\d\S*-cloud-amd64)")

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

    Falls back to the cached kernel, and says so, when apt cannot resolve or fetch.

    :raises BuildError: nothing cached, nothing fetched.
    """
    with build_lock():
        try:
            package = _resolve(kind)
            kernel = _unpack(package)
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
    if kind == "debian":
        shown = run_tool(["apt-cache", "showpkg", META_PACKAGE], package="apt")
        depends = run_tool(["apt-cache", "depends", META_PACKAGE], package="apt") if shown.strip() else ""
        names = [name for line in depends.splitlines() if (name := line.partition("Depends: ")[2])]
    else:
        names = run_tool(["apt-cache", "pkgnames", "linux-image-"], package="apt").split()
    images = list(_candidates([name for name in names if _IMAGE_PACKAGE.fullmatch(name)]))
    if not images:
        raise BuildError(
            f"Debian's package lists name no {META_PACKAGE} image; run: sudo apt-get update"
            " (and see that /etc/apt/sources.list has Debian's main section)"
        )
    return max(images, key=functools.cmp_to_key(_compare_releases))


def _candidates(packages: list[str]) -> dict[str, str]:
    """The version that apt would fetch of each of *packages*; those that are only mentioned somewhere are left out."""
    if not packages:
        return {}
    policy = run_tool(["apt-cache", "policy", *packages], package="apt")
    found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)$", policy, re.M)
    return {name: version for name, version in found if version != "(none)"}


def _compare_releases(left: str, right: str) -> int:
    """Order of two image package names by dpkg's rules for versions (6.12.9 < 6.12.10, ~ before nothing)."""
    if left == right:
        return 0
    versions = [name.removeprefix("linux-image-") for name in (left, right)]
    compared = subprocess.run(["dpkg", "--compare-versions", versions[0], "lt", versions[1]], check=False)
    return -1 if compared.returncode == 0 else 1


def _unpack(package: str) -> Kernel:
    match = _IMAGE_PACKAGE.fullmatch(package)
    assert match, package
    release = match[1]
    kernel = Kernel(release, _kernels() / release)
    version = _candidates([package])[package]
    stamp = kernel.directory / "package.json"
    if stamp.exists() and json.loads(stamp.read_text()) == {"package": package, "version": version}:
        return kernel
    with atomic_directory(kernel.directory) as building:
        progress(f"fetching {package} {version}")
        with tempfile.TemporaryDirectory(prefix="gdb-kprobe-deb-") as temporary:
            archive = download(package, Path(temporary))
            progress(f"unpacking {archive.name}")
            run_tool(["dpkg-deb", "-x", str(archive), str(building)], package="dpkg")
        for name in ("vmlinuz", "config", "System.map"):
            (building / "boot" / f"{name}-{release}").rename(building / name)
        # The package's installation would run this; busybox and the initramfs need modules.dep.
        depmod = "/sbin/depmod" if Path("/sbin/depmod").exists() else "depmod"
        run_tool([depmod, "-b", str(building), release], package="kmod")
        (building / "package.json").write_text(json.dumps({"package": package, "version": version}))
    return kernel


def download(package: str, directory: Path) -> Path:
    """Fetch *package* into the empty *directory*; returns its file.

    :raises BuildError: apt cannot.
    """
    # Root's apt drops to a user that cannot write here and says so at length: fetch as who we are.
    command = ["apt-get", "-q", "-o", f"APT::Sandbox::User={_user()}", "download", package]
    try:
        run_tool(command, package="apt", cwd=directory)
    except BuildError as error:
        raise BuildError(f"{error}\n(no network, or old package lists? run: sudo apt-get update)") from error
    [archive] = directory.glob("*.deb")
    return archive


def _user() -> str:
    return "root" if os.geteuid() == 0 else str(os.environ.get("USER", "nobody"))


def _point(kind: LinuxKind, kernel: Kernel) -> None:
    """Make the link KIND -> RELEASE, in one step."""
    link = _kernels() / f".{kind}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.release)
    link.rename(_kernels() / kind)
