"""Dispatch inside the guest: hits that cost no stop, exact counts, and the guest's own int3s as before."""

from __future__ import annotations

import time

import pytest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.kernel_events import Way, events, hits, missed
from tests.support.places import behind_jump
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

GETSID = 124
"""A system call that nothing else in the guest makes."""
GETEUID = 107
MILLION = 1_000_000


on_both_counts = pytest.mark.parametrize("vcpus", [1, 2])
on_each_guest = pytest.mark.parametrize(
    ("kernel", "vcpus"),
    [("debian", 1), ("debian", 2), ("newest", 2), pytest.param("newest", 1, marks=pytest.mark.full)],
)


def behind(guest: Probed, function: str) -> VirtAddr:
    """The first instruction behind the jump of a probe on *function*: the guest may have kprobes of its own there."""
    linux: LinuxGuest = guest.snapshot.guest
    return offset(linux.kallsyms.address(function), behind_jump(linux, function))


API = "python from gdb_kprobe.gdbext import api"


def stops(gdb: GdbMi) -> int:
    """How often the machine has stopped for a hit (tests/live/test_inspect.py compares it with QEMU's count)."""
    return int(gdb.console("python print(api.attachment().stops)").split()[-1])


@on_each_guest
def test_a_million_hits_are_counted_without_a_stop_and_read_while_the_guest_runs(
    probed: Boot, kernel: str, vcpus: int
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    with guest.gdb() as gdb:
        gdb.console(API)
        guest.add(gdb, "p:entry __x64_sys_getpriority")
        guest.add(gdb, f"p:inner {behind(guest, '__x64_sys_getpriority'):#x}")
        gdb.cont()
        calls = MILLION // 2 // vcpus
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} {calls}", timeout=60) for _ in range(vcpus)]
        seen = [0]
        deadline = time.monotonic() + 60
        while seen[-1] < MILLION // 2 and time.monotonic() < deadline:
            seen.append(guest.hits(gdb)["entry"])
            time.sleep(0.01)
        for job in jobs:
            assert guest.guest.finish(job, timeout=120)[0] == 0
        assert guest.hits(gdb) == {"entry": MILLION // 2, "inner": MILLION // 2}, "while it runs"
        assert seen == sorted(seen)
        assert len(set(seen)) > 3, "counters were read while they grew"
        assert stops(gdb) == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"entry": MILLION // 2, "inner": MILLION // 2}
        gdb.console("kprobe detach")


@on_both_counts
def test_only_hits_that_need_the_host_stop_the_machine(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        gdb.console(API)
        guest.add(gdb, "p:counted __x64_sys_getpriority")
        gdb.console("python seen = []")
        gdb.console("python api.add('p:handled __x64_sys_geteuid', lambda hit: seen.append(hit.hit))")
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} 20000") for _ in range(vcpus)]
        jobs += [guest.guest.spawn(f"workload syscall {GETEUID} 30") for _ in range(vcpus)]
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        counts = guest.hits(gdb)
        assert counts["counted"] == 20000 * vcpus
        # The shell of the guest asks for its identity too.
        assert counts["handled"] >= 30 * vcpus
        said = gdb.console("python print(seen == list(range(1, len(seen) + 1)), len(seen))")
        assert said.split() == ["True", str(counts["handled"])]
        assert stops(gdb) == counts["handled"]
        gdb.console("kprobe detach")


def test_a_trace_takes_the_hits_to_the_host_and_gives_them_back(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        gdb.console(API)
        guest.add(gdb, "p:a __x64_sys_getpriority which=%di")
        for round_ in range(1, 4):
            gdb.cont()
            guest.guest.run(f"workload syscall {GETPRIORITY} 1000")
            gdb.interrupt()
            assert stops(gdb) == 20 * (round_ - 1)
            gdb.console("kprobe trace -n 20")  # over MI it returns while the guest runs
            job = guest.guest.spawn(f"workload syscall {GETPRIORITY} 20", wait=False)
            gdb.wait_stop()
            assert guest.hits(gdb) == {"a": 1020 * round_}
            gdb.cont()
            assert guest.guest.finish(job)[0] == 0
            gdb.interrupt()
        assert "\n".join(gdb.transcript).count("a: (__x64_sys_getpriority+0x0/") == 60
        gdb.console("kprobe detach")


def test_a_trace_of_one_probe_concerns_no_other(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.console(API)
        guest.add(gdb, "p:told __x64_sys_getpriority which=%di")
        guest.add(gdb, "p:counted __x64_sys_getsid", "optimized")
        gdb.console("kprobe trace -n 5 told")
        job = vm.spawn(f"workload syscall {GETSID} 20000")
        assert vm.finish(job)[0] == 0
        job = vm.spawn(f"workload syscall {GETPRIORITY} 5", wait=False)
        gdb.wait_stop()
        assert stops(gdb) == 5
        assert {probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]} == {"optimized"}
        gdb.cont()
        assert vm.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"told": 5, "counted": 20000}
        assert stops(gdb) == 5
        gdb.console("kprobe detach")


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_filter_is_asked_in_the_guest_before_the_host_is(probed: Boot, vcpus: int) -> None:
    """Of a Python handler, and of a listener; a probe at the same place counts every hit, whoever handles it."""
    guest = probed(GuestSpec(vcpus=vcpus))
    vm = guest.guest
    rejected = [f"workload syscall {GETPRIORITY} 10000 0 0x40"] * vcpus
    wanted = f"workload syscall {GETPRIORITY} 10 1 0x41"
    with guest.gdb() as gdb:
        gdb.console(API)
        gdb.console("python seen = []")
        gdb.console(
            "python api.add('p:handled __do_sys_getpriority if si == 0x41 && di == 1', lambda hit: seen.append(0))"
        )
        guest.add(gdb, "p:all __do_sys_getpriority")
        gdb.console("kprobe p:told __do_sys_getpriority if si == 0x42")
        gdb.console("python told = []")
        guest.touched |= guest.patched(gdb)
        for rounds in (1, 2):
            if rounds == 2:
                gdb.console("python api.on_hit(lambda hit: told.append(hit.probe.name), [api.get('told')])")
            gdb.cont()
            before = stops(gdb)
            for job in [vm.spawn(command) for command in (*rejected, wanted)]:
                assert vm.finish(job)[0] == 0
            assert stops(gdb) - before == 10
            told = 0 if rounds == 1 else 3
            vm.check_output(f"workload syscall {GETPRIORITY} 3 0 0x42")
            assert stops(gdb) - before == 10 + told
            gdb.interrupt()
            calls = rounds * (10000 * vcpus + 10 + 3)
            assert guest.hits(gdb) == {"handled": 10 * rounds, "all": calls, "told": 3 * rounds}
        assert gdb.console("python print(len(seen), told)").strip() == "20 ['told', 'told', 'told']"
        gdb.console("kprobe detach")


@pytest.mark.parametrize(("strategy", "again"), [("optimized", 0), ("boosted", 0), ("single-step", 1)])
def test_a_hit_that_has_stopped_is_not_filtered_again(probed: Boot, strategy: str, again: int) -> None:
    """The handler makes its filter false, and stops: the hit is gone on with; the hits after it are filtered.

    On the single-step rung it comes to the host once more, to be stepped.
    """
    guest = probed(GuestSpec(vcpus=2))
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.console(API)
        handler = "lambda hit: (setattr(hit.regs, 'si', 0x40), hit.stop())"
        gdb.console(f"set kprobe strategy {strategy}")
        gdb.console(f"python api.add('p:here __do_sys_getpriority if si == 0x41', {handler})")
        gdb.console("set kprobe strategy auto")
        if strategy != "single-step":  # there each hit of another probe is the host's
            guest.add(gdb, "p:all __do_sys_getpriority")
        assert {probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]} == {strategy}
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        for round_ in range(1, 4):
            job = vm.spawn(f"workload syscall {GETPRIORITY} 1 0 0x41", wait=False)
            gdb.wait_stop()
            before = stops(gdb)
            gdb.cont()
            assert vm.finish(job)[0] == 0
            vm.check_output(f"workload syscall {GETPRIORITY} 5000 0 0x40")
            assert stops(gdb) - before == again
            gdb.interrupt()
            expected = {"here": round_, "all": 5001 * round_}
            assert guest.hits(gdb) == {name: expected[name] for name in guest.hits(gdb)}
            gdb.cont()
        gdb.interrupt()
        gdb.console("kprobe detach")


@on_each_guest
def test_the_guests_own_int3s_work_as_before(probed: Boot, kernel: str, vcpus: int) -> None:
    """Its own kprobes, its jump labels that are switched, and breakpoints of its programs, all under load."""
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.console(API)
        guest.add(gdb, "p:ours __x64_sys_getpriority")
        theirs = behind(guest, "__x64_sys_getpriority")
        gdb.cont()
        with events(vm, [theirs], Way.INT3):
            jobs = [vm.spawn(f"workload syscall {GETPRIORITY} 50000", timeout=60) for _ in range(vcpus)]
            for _ in range(20):
                if vcpus == 1:
                    # With more, QEMU 7.2 kills a guest that switches jump labels by itself: a vCPU goes on with
                    # translated code of an int3 that is gone, and the kernel does not know it any more ("Oops: int3").
                    vm.run("echo 1 >/proc/sys/kernel/sched_schedstats; echo 0 >/proc/sys/kernel/sched_schedstats")
                assert vm.run("workload int3") == (0, "workload: SIGTRAP arrived\n")
            for job in jobs:
                assert vm.finish(job, timeout=60)[0] == 0
            assert (hits(vm), missed(vm)) == (50000 * vcpus, 0)
        assert guest.hits(gdb) == {"ours": 50000 * vcpus}
        gdb.interrupt()
        assert stops(gdb) == 0
        gdb.console("kprobe detach")


def test_int3_of_the_guests_kprobe_on_a_probed_function_after_ours_is_gone(probed: Boot) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.console(API)
        place = behind(guest, "__x64_sys_getpriority")
        guest.add(gdb, f"p:ours {place:#x}")
        gdb.cont()
        vm.run(f"workload syscall {GETPRIORITY} 100")
        gdb.interrupt()
        gdb.console("kprobe delete ours")
        guest.add(gdb, "p:entry __x64_sys_getpriority")  # the dispatcher stays in place, with the address in its table
        gdb.cont()
        with events(vm, [place], Way.INT3):
            vm.run(f"workload syscall {GETPRIORITY} 100")
            assert (hits(vm), missed(vm)) == (100, 0)
        gdb.interrupt()
        assert stops(gdb) == 0
        assert guest.hits(gdb) == {"entry": 100}
        gdb.console("kprobe detach")


@on_both_counts
def test_the_stub_dispatches_when_asked_to(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb(dispatch="stub") as gdb:
        gdb.console(API)
        guest.add(gdb, "p:boosted __x64_sys_getpriority", "boosted")
        guest.add(gdb, f"p:stepped {behind(guest, '__x64_sys_getpriority'):#x}", "single-step")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} 50") for _ in range(vcpus)]
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"boosted": 50 * vcpus, "stepped": 50 * vcpus}
        assert stops(gdb) == 100 * vcpus
        gdb.console("kprobe detach")
