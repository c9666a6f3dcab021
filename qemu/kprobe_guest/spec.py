"""What a guest is to be: one value, usable as a key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CpuModel = Literal["max", "default"]
RegionSource = Literal["reserved", "ivshmem", "none"]
Machine = Literal["q35", "pc"]
GdbTransport = Literal["unix", "tcp"]
TcgThread = Literal["multi", "single"]
Accelerator = Literal["tcg", "kvm"]
Root = Literal["own", "host"]

PROFILES: dict[RegionSource, str] = {"reserved": "debian", "ivshmem": "ivshmem", "none": "plain"}
"""The plugin's profile, in configs/, for each kind of region."""

MIB = 1 << 20

LOWEST_BASE = 64 * MIB
"""Below, the firmware, the boot loader and an unrandomized kernel have their things."""

KERNEL_NAMES = (
    "debian, newest, a series such as 6.12 or 6.12-rt, a flavour of any version such as rt or cloud@stable-backports,"
    " small or small-nobtf, which are built here from Debian's source (6.12-nomodules, 6.12-nobtf: of that version),"
    " or the path of a vmlinuz"
)
"""What names a Linux kernel, for messages; :mod:`kprobe_guest.build.names` says what they mean."""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """A guest machine.

    *kernel*: ``bare`` is our own bare-metal image, all else names a Linux kernel: ``debian`` is Debian's current cloud
    kernel, ``newest`` the newest cloud kernel that this machine's package lists serve, ``6.12`` or ``7.3-rt`` one of a
    series that some suite of Debian's serves, ``cloud@stable-backports`` the newest of a flavour, ``small`` one without
    modules that is built from Debian's source, ``small-nobtf`` the same without BTF, and a path any other, with its
    *modules* (``lib/modules/RELEASE``) if it has any. *cpu*: ``max`` or QEMU's default model. *region*: where the
    physical memory for a debugger comes from: ``reserved`` (a ``memmap=`` range that the guest leaves alone),
    ``ivshmem`` (BAR 2 of an ivshmem-plain device) or ``none``. *shared_ram*: guest RAM is a file that the host can map.
    *accelerator*: ``kvm`` needs /dev/kvm. *tcg_thread*: under TCG, a thread of QEMU for each vCPU, or one for all.
    *root*: the root file system of the guest's commands: the initramfs (``own``), or that of the machine that QEMU runs
    on (``host``), read-only, with what they write in the guest's memory; then KVM's module is loaded, too.
    """

    kernel: str = "debian"
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
    accelerator: Accelerator = "tcg"
    tcg_thread: TcgThread = "multi"
    extra_args: tuple[str, ...] = ()
    modules: Path | None = None
    root: Root = "own"

    def __post_init__(self) -> None:
        if self.modules is not None and "/" not in self.kernel:
            raise ValueError(
                f"kernel {self.kernel} has modules of its own; only one given by its path needs to be told"
            )
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

    @property
    def low_memory(self) -> int:
        """Bytes of RAM below 4 GiB; what is more lies above (``pc_init1`` and ``pc_q35_init`` in hw/i386)."""
        hole, large = (0x8000_0000, 0xB000_0000) if self.machine == "q35" else (0xC000_0000, 0xE000_0000)
        return hole if self.memory_mb * MIB >= large else self.memory_mb * MIB

    def label(self) -> str:
        """Short name for test ids and directories, e.g. ``debian-2cpu``."""
        return f"{self.kernel.strip('/').replace('/', '-')}-{self.vcpus}cpu"

    def describe(self) -> str:
        """All that is not as it is by default, for people: ``6.12-rt, 2 vCPUs, pti=on``."""
        default = GuestSpec()
        words = [self.kernel]
        if self.vcpus != default.vcpus:
            words.append(f"{self.vcpus} vCPUs")
        if self.memory_mb != default.memory_mb:
            words.append(f"{self.memory_mb} MiB")
        if self.cpu != default.cpu:
            words.append(f"{self.cpu} CPU")
        if self.machine != default.machine:
            words.append(f"-M {self.machine}")
        if self.region != default.region:
            words.append("unprepared" if self.region == "none" else self.region)
        if not self.shared_ram:
            words.append("private RAM")
        if self.gdb != default.gdb:
            words.append("gdbstub by TCP")
        if not self.kaslr:
            words.append("no KASLR")
        if self.accelerator != default.accelerator:
            words.append(self.accelerator.upper())
        if self.tcg_thread != default.tcg_thread:
            words.append("one thread for all vCPUs")
        if self.root != default.root:
            words.append("the host's root file system")
        return ", ".join([*words, *self.extra_cmdline, *self.extra_args])
