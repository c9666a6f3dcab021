"""What a profile says about a guest: where it listens, what kernel it runs, and where our region is.

A profile is read from YAML by :func:`gdb_kprobe.config.load.load_profile`; code that builds one by hand gets no
checks. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gdb_kprobe.model import Boost, Entry, PhysAddr, Rung, VirtAddr

DEFAULT_REGION_SIZE = 16 << 20
"""Room for probes on 44,000 functions needs 4-7 MB; the rest is rings and tables."""

ALL_RUNGS = (Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP)
"""The rungs of a profile that names none, best first."""


class KernelKind(StrEnum):
    """Whose promises hold in the guest: those of Linux, or none."""

    LINUX = "linux"
    BARE = "bare"


class RegionSource(StrEnum):
    """Where the region's physical memory comes from."""

    RESERVED = "reserved"
    """RAM that the guest was told to leave alone (``memmap=SIZE$ADDRESS``)."""
    IVSHMEM = "ivshmem"
    """BAR 2 of an ``ivshmem-plain`` device."""
    BORROWED = "borrowed"
    """Pages asked from the guest's own allocator: for a guest that is not prepared."""
    PREMAPPED = "premapped"
    """Memory that the guest has mapped itself, and does not use."""


class SharedMemory(StrEnum):
    """How the host sees guest memory while the guest runs, when no file is named."""

    AUTO = "auto"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The guest's kernel.

    *symbols* is a file of ``NAME: ADDRESS`` lines (only for a bare-metal guest: Linux's symbols are read from the
    guest); *vmlinux* is an ELF file with debug info that may be loaded at the right slide.
    """

    kind: KernelKind = KernelKind.LINUX
    symbols: Path | None = None
    vmlinux: Path | None = None


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """The one piece of guest memory that holds everything we add.

    *physical* is set exactly for ``reserved``. *virtual* is always set for ``premapped``; elsewhere ``None`` means that
    the place is chosen at attach.
    """

    source: RegionSource
    physical: PhysAddr | None = None
    virtual: VirtAddr | None = None
    size: int = DEFAULT_REGION_SIZE


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What a probe may be; *rungs* are the allowed ones, best first, without repeats. *boost*: what may be boosted.

    *entry*: where a probe on a function goes.
    """

    rungs: tuple[Rung, ...] = ALL_RUNGS
    boost: Boost = Boost.RELOCATE
    entry: Entry = Entry.BEHIND


@dataclass(frozen=True, slots=True)
class Profile:
    """One guest.

    *gdbstub* is ``/path/to/socket`` or ``host:port``; *qmp* is the path of QEMU's QMP socket; *shared_memory* is the
    file that backs the guest's RAM on the host, or how to find it.
    """

    name: str
    path: Path
    gdbstub: str
    region: RegionConfig
    kernel: KernelConfig = field(default_factory=KernelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    shared_memory: SharedMemory | Path = SharedMemory.AUTO
    qmp: Path | None = None
