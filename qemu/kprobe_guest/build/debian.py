"""Debian's kernels, by package name, unpacked into the cache without installing anything.

Nothing is pinned: ``linux-image-cloud-amd64`` is whatever Debian's package lists say it is today, ``newest`` is the
highest version of the signed cloud images in these lists, ``6.12-rt`` the highest one of that series that some suite
serves.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kprobe_guest.build.apt import Apt, compare_versions
from kprobe_guest.build.cache import atomic_directory, build_lock, progress
from kprobe_guest.build.kernel_files import Kernel, cached, kernels_directory
from kprobe_guest.build.names import Series, parse_series
from kprobe_guest.build.suites import SUITES, suite_apt
from kprobe_guest.build.unpack import arrange, unpack
from kprobe_guest.errors import BuildError

META_PACKAGE = "linux-image-cloud-amd64"
NAMES: Final = ("debian", "newest")
"""Names that are no series."""
_PARTS: Final = ("base", "binary", "modules")
"""Since 6.19 ``linux-image-RELEASE`` is empty, and depends on ``linux-PART-RELEASE`` of these."""
_ANY: Final = Series()


@dataclass(frozen=True, slots=True)
class _Image:
    """A kernel that *apt* serves. *parts* are packages beside that of its name, *missing* those it does not serve."""

    apt: Apt
    package: str
    version: str
    release: str
    parts: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def stamp(self) -> dict[str, str]:
        return {"package": self.package, "version": self.version}


def cached_kernel(name: str) -> Kernel | None:
    """The kernel that *name* was resolved to last, without asking the network."""
    link = kernels_directory() / name
    return cached(link) if link.is_symlink() else None


def fetch_kernel(name: str) -> Kernel:
    """Resolve *name* by today's package lists and fetch the kernel unless it is in the cache.

    Falls back to the cached kernel, and says so, when apt cannot resolve or fetch, or a package cannot be unpacked.

    :raises BuildError: nothing cached, nothing fetched; or *name* is none.
    """
    if name not in NAMES:
        parse_series(name)
    with build_lock():
        return newest_or_cached(name, lambda: _unpacked(_resolve(name)))


def newest_or_cached(name: str, find: Callable[[], Kernel]) -> Kernel:
    """Return what *find* finds for *name*, and remember it; where *find* fails, what was found last, and say so.

    :raises BuildError: *find* fails, and nothing was ever found.
    """
    try:
        kernel = find()
    except BuildError as error:
        found = cached_kernel(name)
        if found is None:
            raise
        progress(f"using the cached kernel {found.release}: {error}")
        return found
    point(name, kernel)
    return kernel


def _resolve(name: str) -> _Image:
    apt = Apt()
    if name in NAMES:
        names = apt.depends(META_PACKAGE) if name == "debian" else apt.names("linux-image-")
        image = _best(apt, _ANY, names)
        if image is None:
            raise BuildError(
                f"Debian's package lists name no {META_PACKAGE} image; run: sudo apt-get update"
                " (and see that /etc/apt/sources.list has Debian's main section)"
            )
        return image
    series = parse_series(name)
    failures = []
    for where, source in sources(series.suite):
        try:
            apt = source()
            image = _best(apt, series, apt.names("linux-image-"))
        except BuildError as error:
            failures.append(f"{where}: {error}")
            continue
        if image is not None:
            return image
        failures.append(f"{where}: serves none")
    raise BuildError(f"no kernel {series} was found:\n" + "\n".join(failures))


def sources(suite: str) -> Iterator[tuple[str, functools.partial[Apt]]]:
    """Where packages of *suite*, or of any if it is empty, are looked for, the best first: its name, how to ask it."""
    if suite:
        yield suite, functools.partial(suite_apt, suite)
        return
    yield "this machine's package lists", functools.partial(Apt)
    for other in SUITES:
        yield other, functools.partial(suite_apt, other)


def _best(apt: Apt, series: Series, names: list[str]) -> _Image | None:
    """The highest version of *series* among the packages *names*; one without modules only if there is no other.

    An archive keeps the signed packages of a kernel, the image, longer than those that hold its modules.
    """
    releases = {name: release for name in names if (release := series.release_of(name)) is not None}
    served = apt.candidates(releases)

    def order(left: str, right: str) -> int:
        return compare_versions(releases[left], releases[right])

    incomplete = None
    for package in sorted(served, key=functools.cmp_to_key(order), reverse=True):
        release = releases[package]
        wanted = {f"linux-{part}-{release}" for part in _PARTS}
        parts = sorted(wanted.intersection(apt.depends(package)))
        there = apt.candidates(parts)
        missing = tuple(part for part in parts if part not in there)
        image = _Image(apt, package, served[package], release, tuple(there), missing)
        if not missing:
            return image
        if incomplete is None and f"linux-binary-{release}" not in missing:
            incomplete = image
    return incomplete


def _unpacked(image: _Image) -> Kernel:
    """The kernel of *image*, from the cache or fetched.

    :raises BuildError: a package cannot be fetched, or holds something else than expected.
    """
    directory = kernels_directory() / image.release
    if _stamp(directory) == image.stamp and (found := cached(directory)) is not None:
        return found
    for package in image.missing:
        progress(f"{package} is not served any more: kernel {image.release} goes without")
    try:
        with (
            atomic_directory(directory) as building,
            tempfile.TemporaryDirectory(prefix=".unpacking-", dir=directory.parent) as temporary,
        ):
            files = Path(temporary) / "files"
            for package in (image.package, *image.parts):
                progress(f"fetching {package} {image.version}")
                archive = image.apt.download(package, Path(temporary))
                progress(f"unpacking {archive.name}")
                unpack(archive, files)
            arrange(files, image.release, building)
            (building / "package.json").write_text(json.dumps(image.stamp))
    except OSError as error:
        raise BuildError(f"the packages of kernel {image.release} could not be unpacked: {error}") from error
    kernel = cached(directory)
    assert kernel is not None, directory
    return kernel


def _stamp(directory: Path) -> object:
    """What the cached kernel was made from; ``None`` if there is none, or if it cannot be told."""
    try:
        stamp: object = json.loads((directory / "package.json").read_text())
    except (OSError, ValueError):
        return None
    return stamp


def point(name: str, kernel: Kernel) -> None:
    """Make the link NAME -> RELEASE, in one step."""
    link = kernels_directory() / f".{name}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.release)
    link.rename(kernels_directory() / name)
