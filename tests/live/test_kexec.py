"""The guest boots another kernel by itself (kexec): a new boot in old memory, without a reset of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdb_kprobe.testing import GdbMi, TextSnapshot
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.boot_files import boot_files
from kprobe_guest.command_line import kernel_command_line
from tests.support.calls import GETPRIORITY
from tests.support.wire import Wire

pytestmark = [pytest.mark.live, pytest.mark.full]

REBOOT, KEXEC_FILE_LOAD = 169, 320
REBOOT_KEXEC = "0xfee1dead 0x28121969 0x45584543 0"
CALLS = 23


def archived(name: str, data: bytes) -> bytes:
    """One file of a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    fields = (1, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def with_its_own_kernel(spec: GuestSpec, path: Path) -> GuestSpec:
    """*spec* with an initramfs that has what it boots, too; written to *path*."""
    boot = boot_files(spec)
    assert boot.initramfs is not None
    first = boot.initramfs.read_bytes()
    more = archived("vmlinuz", boot.kernel.read_bytes()) + archived("initramfs", first) + archived("TRAILER!!!", b"")
    path.write_bytes(first + b"\0" * (-len(first) % 512) + more)
    return GuestSpec(vcpus=spec.vcpus, kaslr=spec.kaslr, extra_args=("-initrd", str(path)))


@pytest.mark.parametrize("kaslr", [True, False], ids=["kaslr", "nokaslr"])
def test_a_kernel_booted_by_the_guest_is_noticed_and_probed_again(tmp_path: Path, kaslr: bool) -> None:
    spec = with_its_own_kernel(GuestSpec(kaslr=kaslr), tmp_path / "initramfs")
    words = kernel_command_line(spec)
    with GuestVm(spec) as guest, GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
        load = f"workload syscall {KEXEC_FILE_LOAD} 1 3 4 {len(words) + 1} 's:{words}' 0 3</vmlinuz 4</initramfs"
        guest.check_output(load)
        assert guest.check_output("cat /sys/kernel/kexec_loaded").strip() == "1"
        wire = Wire(gdb, tmp_path / "wire")
        gdb.console("kprobe attach debian")
        gdb.console("kprobe add p:mine __x64_sys_getpriority")
        gdb.cont()
        guest.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
        wire.mark()
        guest.expect_reset()
        guest.spawn(f"sleep 0.2; workload syscall {REBOOT} 1 {REBOOT_KEXEC}")
        guest.wait_ready()
        text = TextSnapshot(GuestMonitor(guest), GuestRam(guest))
        gdb.interrupt()
        assert "the guest was reset (or another one loaded)" in "\n".join(gdb.transcript)
        assert wire.writes() == []
        assert text.leftovers() == []
        assert "mine: __x64_sys_getpriority+0x0 armed" in gdb.console("kprobe attach debian")
        before = int(gdb.command("-kprobe-list")["probes"][0]["hits"])
        addr = int(gdb.command("-kprobe-list")["probes"][0]["addr"], 16)
        gdb.cont()
        guest.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
        gdb.interrupt()
        assert int(gdb.command("-kprobe-list")["probes"][0]["hits"]) == before + CALLS
        gdb.console("kprobe detach")
        assert text.leftovers(range(addr, addr + 5)) == []
        assert guest.dmesg_problems() == []
