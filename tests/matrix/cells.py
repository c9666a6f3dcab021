"""The cells of the matrix: which userland runs which kernel, with which accelerator, in which kind of guest.

A name is ``USERLAND/KERNEL/ACCELERATOR/OPTIONS``. The kernels ``debian`` and ``newest`` are the userland's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.command import python_words

DEMO = "demo"
"""The kind of cell that is ``gdb-kprobe demo``."""
_DEMO_CALLS = "100"
"""Fewer than a person is shown: each of them stops the machine."""

_UNPREPARED = ("--region", "none", "--machine", "pc", "--cpu", "default", "--private-ram", "--tcp")
OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "2cpu": ("--vcpus", "2"),
    "4cpu": ("--vcpus", "4"),
    "default-cpu": ("--cpu", "default"),
    "4level": ("--qemu=-cpu max,-cx16,la57=off",),
    "pti": ("--append", "pti=on", "--vcpus", "2"),
    "no-mitigations": ("--append", "mitigations=off", "--vcpus", "2"),
    "preempt-full": ("--append", "preempt=full", "--vcpus", "2"),
    "preempt-none": ("--append", "preempt=none"),
    "no-kaslr": ("--no-kaslr",),
    "pc": ("--machine", "pc"),
    "one-thread": ("--tcg-thread", "single", "--vcpus", "2"),
    "5g": ("--memory", "5120"),
    "private-ram": ("--private-ram", "--vcpus", "2"),
    "ivshmem": ("--region", "ivshmem", "--vcpus", "2"),
    "tcp": ("--tcp",),
    "borrowed": _UNPREPARED,
    "borrowed-2cpu": (*_UNPREPARED, "--vcpus", "2"),
}
"""The kinds of guest, as arguments of ``./install.sh torture cell``."""

KVM = "kvm"
_KVM_ACTS = ("trace", "handler", "fault", "ctrl-c")
"""What a cell under KVM does beyond counting, also in short: KVM is different there. What needs another boot or attach
is left out: where KVM is emulated each of them takes a minute."""

_USERLANDS = ("debian12", "debian13", "debian13-backports", "sid")
_SERIES = ("6.1", "6.12", "6.16", "6.17", "6.18", "6.19", "7.0", "7.1", "7.2", "7.3")
_FLAVOURS = ("6.1-generic", "6.12-generic", "7.3-generic", "6.1-rt", "6.12-rt", "7.3-rt")
_BUILT = ("6.1-nomodules", "6.1-nobtf", "6.12-nomodules", "6.12-nobtf")
"""Kernels that are built here; the first cell of each version takes long."""
_NEWEST = "7.3-cloud"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell; ``str()`` is its name."""

    userland: str
    kernel: str
    accelerator: str
    options: str

    def __str__(self) -> str:
        return f"{self.userland}/{self.kernel}/{self.accelerator}/{self.options}"

    def words(self, *, full: bool = False) -> list[str]:
        """Return the command that runs this cell in its userland; *full*: all that a cell can do.

        Its first word is a program of the virtual environment there.
        """
        if self.options == DEMO:
            return ["gdb-kprobe", "demo", "--kernel", self.kernel, "--calls", _DEMO_CALLS]
        words = ["cell", "--kernel", self.kernel, *OPTIONS[self.options]]
        if self.accelerator == KVM:
            words += ["--accelerator", KVM, "--nested"]
        also = "all" if full else ",".join(_KVM_ACTS) if self.accelerator == KVM else ""
        words += ["--also", also] if also else []
        return ["python", *python_words("torture", *words)]


def all_cells() -> list[Cell]:
    """Return every cell once, those of one userland together."""
    return sorted(dict.fromkeys(_cells()), key=lambda cell: _USERLANDS.index(cell.userland))


def _cells() -> Iterator[Cell]:
    # Each userland with its own kernels.
    for userland in _USERLANDS:
        for kernel in ("debian", "newest"):
            for options in (DEMO, "default", "2cpu", "borrowed"):
                yield Cell(userland, kernel, "tcg", options)
    # KVM: the machine's own, or one that is emulated, which takes a QEMU that is newer than Debian 12's.
    for options in ("2cpu", "borrowed-2cpu"):
        yield Cell("debian13", "6.1-cloud", KVM, options)
    # Each kernel on one userland.
    for series in _SERIES:
        yield Cell("debian12", f"{series}-cloud", "tcg", "default")
    for kernel in _FLAVOURS:
        # The allocator of a PREEMPT_RT kernel may sleep: it cannot be called from outside, nothing is borrowed there.
        for options in ("default", "2cpu" if kernel.endswith("-rt") else "borrowed"):
            yield Cell("debian12", kernel, "tcg", options)
    for kernel in _BUILT:
        for options in ("default", "2cpu", "borrowed"):
            yield Cell("debian12", kernel, "tcg", options)
    # Each kind of guest with the oldest and the newest kernel.
    for kernel in ("6.1-cloud", _NEWEST):
        for options in OPTIONS:
            yield Cell("debian12", kernel, "tcg", options)
