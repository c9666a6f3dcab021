"""gdb is killed with probes that need it; its watchdog has the guest run on.

The oracles are the guest's own count of its calls, QEMU's word for whether it runs, and the processes there are.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbMi, GdbTerminal
from gdb_kprobe.x86.decode import iter_insns
from kprobe_guest import GuestSpec
from tests.support.calls import ENTRY
from tests.support.probed import Boot, Booted, Probed

pytestmark = pytest.mark.live

FUNCTION = ENTRY
CALLS = 5_000
HANDLER = f"python import gdb_kprobe.gdbext.api as api; api.add('p:handled {FUNCTION}', pre=lambda hit: None)"
SCHED_SETATTR, UNMAPPED = 314, 0x10_0000
"""A system call that reads by ``__get_user_4``, and where it finds nothing."""
WATCHDOG = "__import__('gdb_kprobe.gdbext.api').gdbext.api.attachment().watchdog"
LOAD = f"workload syscall 140 {CALLS}"


def runs(guest: Probed) -> bool:
    return bool(guest.guest.is_running())


def kill(gdb: GdbMi) -> None:
    gdb.signal(signal.SIGKILL)
    gdb.wait_exit()


def watchdog_of(gdb: GdbMi) -> int:
    return int(gdb.console(f"python print({WATCHDOG})"))


def wait_until(condition: Callable[[], object], what: str = "it did not come true in time") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    """Of the watchdog."""
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the watchdog {pid} is still there")


def patch(guest: Probed) -> None:
    addr = guest.snapshot.guest.kallsyms.address(FUNCTION)
    guest.touched |= set(range(addr, addr + 16))


@pytest.mark.parametrize(
    ("vcpus", "strategy"),
    [
        (2, "auto"),
        (1, "single-step"),
        (2, "single-step"),
        pytest.param(1, "auto", marks=pytest.mark.full),
        pytest.param(1, "boosted", marks=pytest.mark.full),
        pytest.param(2, "boosted", marks=pytest.mark.full),
    ],
)
def test_the_guest_runs_on_and_misses_hits_for_a_handler(probed: Boot, vcpus: int, strategy: str) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    patch(guest)
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {strategy}")
        gdb.console(HANDLER)
        pid = watchdog_of(gdb)
        gdb.cont()
        job = guest.guest.spawn(LOAD)
        wait_until(lambda: int(gdb.command("-kprobe-list")["probes"][0]["hits"]) >= 2)
        time.sleep(random.uniform(0, 0.3))
        kill(gdb)
    wait_for_end(pid)
    assert guest.guest.finish(job) == (0, f"workload: {CALLS} calls done, last result 20\n")
    assert runs(guest)
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe adopt {guest.profile}")
        (probe,) = gdb.command("-kprobe-list")["probes"]
        hits, missed = int(probe["hits"]), int(probe["missed"])
        assert 1 < hits < CALLS / 2
        if strategy == "single-step":
            assert missed == 0
        else:
            # The one that gdb was about when it was killed may be counted by it, and then as missed.
            assert CALLS <= hits + missed <= CALLS + 1
        gdb.console("kprobe detach")


def test_what_only_gdb_can_step_is_not_probed_without_it(probed: Boot) -> None:
    """It may be an instruction of the exception table: the guest finds no fixup for a fault elsewhere."""
    guest = probed(GuestSpec(vcpus=2))
    kernel = guest.snapshot.guest
    start = kernel.kallsyms.address("__get_user_4")
    insns = iter_insns(kernel.memory.read(start, 64), VirtAddr(start))
    faulting = next(insn.addr for insn in insns if kernel.fixup_of(insn.addr))
    fixup = kernel.fixup_of(faulting)
    assert fixup is not None
    watched = range(fixup, next(iter_insns(kernel.memory.read(fixup, 16), fixup)).end)
    guest.touched.update(watched)
    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:bad {faulting:#x}")
        assert probe["rung"] == "single-step"
        counted = guest.add(gdb, f"p:getp {FUNCTION}")
        pid = watchdog_of(gdb)
        gdb.cont()
        job = guest.guest.spawn(f"workload syscall {SCHED_SETATTR} {CALLS} 0 {UNMAPPED} 0")
        time.sleep(random.uniform(0.2, 0.5))
        kill(gdb)
    wait_for_end(pid)
    assert guest.guest.finish(job) == (0, f"workload: {CALLS} calls done, last result -14\n")
    # What watches the fixup for gdb is passed as any other place.
    jump = range(int(counted["addr"], 16), int(counted["addr"], 16) + int(counted["bytes"]))
    assert guest.probed_bytes() == {*jump, *watched}
    guest.guest.check_output(LOAD)
    with guest.gdb(attach=False) as gdb:
        assert f"getp: {FUNCTION}+0x0, {CALLS} hit(s), 0 missed." in gdb.console(f"kprobe adopt {guest.profile}")
        gdb.console("kprobe detach")


def test_a_guest_without_a_dispatcher_gets_its_text_back(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    patch(guest)
    with guest.gdb(dispatch="stub") as gdb:
        guest.add(gdb, f"p:getp {FUNCTION}", "boosted")
        pid = watchdog_of(gdb)
        gdb.cont()
        job = guest.guest.spawn(LOAD)
        time.sleep(0.3)
        kill(gdb)
    wait_for_end(pid)
    assert guest.guest.finish(job)[0] == 0
    assert guest.probed_bytes() == set()
    with guest.gdb(attach=False) as gdb:
        told = gdb.console(f"kprobe adopt {guest.profile}")
        assert "1 probe(s) taken over" in told
        gdb.cont()
        guest.guest.check_output(LOAD.replace(str(CALLS), "10"))
        gdb.interrupt()
        gdb.console("kprobe detach")


def test_breakpoints_of_the_user_stop_nobody_either(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    patch(guest)
    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:getp {FUNCTION}")
        gdb.console(f"hbreak *{int(probe['addr'], 16) + 5:#x}")
        pid = watchdog_of(gdb)
        gdb.cont()
        guest.guest.check_output("true")
        kill(gdb)
    wait_for_end(pid)
    guest.guest.check_output(LOAD)
    with guest.gdb(attach=False) as gdb:
        assert f"{CALLS} hit(s), 0 missed" in gdb.console(f"kprobe adopt {guest.profile}")
        gdb.console("kprobe detach")


def test_a_guest_at_the_prompt_stays_there(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    patch(guest)
    with guest.gdb() as gdb:
        gdb.console(HANDLER)
        gdb.cont()
        guest.guest.check_output(LOAD.replace(str(CALLS), "10"))
        gdb.interrupt()
        pid = watchdog_of(gdb)
        kill(gdb)
    wait_for_end(pid)
    assert not runs(guest)
    guest.guest.cont()
    guest.guest.check_output(LOAD)
    with guest.gdb() as gdb:
        gdb.console("kprobe detach")


@pytest.mark.parametrize("way", ["kprobe detach", "quit"])
def test_it_goes_with_the_probes(probed: Boot, way: str) -> None:
    guest = probed(GuestSpec())
    patch(guest)
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        gdb.command(f"kprobe add {FUNCTION}")
        pid = int(gdb.command(f"python print({WATCHDOG})").split()[-1])
        assert Path(f"/proc/{pid}").exists()
        gdb.type(way)
        wait_for_end(pid)
    assert runs(guest)


def test_gdb_works_on_without_it(probed: Boot) -> None:
    guest = probed(GuestSpec())
    patch(guest)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:getp {FUNCTION}")
        pid = watchdog_of(gdb)
        os.kill(pid, signal.SIGKILL)
        stat = Path(f"/proc/{pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")  # it is gdb's to reap
        gdb.cont()
        guest.guest.check_output(LOAD)
        gdb.interrupt()
        assert "the watchdog has ended" in "".join(gdb.transcript)
        assert guest.hits(gdb) == {"getp": CALLS}
        gdb.console("kprobe detach")


def test_another_gdb_may_be_quicker(probed: Boot) -> None:
    """It connects in the very moment that the first one is killed, and both would see to the guest.

    The watchdog goes away at once, or waits for the stub while the second gdb has it, and then finds nothing to do.
    """
    guest = probed(GuestSpec(vcpus=2))
    patch(guest)
    for wait in (0, 0.03, 0.1):
        with guest.gdb() as gdb, GdbMi(guest.environment) as second:
            gdb.console(HANDLER)
            pid = watchdog_of(gdb)
            gdb.cont()
            job = guest.guest.spawn(LOAD)
            time.sleep(0.2)
            gdb.signal(signal.SIGKILL)
            time.sleep(wait)
            second.console(f"kprobe adopt {guest.profile}", timeout=60)
            second.console("kprobe delete all")
            second.cont()
            assert guest.guest.finish(job)[0] == 0
            second.interrupt()
            second.console("kprobe detach")
            wait_for_end(pid)
            gdb.wait_exit()


@pytest.mark.parametrize("strategy", ["boosted", "optimized"])
def test_a_bare_metal_guest_has_none(booted_guest: Booted, strategy: str) -> None:
    """Nobody finds what is armed in it but by its profile. It waits at its next hit, or runs on when that is a jump."""
    guest = booted_guest(GuestSpec(kernel="bare"))
    image = guest.bare_image()
    environment = {"KPROBE_GUEST": str(guest.directory), "KPROBE_SYMBOLS": str(image.symbols_path)}

    def wait_for_rounds(more: int) -> None:
        enough = guest.read_u64(image.physical("rounds")) + more
        wait_until(lambda: guest.read_u64(image.physical("rounds")) >= enough)

    with GdbMi(environment) as gdb:
        gdb.console("kprobe attach bare")
        assert "None" in gdb.console(f"python print({WATCHDOG})")
        gdb.console(f"set kprobe strategy {strategy}")
        assert f"armed, {strategy}" in gdb.console(f"kprobe add p:jcc {image.symbols['f_jcc']:#x}")
        gdb.cont()
        wait_for_rounds(5)
        kill(gdb)
    if strategy == "boosted":
        wait_until(lambda: not guest.is_running())
    else:
        wait_for_rounds(1000)
    with GdbMi(environment) as gdb:
        assert "an earlier session left 1 site(s) armed; their text is restored" in gdb.console("kprobe attach bare")
        gdb.console("kprobe detach")
    wait_for_rounds(1000)
