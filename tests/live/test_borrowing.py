"""The guest's own function tracer, switched while probes are in its nops: no splat, no lost text, it still works."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest

from gdb_kprobe.linux.ftrace import read_ftrace_records
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

FUNCTION = ENTRY
CALLS = 1000
TRACING = "/sys/kernel/tracing"


# With two vCPUs switching so much text under load kills a guest by itself under TCG.
on_both_kernels = pytest.mark.parametrize("kernel", ["debian", "newest"])


def call(guest: GuestVm) -> None:
    guest.check_output(f"workload syscall {GETPRIORITY} {CALLS}")


def traced(guest: GuestVm) -> int:
    """How often the guest's tracer sees the function in :data:`CALLS` calls of it."""
    guest.check_output(f"echo {FUNCTION} >{TRACING}/set_ftrace_filter && echo function >{TRACING}/current_tracer")
    call(guest)
    seen = guest.check_output(f"grep -c 'getpriority <-' {TRACING}/trace || :")
    guest.check_output(f"echo nop >{TRACING}/current_tracer && echo >{TRACING}/set_ftrace_filter")
    return int(seen)


def marks(probed: Any) -> list[tuple[int, int]]:
    """All of ftrace's records with their flags but those of their history, by the test's own view of guest memory."""
    kernel = probed.snapshot.guest
    kernel.memory.invalidate()
    records = read_ftrace_records(kernel.memory, kernel.kallsyms, kernel.types)
    return [(site.ip, site.flags & ~site.layout.history) for site in records]


@pytest.mark.parametrize(
    ("kernel", "strategy"),
    [
        ("debian", "boosted"),
        ("newest", "optimized"),
        pytest.param("debian", "optimized", marks=pytest.mark.full),
        pytest.param("newest", "boosted", marks=pytest.mark.full),
    ],
)
def test_the_tracer_is_switched_while_a_probe_is_in_its_nop(probed: Boot, kernel: str, strategy: str) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    vm = guest.guest
    before = marks(guest)
    with guest.gdb(borrow=True) as gdb:
        probe = guest.add(gdb, f"p:probe {FUNCTION}", strategy)
        assert (probe["rung"], probe["insn"][:3], probe["bytes"]) == (strategy, "nop", "5")
        gdb.cont()
        vm.check_output(f"echo function >{TRACING}/current_tracer")
        call(vm)
        assert int(vm.check_output(f"wc -l <{TRACING}/trace")) > 100
        vm.check_output(f"echo function_graph >{TRACING}/current_tracer")
        call(vm)
        vm.check_output(f"echo nop >{TRACING}/current_tracer")
        call(vm)
        gdb.interrupt()
        assert guest.hits(gdb) == {"probe": 3 * CALLS}
        gdb.console("kprobe delete probe")
        assert marks(guest) == before
        gdb.cont()
        assert traced(vm) == CALLS
        gdb.interrupt()
        gdb.console("kprobe detach")


@on_both_kernels
def test_a_probe_comes_behind_the_call_of_a_tracer_that_is_on(probed: Boot, kernel: str) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    vm = guest.guest
    vm.check_output(f"echo {FUNCTION} >{TRACING}/set_ftrace_filter && echo function >{TRACING}/current_tracer")
    with guest.gdb(borrow=True) as gdb:
        probe = guest.add(gdb, f"p:probe {FUNCTION}")
        call_at = int(probe["addr"], 16) - 5
        start = guest.snapshot.guest.kallsyms.address(FUNCTION)
        assert (int(probe["asked"], 16), call_at) == (start, start + guest.pad(start))
        # Whoever names the nop means the function, too.
        assert guest.add(gdb, f"p:there {call_at:#x}")["addr"] == probe["addr"]
        gdb.console("kprobe delete there")
        gdb.cont()
        call(vm)
        assert int(vm.check_output(f"grep -c 'getpriority <-' {TRACING}/trace")) == CALLS
        vm.check_output(f"echo nop >{TRACING}/current_tracer")
        call(vm)
        gdb.interrupt()
        assert guest.hits(gdb) == {"probe": 2 * CALLS}
        gdb.console("kprobe detach")
    vm.check_output(f"echo >{TRACING}/set_ftrace_filter")


def test_what_a_tracer_covers_by_now_stays_marked_and_is_told(probed: Boot) -> None:
    """It was not counted when it came, and must not be missed when it goes."""
    # A guest of its own: the mark stays.
    guest = probed(GuestSpec(extra_cmdline=("marked=1",)))
    vm = guest.guest
    before = marks(guest)
    with guest.gdb(borrow=True) as gdb:
        guest.add(gdb, f"p:probe {FUNCTION}")
        gdb.cont()
        vm.check_output(f"echo function >{TRACING}/current_tracer")
        gdb.interrupt()
        gdb.console("kprobe delete probe")
        assert len(set(marks(guest)) - set(before)) > 1000, "the tracer is on"
        gdb.cont()
        vm.check_output(f"echo nop >{TRACING}/current_tracer")
        gdb.interrupt()
        answer = gdb.console("kprobe detach")
    assert "Note" not in answer, "nobody covers it any more: it was given back"
    assert [ip for ip, _ in marks(guest)] == [ip for ip, _ in before]
    assert traced(vm) == CALLS
    with guest.gdb(borrow=True) as gdb:
        guest.add(gdb, f"p:probe {FUNCTION}")
        gdb.cont()
        vm.check_output(f"echo function >{TRACING}/current_tracer")
        gdb.interrupt()
        answer = gdb.console("kprobe detach")
    nop = guest.pad(guest.address(FUNCTION))
    assert re.search(rf"Note: the guest's ftrace leaves {FUNCTION}\+{nop:#x} alone from now on: a tracer", answer)
    vm.check_output(f"echo nop >{TRACING}/current_tracer")


def test_a_gdb_that_was_killed_leaves_what_the_next_one_gives_back(probed: Boot) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    before = marks(guest)
    with guest.gdb(borrow=True) as gdb:
        guest.add(gdb, f"p:probe {FUNCTION}")
        gdb.cont()
        call(vm)
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    call(vm)
    assert marks(guest) != before
    with guest.gdb(borrow=True) as gdb:
        gdb.console("kprobe detach")
    assert marks(guest) == before
    assert traced(vm) == CALLS
