"""What a guest is to be: one value, usable as a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KernelKind = Literal["debian", "newest", "bare"]
CpuModel = Literal["max", "default"]
RegionSource = Literal["reserved", "ivshmem", "none"]
Machine = Literal["q35", "pc"]
GdbTransport = Literal["unix", "tcp"]

MIB = 1 << 20

LOWEST_BASE = 64 * MIB
"""Below, the firmware, the boot loader and an unrandomized kernel have their things."""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """A guest machine.

    *kernel*: ``debian`` is Debian's current cloud kernel, ``newest`` the newest cloud kernel its package lists serve,
    ``bare`` our own bare-metal image. *cpu*: ``max`` or QEMU's default model. *region*: where the physical memory for
    a debugger comes from: ``reserved`` (a ``memmap=`` range that the guest leaves alone), ``ivshmem`` (BAR 2 of an
    ivshmem-plain device) or ``none``. *shared_ram*: guest RAM is a file that the host can map.
    """

    kernel: KernelKind = "debian"
    vcpus: int = 1
    memory_mb: int = 512
    cpu: CpuModel = "max"
    kaslr: bool = True
    extra_cmdline: tuple[str, ...] = ()
    region: RegionSource = "reserved"
    region_mb: int = 16
    shared_ram: bool = True
    machine: Machine = "q35"
    gdb: GdbTransport = "unix"
    extra_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vcpus < 1:
            raise ValueError(f"vcpus must be at least 1, not {self.vcpus}")
        if self.region_mb < 1 or self.region_mb & (self.region_mb - 1):
            raise ValueError(f"region_mb must be a power of two (a PCI BAR is), not {self.region_mb}")
        base = self.reserved_base
        if base is not None and (base < LOWEST_BASE or base + self.region_mb * MIB > self.memory_mb * MIB):
            raise ValueError(f"a region of {self.region_mb} MiB does not fit into {self.memory_mb} MiB of memory")

    @property
    def reserved_base(self) -> int | None:
        """Guest physical address of the reserved range, or ``None`` when there is none.

        In the middle of RAM: the kernel and what the firmware uses are below, the initramfs is at the end; never
        above 1 GiB, where the hole below 4 GiB would have to be minded.
        """
        if self.region != "reserved" or self.kernel == "bare":
            return None
        half = min(self.memory_mb * MIB // 2, 1 << 30)
        return half - half % (self.region_mb * MIB)

    def label(self) -> str:
        """Short name for test ids and directories, e.g. ``debian-2cpu``."""
        return f"{self.kernel}-{self.vcpus}cpu"
