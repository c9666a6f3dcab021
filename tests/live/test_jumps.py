"""Probes that are jumps: exact counts, and every way in which a jump must wait, give way, and come back."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import Any

import pytest

from gdb_kprobe.model import Reason, VirtAddr, offset
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.x86.decode import DecodeError, decode
from kprobe_guest import GuestSpec
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

FUNCTION = ENTRY
CALLS = 20_000


on_both_counts = pytest.mark.parametrize("vcpus", [1, 2])
on_both_kernels = pytest.mark.parametrize("kernel", ["debian", "newest"])


def rungs(gdb: GdbMi) -> dict[str, str]:
    return {probe["name"]: probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]}


def why_not(gdb: GdbMi, name: str) -> str:
    """Why the probe *name* is no jump, as a user reads it."""
    found = re.search(r"not optimized\s+(.*?)(?=\n\S|\Z)", gdb.console(f"kprobe info {name}"), re.S)
    return " ".join(found[1].split()) if found else ""


def window(gdb: GdbMi, place: str) -> tuple[int, tuple[int, ...], int]:
    """Start, interior and end of the window that a jump at *place* would have."""
    text = gdb.console(
        "python from gdb_kprobe.gdbext import api; "
        f"w = api.plan('{place}')[2].detour.window; print(w.start, *w.interior, w.end)"
    )
    start, *interior, end = map(int, text.split())
    return start, tuple(interior), end


def call(guest: Probed, calls: int = CALLS) -> None:
    guest.guest.check_output(f"workload syscall {GETPRIORITY} {calls}")


def second(gdb: GdbMi) -> str:
    """A place in the function whose window has an interior."""
    start = window(gdb, FUNCTION)[0]
    entry = int(gdb.command(f"-kprobe-plan {FUNCTION}")["plan"]["asked"], 16)
    place = f"{FUNCTION}+{start - entry:#x}"
    assert window(gdb, place)[1]
    return place


@on_both_counts
@on_both_kernels
def test_every_call_is_counted_once(probed: Boot, kernel: str, vcpus: int) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    with guest.gdb() as gdb:
        place = second(gdb)
        for name, where in (("entry", FUNCTION), ("again", FUNCTION), ("inner", place)):
            assert guest.add(gdb, f"p:{name} {where}")["rung"] == "optimized"
        assert "[OPTIMIZED]" in gdb.console("kprobe list")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} {CALLS}") for _ in range(vcpus)]
        assert [guest.guest.finish(job, timeout=60)[0] for job in jobs] == [0] * vcpus
        assert guest.hits(gdb) == dict.fromkeys(("entry", "again", "inner"), vcpus * CALLS)
        gdb.interrupt()
        gdb.console("kprobe disable again")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        expected = {"entry": (vcpus + 1) * CALLS, "again": vcpus * CALLS, "inner": (vcpus + 1) * CALLS}
        assert guest.hits(gdb) == expected
        gdb.console("kprobe delete entry")
        gdb.console("kprobe enable again")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"again": (vcpus + 1) * CALLS, "inner": (vcpus + 2) * CALLS}
        assert set(rungs(gdb).values()) == {"optimized"}
        gdb.console("kprobe detach")


@on_both_kernels
def test_a_zombie_stands_in_nobodys_way(probed: Boot, kernel: str) -> None:
    """It is among the tasks and has no stack: a jump is put, and the region is taken away, as ever."""
    guest = probed(GuestSpec(kernel=kernel, vcpus=2))
    job = guest.guest.spawn("sleep 0 & exec sleep 1000")
    guest.guest.check_output("until ps -o stat | grep -q '^ *Z'; do sleep 0.1; done")
    with guest.gdb() as gdb:
        assert guest.add(gdb, f"p:inner {second(gdb)}")["rung"] == "optimized"
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"inner": CALLS}
        assert "the region is unmapped" in gdb.console("kprobe detach")
    guest.guest.finish(job, kill=True)


@on_both_counts
def test_a_vcpu_within_the_window_makes_the_jump_wait(probed: Boot, vcpus: int) -> None:
    """Stopped at every boundary that the jump would hide."""
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        place = second(gdb)
        for inside in window(gdb, place)[1]:
            job = stop_at(guest, gdb, inside)
            assert guest.add(gdb, f"p:late {place}")["rung"] == "boosted"
            assert why_not(gdb, "late").startswith(str(Reason.WINDOW_BUSY))
            finish_late(guest, gdb, job)
        gdb.console("kprobe detach")


@pytest.mark.parametrize("event", ["interrupt", "NMI"])
def test_a_task_interrupted_within_the_window_makes_the_jump_wait(probed: Boot, event: str) -> None:
    """The vCPU is in the handler; the frame on the task's stack, or on that of NMIs, says where it comes back to."""
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        place = second(gdb)
        for inside in window(gdb, place)[1]:
            job = stop_at(guest, gdb, inside)
            if event == "NMI":
                guest.guest.qmp("inject-nmi")
            else:
                # More than the UART's trigger level: less is told only after a while of the guest's own time.
                guest.guest.channel.send_line(" " * 20)
                time.sleep(0.2)  # until QEMU has read it
            # A step that interrupts may come in between.
            gdb.console("maintenance packet Qqemu.sstep=1")
            pc = inside
            for _ in range(3):  # one step in 500 does nothing
                if pc == inside:
                    gdb.command("-exec-step-instruction")
                    gdb.wait_stop(30)
                    pc = int(gdb.console("print/x $pc").split("=")[1], 16)
            gdb.console("maintenance packet Qqemu.sstep=7")
            assert abs(pc - inside) > 0x1000, hex(pc)
            assert guest.add(gdb, f"p:late {place}")["rung"] == "boosted"
            assert why_not(gdb, "late").startswith(str(Reason.WINDOW_BUSY))
            finish_late(guest, gdb, job)
        gdb.console("kprobe detach")


def stop_at(guest: Probed, gdb: GdbMi, addr: int, command: str = "tbreak") -> Any:
    """Stop a vCPU at *addr*, at the first of :data:`CALLS` calls; returns the job that makes them."""
    gdb.console(f"{command} *{addr:#x}")
    gdb.cont()
    # Not before the job is known to run.
    job = guest.guest.spawn(f"sleep 1; workload syscall {GETPRIORITY} {CALLS}")
    gdb.wait_stop(30)
    return job


def finish_late(guest: Probed, gdb: GdbMi, job: Any) -> None:
    """Of the calls of *job* the first had passed the place of ``late`` already; afterwards it becomes a jump.

    Not at the first stop where a word that nobody needs any more is on a stack in use: it is tried at each.
    """
    gdb.cont()
    assert guest.guest.finish(job, timeout=60)[0] == 0
    gdb.interrupt()
    expected = CALLS - 1
    assert guest.hits(gdb) == {"late": expected}
    for _ in range(5):
        gdb.cont()
        call(guest)
        gdb.interrupt()
        expected += CALLS
        assert guest.hits(gdb) == {"late": expected}
        if rungs(gdb) == {"late": "optimized"}:
            break
    assert rungs(gdb) == {"late": "optimized"}, why_not(gdb, "late")
    gdb.console("kprobe delete late")


def test_a_task_asleep_in_a_call_within_a_window_makes_the_jump_wait(probed: Boot) -> None:
    """Without retpolines much of the text is ``call *reg; nop``: the call returns into the 5 bytes of a jump on it."""
    guest = probed(GuestSpec(extra_cmdline=("mitigations=off",)))
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.cont()
        vm.check_output("mkfifo /tmp/f; (sleep 1000 >/tmp/f) & echo $! >/tmp/writer; sleep 1000 </tmp/f & :")
        reader = vm.spawn("cat /tmp/f")
        vm.check_output("until grep -qs '^cat' /proc/[0-9]*/comm; do :; done; sleep 1")
        sleepers, all_tasks = calls_of(guest, "$(pidof sleep)"), calls_of(guest, "/proc/[0-9]*")
        gdb.interrupt()
        gdb.console(f"python exec({PLANS!r})")
        plans = json.loads(gdb.console(f"python plans({sorted(sleepers | all_tasks)})"))
        assert sleepers
        assert "optimized" not in {plans.get(str(addr), [""])[0] for addr in sleepers}
        asleep = [int(addr) for addr, (_, why_not) in plans.items() if why_not == Reason.WINDOW_BUSY]
        assert asleep
        for index, addr in enumerate(asleep):
            assert guest.add(gdb, f"p:call{index} {addr:#x}")["rung"] == "boosted"
            assert why_not(gdb, f"call{index}").startswith(str(Reason.WINDOW_BUSY))
        gdb.cont()
        vm.check_output("kill $(cat /tmp/writer); killall sleep; echo 1 >/dev/null")
        assert vm.finish(reader, timeout=30)[0] == 0
        for _ in range(10):  # whoever sleeps there now and then is somewhere else at most stops
            gdb.interrupt()
            gdb.cont()
            vm.check_output("for i in 1 2 3; do cat /proc/self/stat; done")
        found = rungs(gdb)
        woken = [name for name, rung in found.items() if rung == "optimized"]
        print(found)
        assert woken
        before = guest.hits(gdb)
        # Asleep at the same calls once more: in a read of a pipe, in nanosleep, and in wait.
        vm.check_output("mkfifo /tmp/g; (sleep 1 >/tmp/g) & sleep 0.5 </tmp/g & cat /tmp/g; wait; rm /tmp/g")
        after = guest.hits(gdb)
        assert any(after[name] > before[name] for name in woken), (before, after)
        gdb.interrupt()
        gdb.console("kprobe detach")


PLANS = """
import json
from gdb_kprobe.errors import RefusedError
from gdb_kprobe.gdbext import api

def plans(addrs):
    found = {}
    for addr in addrs:
        try:
            plan = api.plan(f"{addr:#x}")[2]
        except RefusedError:
            continue
        found[addr] = [plan.rung, str(plan.not_optimized.reason) if plan.not_optimized else ""]
    print(json.dumps(found))
"""


def calls_of(guest: Probed, tasks: str) -> set[VirtAddr]:
    """The calls by register that *tasks* (words of the guest's shell) are asleep in; by the guest's own account."""
    stacks = guest.guest.check_output(f"for task in {tasks}; do cat /proc/${{task#/proc/}}/stack; done 2>&1 || :")
    kallsyms = guest.snapshot.guest.kallsyms
    found = set()
    for name, at in re.findall(r"^\[<0>\] ([\w.]+)\+(0x[0-9a-f]+)/", stacks, re.M):
        for symbol in kallsyms.lookup(name):
            for size in (2, 3):
                addr = offset(symbol.addr, int(at, 16) - size)
                with contextlib.suppress(DecodeError):
                    insn = decode(guest.snapshot.original(addr, size), addr)
                    if insn.is_call and insn.length == size:
                        found.add(addr)
    return found


@on_both_counts
def test_what_is_put_within_the_window_takes_the_jump_away_and_back(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    expected = 0

    with guest.gdb() as gdb:
        place = second(gdb)
        _, interior, _ = window(gdb, place)
        guest.add(gdb, f"p:outer {place}")

        def run(rung: str, reason: Reason | None = None) -> None:
            nonlocal expected
            for _ in range(5):
                gdb.cont()
                call(guest)
                expected += CALLS
                gdb.interrupt()
                assert guest.hits(gdb)["outer"] == expected
                # As in finish_late(): a tick within the window leaves a word that somebody's frame may still hold.
                if rung == "boosted" or not why_not(gdb, "outer").startswith(str(Reason.WINDOW_BUSY)):
                    break
            assert rungs(gdb)["outer"] == rung, why_not(gdb, "outer")
            assert why_not(gdb, "outer").startswith(str(reason or ""))

        run("optimized")
        for inside in interior:
            guest.add(gdb, f"p:inner {inside:#x}")
            assert rungs(gdb)["outer"] == "boosted"
            run("boosted", Reason.PROBED_INSIDE)
            assert guest.hits(gdb)["inner"] == CALLS
            gdb.console("kprobe delete inner")
            run("optimized")
            # The user's breakpoint there is hit.
            job = stop_at(guest, gdb, inside, "break")
            assert int(gdb.console("print/x $pc").split("=")[1], 16) == inside
            assert why_not(gdb, "outer").startswith(str(Reason.BREAKPOINT_INSIDE))
            assert guest.hits(gdb)["outer"] == expected + 1
            gdb.console("delete")
            gdb.cont()
            assert guest.guest.finish(job, timeout=60)[0] == 0
            gdb.interrupt()
            expected += CALLS
            assert guest.hits(gdb)["outer"] == expected
            run("optimized")
        gdb.console("kprobe detach")
