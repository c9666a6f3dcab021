"""Linux kernels for guests, by name or by path."""

from __future__ import annotations

from pathlib import Path

from kprobe_guest.build import debian, given
from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.errors import BuildError


def find_kernel(name: str, modules: Path | None = None) -> Kernel:
    """The kernel that the last set-up resolved *name* to; set up now if there was none.

    *modules* is for a kernel given by its path.

    :raises BuildError: there is none and it cannot be fetched or built.
    """
    if "/" in name:
        return given.given_kernel(Path(name), modules)
    return debian.cached_kernel(name) or debian.fetch_kernel(name)


def fetch_kernel(name: str) -> Kernel:
    """The kernel that *name* means today.

    Falls back to the one that is cached, and says so.

    :raises BuildError: there is none and it cannot be fetched or built.
    """
    if "/" in name:
        raise BuildError(f"{name} is a path: there is nothing to fetch")
    return debian.fetch_kernel(name)
