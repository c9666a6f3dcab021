"""Modules that come, go, and fail to come, with probes in them and for them; gdb is not asked to stop in between."""

from __future__ import annotations

import signal

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec
from tests.support.probed import Boot, Booted, MakeProbed

pytestmark = pytest.mark.live

IOCTL, CALLS = 16, 50
LOAD, UNLOAD = "insmod /modules/loop.ko", "rmmod loop"
CALL = f"workload syscall {IOCTL} {CALLS} 3 0x1234 0 3</dev/loop-control || true"
DEVICES = "ls -d /sys/block/loop* | wc -l"
"""As many as the module's init has called ``loop_add``."""


def states(gdb: GdbMi) -> dict[str, str]:
    return {probe["name"]: probe["state"] for probe in gdb.command("-kprobe-list")["probes"]}


@pytest.mark.parametrize(
    ("kernel", "vcpus"),
    [("debian", 2), *(pytest.param(*guest, marks=pytest.mark.full) for guest in (("debian", 1), ("newest", 1)))],
)
def test_probes_follow_their_module(booted_guest: Booted, make_probed: MakeProbed, kernel: str, vcpus: int) -> None:
    vm = booted_guest(GuestSpec(kernel=kernel, vcpus=vcpus))
    vm.check_output(UNLOAD)
    guest = make_probed(vm)
    with guest.gdb() as gdb:
        told = gdb.console("kprobe p:ctl loop:loop_control_ioctl")
        assert "no module loop is loaded; it is armed when one of that name comes" in told
        gdb.console("kprobe p:init loop:loop_add")
        gdb.console("kprobe add --disabled p:off loop:loop_add")
        assert states(gdb) == {"ctl": "pending", "init": "pending", "off": "pending"}
        expected = {"ctl": 0, "init": 0, "off": 0}
        gdb.cont()
        for _ in range(3):
            vm.check_output(LOAD)
            assert f"workload: {CALLS} calls done" in vm.check_output(CALL)
            expected["ctl"] += CALLS
            expected["init"] += int(vm.check_output(DEVICES))
            assert states(gdb) == {"ctl": "armed", "init": "armed", "off": "disabled"}
            assert guest.hits(gdb) == expected
            vm.check_output(UNLOAD)
            assert states(gdb) == {"ctl": "gone", "init": "gone", "off": "gone"}
            assert vm.run(f"{LOAD} max_part=300")[0] != 0
            assert states(gdb) == {"ctl": "gone", "init": "gone", "off": "gone"}
        assert expected["init"] >= 3
        vm.check_output(LOAD)
        gdb.interrupt()
        gdb.cont()
        gdb.interrupt()
        assert {probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]} == {"optimized"}
        gdb.console("kprobe delete init")
        gdb.console("kprobe delete off")
        gdb.cont()
        vm.check_output(UNLOAD)
        gdb.interrupt()
        gdb.console("kprobe delete all")
        assert states(gdb) == {}
        gdb.cont()
        vm.check_output(LOAD)
        vm.check_output(UNLOAD)
        gdb.interrupt()
        gdb.console("kprobe detach")
    vm.check_output(LOAD)
    guest.check_untouched()


def test_what_cannot_come_is_refused(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        with pytest.raises(GdbCommandError, match="loop_add_two is not in kallsyms"):
            gdb.console("kprobe p:wrong loop:loop_add_two")
        with pytest.raises(GdbCommandError, match="nosuch_function is not in kallsyms"):
            gdb.console("kprobe p:wrong nosuch_function")
        gdb.console("kprobe p:later nosuch:nosuch_function")
        gdb.console("kprobe disable later")
        gdb.console("kprobe delete later")
        gdb.console("kprobe detach")


def test_another_load_at_the_same_address_is_noticed(booted_guest: Booted, make_probed: MakeProbed) -> None:
    """While gdb does not look: no probe is in the module, so nothing stops for it, and all it knew of it is old."""
    guest = make_probed(booted_guest(GuestSpec()))
    vm = guest.guest
    records = []
    with guest.gdb() as gdb:
        for _ in range(4):
            gdb.console("kprobe p:ctl loop:loop_control_ioctl")
            records.append(gdb.console(RECORD).split())
            gdb.cont()
            vm.check_output(CALL)
            gdb.interrupt()
            assert guest.hits(gdb) == {"ctl": CALLS}
            gdb.console("kprobe delete ctl")
            gdb.cont()
            vm.check_output(f"{UNLOAD} && {LOAD}")
            gdb.interrupt()
        gdb.console("kprobe detach")
    for load, ip, found in records:
        assert int(found, 16) - int(ip, 16) == guest.pad(int(ip, 16)), "the ftrace record of another load"
        assert load
    assert len({load for load, _, _ in records}) == len(records)
    assert vm.dmesg_problems() == []


RECORD = (
    "python from gdb_kprobe.gdbext import api; p = api.get('ctl'); "
    "print(api.site(p).owner, hex(p.place.addr), *map(hex, api.function(p.place.addr).ftrace))"
)


def test_a_trace_does_not_tell_of_the_watches(booted_guest: Booted, make_probed: MakeProbed) -> None:
    guest = make_probed(booted_guest(GuestSpec()))
    with guest.gdb() as gdb:
        gdb.console("kprobe p:later nosuch:nosuch_function")
        gdb.console("python from gdb_kprobe.gdbext import api; told = []; end = api.on_hit(told.append)")
        gdb.cont()
        guest.guest.check_output(f"{UNLOAD} && {LOAD}")
        gdb.interrupt()
        assert gdb.console("python print(len(told))").strip() == "0"
        gdb.console("python end()")
        gdb.console("kprobe detach")
    assert guest.guest.dmesg_problems() == []


def test_probes_that_wait_are_adopted_with_their_counts(booted_guest: Booted, make_probed: MakeProbed) -> None:
    vm = booted_guest(GuestSpec())
    guest = make_probed(vm)
    with guest.gdb() as gdb:
        gdb.console("kprobe p:ctl loop:loop_control_ioctl")
        gdb.console("kprobe p:never nosuch:nosuch_function")
        gdb.cont()
        vm.check_output(CALL)
        vm.check_output(UNLOAD)
        assert states(gdb) == {"ctl": "gone", "never": "pending"}
        gdb.interrupt()
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    with guest.gdb(attach=False) as gdb:
        gdb.console("kprobe adopt debian")
        assert states(gdb) == {"ctl": "pending", "never": "pending"}
        assert guest.hits(gdb) == {"ctl": CALLS, "never": 0}
        gdb.cont()
        vm.check_output(LOAD)
        vm.check_output(CALL)
        assert guest.hits(gdb) == {"ctl": 2 * CALLS, "never": 0}
        gdb.interrupt()
        gdb.console("kprobe detach")
    assert vm.dmesg_problems() == []
