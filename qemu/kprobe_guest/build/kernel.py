"""Linux kernels for guests, by name or by path."""

from __future__ import annotations

from pathlib import Path

from kprobe_guest.build import debian, given, source
from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.build.names import SourceSeries, parse_name
from kprobe_guest.errors import BuildError


def find_kernel(name: str, modules: Path | None = None) -> Kernel:
    """The kernel that the last set-up resolved *name* to; set up now if there was none.

    *modules* is for a kernel given by its path.

    :raises BuildError: there is none and it cannot be fetched or built.
    """
    if "/" in name:
        return given.given_kernel(Path(name), modules)
    return debian.cached_kernel(name) or fetch_kernel(name)


def fetch_kernel(name: str) -> Kernel:
    """The kernel that *name* means today.

    Falls back to the one that is cached, and says so.

    :raises BuildError: there is none and it cannot be fetched or built.
    """
    if "/" in name:
        raise BuildError(f"{name} is a path: there is nothing to fetch")
    if name not in debian.NAMES and isinstance(series := parse_name(name), SourceSeries):
        return source.build_kernel(name, series)
    return debian.fetch_kernel(name)
