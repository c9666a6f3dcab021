"""Small kernels, built from Debian's source: without MODULES, KPROBES, FTRACE and JUMP_LABEL, with and without BTF.

A build takes a quarter of an hour of a processor's time, so nothing is built that is in the cache, by the version of
the source and by the configuration (``data/small.config``). Both variants are built in one tree, one after the other:
only what the second has otherwise is compiled anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kprobe_guest.build.apt import Apt, compare_versions
from kprobe_guest.build.cache import atomic_directory, cache_directory, progress, run_tool
from kprobe_guest.build.debian import newest_or_cached, point, sources
from kprobe_guest.build.initramfs import DATA
from kprobe_guest.build.kernel_files import Kernel, cached, kernels_directory
from kprobe_guest.build.names import SourceSeries, names_of
from kprobe_guest.build.unpack import unpack
from kprobe_guest.errors import BuildError

_VARIANTS: Final = {"nobtf": "# CONFIG_DEBUG_INFO_BTF is not set\n", "nomodules": "CONFIG_DEBUG_INFO_BTF=y\n"}
"""What each is on top of the configuration that they share."""

_NOT_WANTED: Final = ("MODULES", "KPROBES", "FTRACE", "JUMP_LABEL")

_NEEDED: Final = {
    "gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "perl": "perl", "xz": "xz-utils",
    "pahole": "pahole",
}  # fmt: skip
_HEADER: Final = Path("/usr/include/gelf.h"), "libelf-dev"

_COMPILING: Final = ".compiling-"
"""How the name of a directory begins in which a build is at work: gigabytes."""

_UNUSED: Final = ("*.rst", *(f"*/{place}/*.[ch]" for place in ("drivers/gpu", "drivers/net", "drivers/media", "sound")))
"""Half of the source, which is not compiled."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A source package that *apt* serves: *number* is the kernel's (``6.12``)."""

    apt: Apt
    package: str
    version: str
    number: str

    def key(self) -> str:
        """Eight characters that tell what is built of it from all else."""
        words = [self.package, self.version, _config(), *_VARIANTS.values()]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def build_kernel(name: str, series: SourceSeries) -> Kernel:
    """Build the kernel *name*, which is *series*, of today's source, unless it is in the cache.

    Falls back to the one that was built last, and says so.

    :raises BuildError: there is none, and its source or a tool cannot be had, or it does not compile.
    """
    with _only_one():
        return newest_or_cached(name, lambda: _built(_find(series), series))


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Not the lock of all other builds: they need not wait for minutes."""
    with (cache_directory() / "source.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process, which builds a kernel from source")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _config() -> str:
    return (DATA / "small.config").read_text()


def _find(series: SourceSeries) -> _Source:
    """The newest source of *series* at the first place that serves one."""
    failures = []
    for where, connect in sources(series.suite):
        try:
            apt = connect()
            numbers = {name: found for name in apt.names("linux-source-") if (found := series.version_of(name))}
            served = apt.candidates(numbers)
        except BuildError as error:
            failures.append(f"{where}: {error}")
            continue
        if served:
            number = max((numbers[package] for package in served), key=functools.cmp_to_key(compare_versions))
            package = next(package for package in served if numbers[package] == number)
            return _Source(apt, package, served[package], number)
        failures.append(f"{where}: serves none")
    raise BuildError(f"no source of a kernel {series} was found:\n" + "\n".join(failures))


def _built(source: _Source, series: SourceSeries) -> Kernel:
    """The kernel from the cache, or built; all that were built with it can be had by their names, too."""
    if _cached(source, series.variant) is None:
        check_tools()
        try:
            kernels = _made(kernels_directory())
            for left in kernels.glob(f"{_COMPILING}*"):  # of a build that was killed: there is no other one now
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix=_COMPILING, dir=kernels) as temporary:
                _build(source, Path(temporary))
        except OSError as error:
            raise BuildError(f"{source.package} could not be built: {error}") from error
    for variant in _VARIANTS:
        if (made := _cached(source, variant)) is not None:
            for name in names_of(replace(series, variant=variant)):
                point(name, made)
    found = _cached(source, series.variant)
    assert found is not None, source
    return found


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _cached(source: _Source, variant: str) -> Kernel | None:
    """By its name: it ends in what it was made from."""
    made = sorted(kernels_directory().glob(f"{source.number}.*{_local_version(source, variant)}"))
    return next((found for path in made if (found := cached(path)) is not None), None)


def _local_version(source: _Source, variant: str) -> str:
    """What the kernel's release ends in, behind its version."""
    return f"-{variant}+{source.key()}"


def check_tools() -> None:
    """Say what is missing to build a kernel.

    :raises BuildError: something is; it says what to install.
    """
    missing = [package for program, package in _NEEDED.items() if shutil.which(program) is None]
    header, package = _HEADER
    if not header.exists():
        missing.append(package)
    if missing:
        raise BuildError(
            f"to build a kernel takes what is not installed; run: sudo apt-get install {' '.join(missing)}"
        )


def _build(source: _Source, temporary: Path) -> None:
    progress(f"fetching {source.package} {source.version}")
    archive = source.apt.download(source.package, temporary)
    unpack(archive, temporary / "files")
    archive.unlink()
    packed = _the_one(temporary / "files" / "usr" / "src", "linux-source-*.tar.xz", archive.name)
    progress(f"unpacking {packed.name}")
    run_tool(
        ["tar", "-xJf", str(packed), *(f"--exclude={name}" for name in _UNUSED)], package="tar", cwd=temporary,
    )  # fmt: skip
    packed.unlink()
    tree = _the_one(temporary, "linux-source-*", packed.name)
    for variant in _VARIANTS:
        progress(f"building {source.number}-{variant}: this takes minutes")
        _keep(source, variant, _compile(source, variant, tree, temporary / "out"))


def _the_one(directory: Path, pattern: str, packed: str) -> Path:
    """What was in *packed*.

    :raises BuildError: it is packed otherwise than is known here.
    """
    found = list(directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        raise BuildError(f"{packed} has {names} where one {pattern} is expected")
    return found[0]


def _compile(source: _Source, variant: str, tree: Path, out: Path) -> Path:
    """Compile *variant* in *out*, which may have another one's; returns *out*.

    :raises BuildError: make fails, or the configuration has not become what is wanted.
    """
    out.mkdir(exist_ok=True)
    fragment = out / "small.config"
    name = f'CONFIG_LOCALVERSION="{_local_version(source, variant)}"\n'
    fragment.write_text(_config() + _VARIANTS[variant] + name)
    make = ["make", "-s", "-C", str(tree), f"O={out}", "ARCH=x86_64", "KBUILD_BUILD_USER=gdb-kprobe",
            "KBUILD_BUILD_HOST=gdb-kprobe"]  # fmt: skip
    run_tool([*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"], package="make")
    lines = (out / ".config").read_text().splitlines()
    wrong = [f"{option} is on" for option in _NOT_WANTED if f"CONFIG_{option}=y" in lines]
    has_types = "CONFIG_DEBUG_INFO_BTF=y" in lines
    if has_types != (variant == "nomodules"):
        wrong.append(f"DEBUG_INFO_BTF is {'on' if has_types else 'off: is pahole too old for it?'}")
    if wrong:
        raise BuildError(f"the configuration of {source.package} is another one than asked for: {', '.join(wrong)}")
    run_tool([*make, f"-j{len(os.sched_getaffinity(0))}", "bzImage"], package="make")
    return out


def _keep(source: _Source, variant: str, out: Path) -> None:
    """Move what was compiled in *out* to the cache."""
    release = (out / "include" / "config" / "kernel.release").read_text().strip()
    assert release.endswith(_local_version(source, variant)), release
    with atomic_directory(kernels_directory() / release) as building:
        for name, made in (
            ("vmlinuz", "arch/x86/boot/bzImage"), ("config", ".config"), ("System.map", "System.map"),
            ("vmlinux", "vmlinux"),
        ):  # fmt: skip
            shutil.copyfile(out / made, building / name)
        stamp = {"package": source.package, "version": source.version, "key": source.key(), "variant": variant}
        (building / "package.json").write_text(json.dumps(stamp))
