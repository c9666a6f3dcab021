"""A vCPU stands at the gate for a handler while gdb is killed, or the probe disabled: no hit is lost or counted twice.

Beside the probe with the handler one counts, at the same instruction: of that not one hit more, nor less, than the
calls that the workload says it has made.
"""

from __future__ import annotations

import time

import pytest

from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import BODY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live


FUNCTION = BODY
CALLS = 3000
LOAD = f"workload syscall 140 {CALLS} 0 0"
LAST = 7
"""The hit whose handler does it."""


def counted(gdb: GdbMi) -> dict[str, tuple[int, int]]:
    probes = gdb.command("-kprobe-list")["probes"]
    return {probe["name"]: (int(probe["hits"]), int(probe["missed"])) for probe in probes}


def arm(guest: Probed, gdb: GdbMi, strategy: str, act: str, *, beside: bool) -> None:
    gdb.console(f"set kprobe strategy {strategy}")
    gdb.console("python import os, signal; from gdb_kprobe.gdbext import api")
    gdb.console(f"python api.add('p:handled {FUNCTION}', lambda hit: {act} if hit.hit == {LAST} else None)")
    if beside:
        gdb.console(f"kprobe p:all {FUNCTION}")
    probes = gdb.command("-kprobe-list")["probes"]
    assert {probe["rung"] for probe in probes} == {strategy}
    guest.touched |= guest.patched(gdb)


@pytest.mark.parametrize("strategy", ["optimized", "boosted"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "alone"])
@pytest.mark.parametrize("watchdog", [True, False], ids=["watchdog", "nobody"])
def test_gdb_is_killed_by_the_handler(probed: Boot, strategy: str, beside: bool, watchdog: bool) -> None:
    vcpus = 2
    guest = probed(GuestSpec(vcpus=vcpus))
    vm = guest.guest
    with guest.gdb(watchdog=watchdog) as gdb:
        arm(guest, gdb, strategy, "os.kill(os.getpid(), signal.SIGKILL)", beside=beside)
        gdb.cont()
        jobs = [vm.spawn(LOAD, wait=False) for _ in range(vcpus)]
        gdb.wait_exit()
    if watchdog:
        for job in jobs:
            assert vm.finish(job, timeout=60) == (0, f"workload: {CALLS} calls done, last result 20\n")
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe adopt {guest.profile}")
        gdb.cont()
        if not watchdog:
            for job in jobs:
                assert vm.finish(job, timeout=60) == (0, f"workload: {CALLS} calls done, last result 20\n")
        vm.check_output(LOAD)
        gdb.interrupt()
        calls = CALLS * (vcpus + 1)
        found = counted(gdb)
        if beside:
            assert found["all"] == (calls, 0)
        # The one that gdb was about, counted by it before, may be taken again.
        assert calls <= sum(found["handled"]) <= calls + 1
        gdb.console("kprobe detach")


@pytest.mark.parametrize("strategy", ["optimized", "boosted"])
@pytest.mark.parametrize("act", ["raise", "disable"])
def test_a_probe_is_disabled_while_another_vcpu_asks_for_it(probed: Boot, strategy: str, act: str) -> None:
    vcpus = 2
    guest = probed(GuestSpec(vcpus=vcpus))
    vm = guest.guest
    what = "1 / 0" if act == "raise" else "api.set_enabled(api.get('handled'), False)"
    with guest.gdb() as gdb:
        arm(guest, gdb, strategy, f"(seen.append(hit.hit), {what})", beside=True)
        gdb.console("python seen = []")
        gdb.cont()
        jobs = [vm.spawn(LOAD) for _ in range(vcpus)]
        for job in jobs:
            assert vm.finish(job, timeout=60) == (0, f"workload: {CALLS} calls done, last result 20\n")
        found = counted(gdb)
        assert found["all"] == (CALLS * vcpus, 0)
        assert found["handled"] == (LAST, int(act == "raise"))
        assert gdb.console("python print(seen)").strip() == f"[{LAST}]"
        gdb.interrupt()
        gdb.console("kprobe detach")


@pytest.mark.parametrize("strategy", ["optimized", "boosted"])
def test_ctrl_c_and_detach_while_both_vcpus_ask(probed: Boot, strategy: str) -> None:
    vcpus = 2
    guest = probed(GuestSpec(vcpus=vcpus))
    vm = guest.guest
    with guest.gdb() as gdb:
        arm(guest, gdb, strategy, "None", beside=True)
        gdb.cont()
        jobs = [vm.spawn(f"workload syscall 140 {CALLS} 0 0", timeout=120) for _ in range(vcpus)]
        for _ in range(5):
            deadline = time.monotonic() + 30
            before = counted(gdb)["all"][0]
            while counted(gdb)["all"][0] <= before + 2:
                assert time.monotonic() < deadline
            gdb.interrupt()
            found = counted(gdb)
            # A hit is half done at a stop only where an interrupt has come in the middle of our code.
            is_quiet = gdb.console("python print(api.is_quiet())").strip()
            assert found["all"] == found["handled"] or is_quiet == "False", "no hit is half done at a stop"
            assert guest.probed_bytes() == set()
            gdb.cont()
        gdb.interrupt()
        gdb.console("kprobe detach")
        for job in jobs:
            assert vm.finish(job, timeout=120) == (0, f"workload: {CALLS} calls done, last result 20\n")
