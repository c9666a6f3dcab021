"""Probes on a live guest, against workloads of a known number of calls."""

from __future__ import annotations

import pytest

from gdb_kprobe.testing import GdbCommandError
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

IOCTL = 16
NO_SUCH_COMMAND = 0x1234


@pytest.mark.parametrize("vcpus", [1, 2])
def test_every_call_is_one_hit_on_both_rungs(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        guest.add(gdb, "p:boosted __x64_sys_getpriority", "boosted")
        guest.add(gdb, "p:stepped __x64_sys_getpriority+behind", "single-step")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} 50") for _ in range(vcpus)]
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"boosted": 50 * vcpus, "stepped": 50 * vcpus}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_module_function(probed: Boot, kernel: str) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:ctl loop:loop_control_ioctl cmd=%si:u32 if si == {NO_SUCH_COMMAND}")
        assert probe["place"] == "loop_control_ioctl+0x0 [loop]"
        guest.add(gdb, "p:other loop:loop_control_ioctl+behind")
        with pytest.raises(GdbCommandError, match="loop has no vfs_read; it is in the core kernel"):
            gdb.console("kprobe p:wrong loop:vfs_read")
        gdb.cont()
        guest.guest.run(f"workload syscall {IOCTL} 23 3 {NO_SUCH_COMMAND} 0 3</dev/loop-control")
        guest.guest.run(f"workload syscall {IOCTL} 7 3 {NO_SUCH_COMMAND + 1} 0 3</dev/loop-control")
        gdb.interrupt()
        assert guest.hits(gdb) == {"ctl": 23, "other": 30}
        gdb.console("kprobe detach")


@pytest.mark.parametrize(("strategy", "least"), [("boosted", 1), ("auto", 5)])
def test_disabled_probe_leaves_the_original_text(probed: Boot, strategy: str, least: int) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        probe = guest.add(gdb, "p:one __x64_sys_getpriority", strategy)
        addr, size = int(probe["addr"], 16), int(probe["bytes"])
        assert size >= least
        guest.add(gdb, "p:two __x64_sys_getpriority", strategy)
        assert guest.snapshot.differences() == (), "a guest that is stopped for the user shows its own text"
        gdb.cont()
        guest.guest.run("true")  # it runs now: the probe is there
        assert guest.probed_bytes() == guest.patched(gdb) == set(range(addr, addr + size))
        gdb.interrupt()
        gdb.console("kprobe disable one")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        gdb.interrupt()
        assert guest.hits(gdb) == {"one": 0, "two": 23}
        gdb.console("kprobe disable two")
        assert guest.snapshot.differences() == ()
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        gdb.interrupt()
        assert guest.hits(gdb) == {"one": 0, "two": 23}
        gdb.console("kprobe enable all")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        gdb.interrupt()
        assert guest.hits(gdb) == {"one": 23, "two": 46}
        gdb.console("kprobe delete all")
        assert guest.snapshot.differences() == ()
        gdb.console("kprobe detach")
