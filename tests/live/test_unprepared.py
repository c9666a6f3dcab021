"""A guest that nobody has prepared: default CPU, private RAM, TCP, and no memory set aside. The region is borrowed.

The oracle for what is borrowed, and given back, is the guest's own /proc/meminfo.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gdb_kprobe.errors import ConnectionLostError
from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.guest.pages import Lent, borrow_pages, giving_back
from gdb_kprobe.target.ram import RamView
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.testing import GdbCommandError, GdbMi, GdbTerminal
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.cut import CutChannel, change_of
from tests.support.guests import environment, unprepared
from tests.support.probed import Boot, Booted
from tests.torture.cell import Cell, check

pytestmark = pytest.mark.live

CALLS = 2300
FUNCTION = ENTRY
REGION = 16 << 10
NOISE = 3 << 10
"""KiB that a guest takes by itself in a moment, at the most; less than one block that it gives us."""
BLOCK = 2 << 20
"""The smallest region: one block of the guest's allocator."""

LATER = f"sleep 1; taskset 2 workload syscall {GETPRIORITY} {CALLS}"
"""On the second vCPU, when it was told that this was started."""
ROUNDS = 10 if os.environ.get("GDB_KPROBE_FULL") else 2
MOST_MOMENTS = 30


PTI = replace(unprepared(vcpus=2, extra_cmdline=("pti=on",)), cpu="max")
GUESTS = [
    pytest.param(unprepared(), id="debian-1"),
    pytest.param(unprepared("newest", 2), id="newest-2"),
    pytest.param(unprepared(vcpus=2), id="debian-2", marks=pytest.mark.full),
    pytest.param(PTI, id="pti-2", marks=pytest.mark.full),
]


def free(vm: GuestVm) -> int:
    """KiB of free memory, but for what the guest caches."""
    meminfo = vm.check_output("sync; echo 3 >/proc/sys/vm/drop_caches; cat /proc/meminfo")
    return int(re.findall(r"MemFree: +(\d+) kB", meminfo)[0])


def call(vm: GuestVm) -> int:
    """Make the calls on each vCPU at once; returns how many there are."""
    vcpus = vm.spec.vcpus
    command = f"workload syscall {GETPRIORITY} {CALLS}"
    vm.check_output(" & ".join(f"taskset {1 << cpu:x} {command}" for cpu in range(vcpus)) + " & wait")
    return CALLS * vcpus


def give(stub: QemuStub, kernel: LinuxGuest, lent: Lent) -> None:
    """Give back what was borrowed."""
    with giving_back(stub, kernel, lent) as give_back:
        give_back()


@contextlib.contextmanager
def nothing_missing(vm: GuestVm) -> Iterator[int]:
    """The guest has as much free memory afterwards, or more; yields how much it had."""
    before = free(vm)
    yield before
    assert free(vm) > before - NOISE


@pytest.mark.parametrize("spec", GUESTS)
def test_every_rung_counts_and_the_memory_is_given_back(booted_guest: Booted, spec: GuestSpec) -> None:
    vm = booted_guest(spec)
    with nothing_missing(vm):
        outcome = check(vm, Cell(spec))
    assert not outcome.wrong, outcome


def test_counts_are_read_while_it_runs_and_the_region_is_the_guests_own_memory(probed: Boot) -> None:
    guest = probed(unprepared(vcpus=2))
    with nothing_missing(guest.guest) as before, guest.gdb() as gdb:
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        assert before - free(guest.guest) == pytest.approx(REGION, abs=NOISE)
        calls = call(guest.guest)
        assert guest.hits(gdb) == {"jump": calls}  # it runs: through QEMU's process
        gdb.interrupt()
        assert "process memory of QEMU" in gdb.console("kprobe info")
        gdb.console("kprobe detach")


@pytest.mark.parametrize(
    "spec", [pytest.param(unprepared(vcpus=2), id="debian-2", marks=pytest.mark.full), pytest.param(PTI, id="pti-2")]
)
def test_attached_and_detached_under_load_at_any_moment(probed: Boot, spec: GuestSpec) -> None:
    """Where the vCPUs are then is nearly always in user programs, with the user's page table under PTI."""
    guest = probed(spec)
    loads = [guest.guest.spawn(load) for load in ("workload spin 0", "workload syscall 39 -1")]
    try:
        with nothing_missing(guest.guest):
            for _ in range(ROUNDS):
                with guest.gdb() as gdb:
                    guest.add(gdb, f"p:jump {FUNCTION}")
                    gdb.cont()
                    calls = call(guest.guest)
                    gdb.interrupt()
                    assert guest.hits(gdb) == {"jump": calls}
                    gdb.console("kprobe detach")
    finally:
        for load in loads:
            guest.guest.finish(load, kill=True)


def test_where_the_kernel_can_be_called_at_once_the_user_stays_where_they_are(probed: Boot) -> None:
    """At a breakpoint in a system call nothing is held: neither attaching nor detaching moves the vCPU there."""
    guest = probed(unprepared(vcpus=2))
    entry = int(guest.snapshot.guest.kallsyms.address(FUNCTION))

    def registers() -> str:
        assert gdb.pc == entry
        return str(gdb.console("info registers"))

    with nothing_missing(guest.guest), guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        gdb.console(f"thbreak *{entry:#x}")
        gdb.cont()
        job = guest.guest.spawn(LATER)
        gdb.wait_stop()
        before = registers()
        gdb.console("kprobe attach plain", timeout=60)
        assert registers() == before
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        assert guest.guest.finish(job)[0] == 0
        assert guest.hits(gdb) == {"jump": CALLS}
        gdb.interrupt()
        gdb.console(f"thbreak *{entry:#x}")
        gdb.cont()
        job = guest.guest.spawn(LATER)
        gdb.wait_stop()
        before = registers()
        gdb.console("kprobe detach --stay")
        assert registers() == before
        gdb.console("detach")
        assert guest.guest.finish(job)[0] == 0


@pytest.mark.parametrize("at_once", [False, True], ids=["idle", "in a system call"])
def test_breakpoints_that_gdb_keeps_in_the_guest_are_told_of(probed: Boot, at_once: bool) -> None:
    guest = probed(unprepared(vcpus=2))
    with nothing_missing(guest.guest), guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        job = None
        if at_once:
            gdb.console(f"thbreak *{guest.snapshot.guest.kallsyms.address(FUNCTION):#x}")
            gdb.cont()
            job = guest.guest.spawn(LATER)
            gdb.wait_stop()
        registers = gdb.console("info registers")
        gdb.console("set breakpoint always-inserted on")
        with pytest.raises(GdbCommandError, match=r"keeps its breakpoints in the guest(?s:.)*always-inserted off"):
            gdb.console("kprobe attach plain", timeout=60)
        assert gdb.console("info registers") == registers
        gdb.console("set breakpoint always-inserted off")
        gdb.console("kprobe attach plain", timeout=60)
        gdb.console("set breakpoint always-inserted on")
        assert "the region is not taken away: gdb keeps its breakpoints" in gdb.console("kprobe detach --stay")
        gdb.console("set breakpoint always-inserted off")
        # What stayed is found, and given back by the next one.
        gdb.console("kprobe attach plain", timeout=60)
        assert "the region is unmapped" in gdb.console("kprobe detach")
        if job is not None:
            assert guest.guest.finish(job)[0] == 0


@pytest.mark.parametrize("dispatch", ["stub", "guest"])
def test_what_a_killed_gdb_has_armed_elsewhere_is_restored_before_the_guest_runs(probed: Boot, dispatch: str) -> None:
    """Armed by way of memory that was set aside, and dispatched by a stub without a gdb: a hit would be fatal."""
    guest = probed(GuestSpec(vcpus=2))
    vm = guest.guest
    job = vm.spawn("workload syscall 0 -1 0 0 0")
    with guest.gdb(dispatch=dispatch, watchdog=False) as gdb:
        guest.add(gdb, "p:often ksys_read", "boosted")
        gdb.cont()
        deadline = time.monotonic() + 30
        while not guest.probed_bytes():
            assert time.monotonic() < deadline, "it is not armed"
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    assert guest.probed_bytes(), "armed"
    with guest.gdb(attach=False) as gdb:
        gdb.console("kprobe attach plain", timeout=60)
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        calls = call(vm)
        assert guest.hits(gdb) == {"jump": calls}
        gdb.interrupt()
        gdb.console("kprobe detach")
    vm.finish(job, kill=True)


@pytest.mark.parametrize("adopt", [True, False], ids=["adopt", "restore"])
def test_a_killed_gdb_leaves_a_region_that_is_found_and_given_back(probed: Boot, adopt: bool) -> None:
    guest = probed(unprepared(vcpus=2))
    vm = guest.guest
    with nothing_missing(vm) as before:
        with guest.gdb() as gdb:
            guest.add(gdb, f"p:jump {FUNCTION}")
            gdb.cont()
            calls = call(vm)
            gdb.signal(signal.SIGKILL)
            gdb.wait_exit()
        calls += call(vm)  # it goes on, and counts
        assert before - free(vm) == pytest.approx(REGION, abs=NOISE)
        with guest.gdb(attach=False) as gdb:
            if adopt:
                gdb.console("kprobe adopt plain", timeout=60)
                gdb.cont()
                calls += call(vm)
                gdb.interrupt()
                assert guest.hits(gdb) == {"jump": calls}
                gdb.console("kprobe detach")
            else:
                assert f"jump {FUNCTION}: {calls} hit(s)" in gdb.console("kprobe restore plain", timeout=60)


def test_of_more_than_there_is_in_one_piece_it_takes_what_there_is(probed: Boot, tmp_path: Path) -> None:
    guest = probed(unprepared())
    profile = tmp_path / "large.yaml"
    profile.write_text(f"gdbstub: {guest.guest.gdb_address}\nregion: {{source: borrowed, size: 896M}}\n")
    with nothing_missing(guest.guest) as before, guest.gdb(attach=False) as gdb:
        told = gdb.console(f"kprobe attach {profile}", timeout=120)
        (size,) = re.findall(r"no 896 MiB of free memory in one piece: the region is of (\d+) MiB", told)
        assert 16 <= int(size) <= 256  # half of its memory at the most
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        assert before - free(guest.guest) == pytest.approx(int(size) << 10, abs=NOISE)
        calls = call(guest.guest)
        assert guest.hits(gdb) == {"jump": calls}
        gdb.interrupt()
        gdb.console("kprobe detach")


CHANGES = 14
"""Packets that change something, of borrowing one block: three way points, a frame, a call."""
KINDS = {"M", "G", "Z", "z", "vCont"}


@contextlib.contextmanager
def stopped(vm: GuestVm) -> Iterator[tuple[CutChannel, QemuStub, LinuxGuest]]:
    """The guest, stopped by a client of ours, which is closed without a word if it was cut."""
    channel = CutChannel(vm.gdb_address)
    with channel:
        stub = QemuStub(channel)
        stub.drop_breakpoints()
        yield channel, stub, open_linux(stub, RamView(stub, None))
        if not channel.cut_at:
            channel.detach()


@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
def test_cut_off_at_any_packet_of_a_call_the_guest_goes_on(booted_guest: Booted, vcpus: int) -> None:
    """A vCPU that was made to call goes on where it was by itself; only what it has allocated is lost."""
    # A guest of its own: what it loses is in the way of others.
    vm = booted_guest(replace(unprepared(vcpus=vcpus), memory_mb=480))
    cut: list[str] = []
    for number, behind in itertools.product(range(CHANGES), (False, True)):
        with stopped(vm) as (channel, stub, kernel):
            channel.left, channel.behind = number, behind
            try:
                lent = borrow_pages(stub, kernel, BLOCK)
            except ConnectionLostError:
                cut.append(change_of(channel.cut_at))
            else:  # it came to the end with fewer packets: a vCPU stood where it could be called at once
                channel.left, channel.cut_at = None, b""
                give(stub, kernel, lent)
        with RspSocket(vm.gdb_address) as plain:
            QemuStub(plain).drop_breakpoints()
            plain.detach()
        call(vm)
        vm.check()
    print(f"{len(cut)} of {2 * CHANGES} cut: {cut}")
    assert set(cut) == KINDS
    assert vm.dmesg_problems() == []


def test_pieces_that_are_borrowed_one_after_another_are_apart(booted_guest: Booted) -> None:
    vm = booted_guest(unprepared())
    with nothing_missing(vm), stopped(vm) as (_, stub, kernel):
        pieces = sorted((borrow_pages(stub, kernel, 16 << 20) for _ in range(3)), key=lambda lent: lent.start)
        assert all(low.start + low.size <= high.start for low, high in itertools.pairwise(pieces))
        for lent in pieces:
            give(stub, kernel, lent)


def test_attach_of_an_idle_guest_does_not_wait_long(booted_guest: Booted) -> None:
    """Its vCPUs halt: a timer brings one to where the kernel can be called, before it is said that it hangs."""
    vm = booted_guest(unprepared(vcpus=2))
    with nothing_missing(vm):
        for _ in range(5):
            with GdbMi(environment(vm)) as gdb:
                gdb.console("kprobe attach plain")
                assert gdb.command("-kprobe-detach")["unmapped"] == "1"


def test_ctrl_c_at_any_moment_of_an_attach_leaves_nothing(probed: Boot) -> None:
    """It is attached then, or as before; a call of the guest's allocator that is on its way is waited for."""
    guest = probed(unprepared())
    ended = 0
    with nothing_missing(guest.guest), GdbTerminal(guest.environment) as gdb:
        for _ in range(2):  # the first loads much that the later ones have
            begin = time.monotonic()
            assert "Attached to Linux" in gdb.command("kprobe attach plain", timeout=120)
            takes = time.monotonic() - begin
            gdb.command("kprobe detach", timeout=120)
        for tried in itertools.count(1):
            # On a machine that is busy an attach may be over before a moment that was within the one before.
            if tried > 2 * ROUNDS and (ended or tried > MOST_MOMENTS):
                break
            gdb.type("kprobe attach plain")
            gdb.wait_text("attach plain")
            time.sleep(random.uniform(0, takes))
            gdb.press_ctrl_c()
            told = gdb.wait_prompt(120)
            time.sleep(0.3)  # a Ctrl-C that comes at the prompt makes another one
            assert "Python" not in told, told
            if "interrupted by Ctrl-C" in told:
                ended += 1
                assert "kprobe attach PROFILE" in gdb.command("kprobe info")
                gdb.command("detach")
            else:
                assert "Attached to Linux" in told or "Quit" in told, told
                gdb.command("kprobe detach", timeout=120)
            assert guest.guest.is_running()
        assert "Attached to Linux" in gdb.command("kprobe attach plain", timeout=120)
        gdb.command(f"kprobe p:jump {FUNCTION}")
        guest.touched |= set(range(at := guest.snapshot.guest.kallsyms.address(FUNCTION), at + 10))
        gdb.command("continue &")
        calls = call(guest.guest)
        assert str(calls) in gdb.command("kprobe stats")
        gdb.press_ctrl_c()
        gdb.wait_text(" in ?? ()")  # the prompt was there before
        gdb.command("kprobe detach", timeout=120)
    assert ended, "in the middle of one, at least"
