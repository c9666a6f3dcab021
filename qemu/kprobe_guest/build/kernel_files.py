"""What a kernel consists of, as far as a guest needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.build.cache import cache_directory


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted.

    *release* is what ``uname -r`` says in the guest, *modules* is its ``/lib/modules/RELEASE`` with ``modules.dep``, or
    ``None``. *origin* says what it was made from: two kernels that differ have not the same.
    """

    release: str
    vmlinuz: Path
    modules: Path | None
    origin: bytes


def kernels_directory() -> Path:
    """Where the cache keeps kernels: each in a directory of its release's name."""
    return cache_directory() / "kernels"


def cached(directory: Path) -> Kernel | None:
    """The kernel in a directory of the cache; ``None`` if there is none, or not a whole one."""
    directory = directory.resolve()
    stamp = directory / "package.json"
    modules = directory / "lib" / "modules" / directory.name
    if not (directory / "vmlinuz").exists() or not stamp.exists():
        return None
    return Kernel(directory.name, directory / "vmlinuz", modules if modules.is_dir() else None, stamp.read_bytes())
