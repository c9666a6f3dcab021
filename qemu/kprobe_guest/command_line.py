"""QEMU's command line for a :class:`~kprobe_guest.spec.GuestSpec`; pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.spec import GuestSpec

QEMU = "qemu-system-x86_64"

ROOT_TAG = "host"
"""The name of the host's root file system, in the guest."""


@dataclass(frozen=True, slots=True)
class GuestPaths:
    """Everything of one running guest that has a name in the file system."""

    directory: Path
    ram: Path
    region: Path

    @property
    def gdb(self) -> Path:
        return self.directory / "gdb"

    @property
    def qmp(self) -> Path:
        """The monitor left free for users of the guest: a monitor has one client at a time."""
        return self.directory / "qmp"

    @property
    def harness_qmp(self) -> Path:
        return self.directory / "harness-qmp"

    @property
    def console(self) -> Path:
        return self.directory / "console"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def channel(self) -> Path:
        return self.directory / "channel"

    @property
    def stderr(self) -> Path:
        return self.directory / "qemu.stderr"

    @property
    def command(self) -> Path:
        return self.directory / "qemu.command"


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """A machine that was stopped and saved: *ram* is a file that is its memory, *devices* one with all else."""

    ram: Path
    devices: Path


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What ``-kernel`` and ``-initrd`` get; a bare-metal guest has no initramfs."""

    kernel: Path
    initramfs: Path | None = None


_WORDS_ON_A_SLOW_MACHINE = (
    "rcupdate.rcu_cpu_stall_suppress=1",  # a vCPU that gets no time for so long has not stalled
    "nosoftlockup",
    "mitigations=off",  # they write MSRs: that leaves a guest of KVM, which costs much where KVM is emulated
)
"""For a kernel that is slow because of what executes it: nothing is wrong with it then."""


def kernel_command_line(spec: GuestSpec, *, slow: bool = False) -> str:
    """The Linux guest's ``-append``; *slow*: this machine is a slow one."""
    words = [
        "console=ttyS0",
        # Warnings and worse are printed, the rest is in the guest's log; printing all of it takes a second.
        "loglevel=5",
        "panic=-1",  # together with -no-reboot: a panic ends QEMU
        # Linux panics ("IO-APIC + timer doesn't work") when few ticks come while it waits for some: so it is on a busy
        # host, where QEMU gets no time to make them (timer_irq_works in arch/x86/kernel/apic/io_apic.c).
        "no_timer_check",
    ]
    if not spec.kaslr:
        words.append("nokaslr")
    if spec.reserved_base is not None:
        words.append(f"memmap={spec.region_mb}M${spec.reserved_base:#x}")
    if spec.root == "host":
        words.append(f"guest.root={ROOT_TAG}")  # for /init; a word with a dot is none of the kernel's concern
    if slow:
        words += _WORDS_ON_A_SLOW_MACHINE
    return " ".join([*words, *spec.extra_cmdline])


def qemu_command(
    spec: GuestSpec,
    boot: BootFiles,
    paths: GuestPaths,
    gdb_port: int | None = None,
    saved: SavedMachine | None = None,
    *,
    slow: bool = False,
) -> list[str]:
    """The argument vector, QEMU's name first. The machine is created stopped (``-S``). *slow*: this machine is slow.

    With *saved* it waits for the devices of that machine, and has its memory: a copy in the file of *paths*, or, where
    memory is private, that file itself, of which QEMU copies what is written to.
    """
    accelerator = f"tcg,thread={spec.tcg_thread}" if spec.accelerator == "tcg" else spec.accelerator
    command = [QEMU, "-S", "-accel", accelerator, "-nodefaults", "-display", "none", "-no-reboot"]
    machine = spec.machine
    if spec.shared_ram:
        backend = f"memory-backend-file,id=ram,size={spec.memory_mb}M,mem-path={paths.ram},share=on"
        if spec.accelerator == "kvm":
            backend += ",align=2M"  # else KVM maps each page by itself, also where the file has large ones
        command += ["-object", backend]
        machine_option = f"{machine},memory-backend=ram"
    elif saved is not None:
        backend = f"memory-backend-file,id=ram,size={spec.memory_mb}M,mem-path={saved.ram},share=off"
        command += ["-object", backend]
        machine_option = f"{machine},memory-backend=ram"
    else:
        machine_option = machine
    command += ["-machine", machine_option, "-m", f"{spec.memory_mb}M", "-smp", str(spec.vcpus)]
    if spec.cpu != "default":
        # Without cmpxchg16b: QEMU before 8.0 computes its flags from a stale kind of operation, and where that was "the
        # flags themselves" (after an iret or a stop) the low bits of an operand become RFLAGS, TF among them. A vCPU
        # that is stopped or interrupted right behind it keeps them. Linux 6.12 has it in kmem_cache_alloc().
        command += ["-cpu", spec.cpu if spec.kernel == "bare" else f"{spec.cpu},-cx16"]
    if spec.region == "ivshmem":
        command += [
            "-object", f"memory-backend-file,id=region,size={spec.region_mb}M,mem-path={paths.region},share=on",
            "-device", "ivshmem-plain,memdev=region",
        ]  # fmt: skip
    if spec.root == "host":
        # Files of several file systems may have one number: the guest is given others.
        share = f"local,path=/,mount_tag={ROOT_TAG},security_model=none,readonly=on,multidevs=remap"
        command += ["-virtfs", share]
    command += ["-kernel", str(boot.kernel)]
    if boot.initramfs is not None:
        command += ["-initrd", str(boot.initramfs), "-append", kernel_command_line(spec, slow=slow)]
    command += [
        *_serial("console", paths.console, f",logfile={paths.console_log}"),
        *_serial("channel", paths.channel),
        "-qmp", f"unix:{paths.harness_qmp},server=on,wait=off",
        "-qmp", f"unix:{paths.qmp},server=on,wait=off",
        "-gdb", f"unix:{paths.gdb},server=on,wait=off" if gdb_port is None else f"tcp:localhost:{gdb_port}",
    ]  # fmt: skip
    if saved is not None:
        command += ["-incoming", "defer"]
    return [*command, *spec.extra_args]


def _serial(name: str, path: Path, options: str = "") -> list[str]:
    return ["-chardev", f"socket,id={name},path={path},server=on,wait=off{options}", "-serial", f"chardev:{name}"]
