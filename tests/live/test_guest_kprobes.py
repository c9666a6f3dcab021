"""Kprobes of the guest's own at, beside and inside the places of ours, in each order of coming and going.

The guest counts its own hits (``kprobe_profile``), a workload of a known number of calls is the oracle of both, and a
guest that has oopsed fails the test.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gdb_kprobe.model import Reason
from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.functions import function_insns
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

FUNCTION = ENTRY
CALLS = 100
TRACING = "/sys/kernel/tracing"
NOP_SIZE = 5
"""Of ftrace, at a function's entry."""


on_both_kernels = pytest.mark.parametrize("kernel", ["debian", "newest"])


class Own:
    """The guest's own kprobes, by their names."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm

    def define(self, name: str, place: str) -> None:
        self.vm.check_output(f"echo 'p:{name} {place}' >>{TRACING}/kprobe_events")

    def is_taken(self, place: str) -> bool:
        """Whether the guest lets a kprobe be defined at *place*; none stays."""
        taken = self.vm.run(f"echo 'p:tried {place}' >>{TRACING}/kprobe_events")[0] == 0
        if taken:
            self.remove("tried")
        return bool(taken)

    def enable(self, name: str, on: bool = True) -> None:
        self.vm.check_output(f"echo {int(on)} >{TRACING}/events/kprobes/{name}/enable")

    def remove(self, name: str) -> None:
        self.vm.check_output(f"echo -:{name} >>{TRACING}/kprobe_events")

    def hits(self) -> dict[str, int]:
        lines = self.vm.check_output(f"cat {TRACING}/kprobe_profile").splitlines()
        return {name: int(hits) for name, hits, _ in map(str.split, lines)}

    def listed(self) -> str:
        return str(self.vm.check_output("cat /sys/kernel/debug/kprobes/list"))

    def wait_optimized(self, optimized: bool = True) -> None:
        """The kernel's optimizer works some ticks later."""
        wanted = "grep -q OPTIMIZED" if optimized else "! grep -q OPTIMIZED"
        self.vm.check_output(f"until {wanted} /sys/kernel/debug/kprobes/list; do sleep 0.1; done", timeout=60)


@pytest.fixture
def own(probed: Boot) -> Iterator[Callable[[Any], Own]]:
    made: list[Own] = []

    def make(guest: Probed) -> Own:
        made.append(Own(guest.guest))
        return made[-1]

    yield make
    for one in made:
        one.vm.run(f"echo 0 >{TRACING}/events/kprobes/enable; echo >{TRACING}/kprobe_events; echo >{TRACING}/trace")


def call(guest: Probed, calls: int = CALLS) -> None:
    guest.guest.check_output(f"workload syscall {GETPRIORITY} {calls}")


def boundaries(guest: Probed) -> list[int]:
    """The offsets of the instructions of :data:`FUNCTION`; its text is the guest's own now."""
    kernel = guest.snapshot.guest
    place = kernel.place_of(kernel.kallsyms.address(FUNCTION))
    return [insn.addr - place.start for insn in function_insns(kernel, place.start, place.end)]


def body(guest: Probed) -> int:
    """The offset of the first instruction behind landing pad and nop."""
    return int(guest.pad(guest.address(FUNCTION))) + NOP_SIZE


@on_both_kernels
@pytest.mark.parametrize("strategy", ["boosted", "optimized"])
def test_what_a_kprobe_of_the_guest_may_jump_over_is_refused(
    probed: Boot, own: Callable[[Any], Own], kernel: str, strategy: str
) -> None:
    """Defined, and not enabled: it is prepared to be a jump, and saves what is there when it becomes one."""
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    first = body(guest)
    inside = [at for at in boundaries(guest) if first < at < first + 5]
    behind = next(at for at in boundaries(guest) if at >= first + 5)
    theirs.define("theirs", f"{FUNCTION}+{first}")
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {strategy}")
        for at in inside:
            with pytest.raises(GdbCommandError, match=f"{Reason.GUEST_KPROBE}.*may become a jump"):
                gdb.console(f"kprobe p:ours {FUNCTION}+{at}")
        guest.add(gdb, f"p:ours {FUNCTION}+{behind}", strategy)
        gdb.cont()
        theirs.enable("theirs")
        theirs.wait_optimized()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        gdb.cont()
        theirs.enable("theirs", False)
        theirs.wait_optimized(False)
        call(guest)
        assert theirs.hits() == {"theirs": CALLS}
        theirs.remove("theirs")
        gdb.interrupt()
        guest.add(gdb, f"p:inner {FUNCTION}+{inside[0]}", strategy)
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": 3 * CALLS, "inner": CALLS}
        gdb.console("kprobe detach")


@on_both_kernels
def test_ours_that_was_disabled_is_not_armed_in_what_the_guest_may_jump_over(
    probed: Boot, own: Callable[[Any], Own], kernel: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    first = body(guest)
    inside = next(at for at in boundaries(guest) if first < at < first + 5)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}+{inside}", "boosted")
        gdb.console("kprobe disable ours")
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{first}")
        theirs.enable("theirs")
        theirs.wait_optimized()
        gdb.interrupt()
        with pytest.raises(GdbCommandError, match=str(Reason.GUEST_KPROBE)):
            gdb.console("kprobe enable ours")
        gdb.cont()
        call(guest)
        theirs.enable("theirs", False)
        theirs.wait_optimized(False)
        call(guest)
        assert theirs.hits() == {"theirs": CALLS}
        theirs.remove("theirs")
        gdb.interrupt()
        gdb.console("kprobe enable ours")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        gdb.console("kprobe detach")


@on_both_kernels
@pytest.mark.parametrize("strategy", ["boosted", "optimized"])
def test_the_guest_puts_its_kprobes_around_ours_as_if_we_were_not_there(
    probed: Boot, own: Callable[[Any], Own], kernel: str, strategy: str
) -> None:
    """It decodes the function from its start: each boundary outside of our window is one, and nothing else is."""
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    start = guest.snapshot.guest.kallsyms.address(FUNCTION)
    first = body(guest)
    ends = boundaries(guest)
    last = ends[-1] + 1
    alone = {at for at in range(first, last) if theirs.is_taken(f"{FUNCTION}+{at}")}
    with guest.gdb() as gdb:
        for place in ends[ends.index(first) :]:
            probe = guest.add(gdb, f"p:ours {FUNCTION}+{place}", strategy)
            window = range(int(probe["addr"], 16) - start, int(probe["addr"], 16) - start + int(probe["bytes"]))
            gdb.cont()
            now = {at for at in range(first, last) if theirs.is_taken(f"{FUNCTION}+{at}")}
            gdb.interrupt()
            # At the very place of a jump it may have one.
            assert now - {place} == {at for at in alone if at not in window}
            gdb.console("kprobe delete ours")
        gdb.console("kprobe detach")


@on_both_kernels
def test_a_function_is_the_guests_own_to_trace_and_probe(probed: Boot, own: Callable[[Any], Own], kernel: str) -> None:
    """Its function tracer, its kprobe and its kretprobe on the very function that we probe: all count all calls."""
    guest = probed(GuestSpec(kernel=kernel, vcpus=2))
    vm = guest.guest
    theirs = own(guest)
    start = guest.snapshot.guest.kallsyms.address(FUNCTION)
    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:ours {FUNCTION}")
        assert (int(probe["addr"], 16), int(probe["asked"], 16)) == (start + body(guest), start)
        assert probe["rung"] == "optimized"
        assert f"{FUNCTION}+0x0 at +{body(guest):#x}" in gdb.console("kprobe list")
        gdb.cont()
        vm.check_output(f"echo {FUNCTION} >{TRACING}/set_ftrace_filter && echo function >{TRACING}/current_tracer")
        theirs.define("theirs", FUNCTION)
        vm.check_output(f"echo 'r:returned {FUNCTION}' >>{TRACING}/kprobe_events")
        theirs.enable("theirs")
        theirs.enable("returned")
        call(guest)
        assert int(vm.check_output(f"grep -c 'getpriority <-' {TRACING}/trace")) == CALLS
        assert theirs.hits() == {"theirs": CALLS, "returned": CALLS}
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        gdb.console("kprobe delete ours")
        guest.add(gdb, f"p:again {FUNCTION} if ip == {start:#x}")
        gdb.cont()
        call(guest)
        vm.check_output(f"echo nop >{TRACING}/current_tracer && echo >{TRACING}/set_ftrace_filter")
        theirs.enable("theirs", False)
        theirs.enable("returned", False)
        call(guest)
        assert theirs.hits() == {"theirs": 2 * CALLS, "returned": 2 * CALLS}
        gdb.interrupt()
        assert guest.hits(gdb) == {"again": 2 * CALLS}
        gdb.console("kprobe detach")


@on_both_kernels
def test_a_landing_pad_is_never_replaced(probed: Boot, kernel: str) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    start = guest.snapshot.guest.kallsyms.address(FUNCTION)
    assert bool(guest.pad(start)) is not guest.snapshot.guest.release.startswith("6.1.")
    with guest.gdb() as gdb:
        for strategy in ("single-step", "boosted", "optimized"):
            for where in (FUNCTION, f"{start:#x}"):
                guest.add(gdb, f"p:ours {where}", strategy)
                gdb.cont()
                call(guest)
                gdb.interrupt()
                assert guest.hits(gdb) == {"ours": CALLS}
                gdb.cont()
                assert all(addr >= start + body(guest) for addr in guest.probed_bytes())
                gdb.interrupt()
                gdb.console("kprobe delete ours")
        shown = gdb.console(f"kprobe plan {FUNCTION}")
        assert re.search(rf"^at +0x\w+ \({FUNCTION}\+0x0 at \+{body(guest):#x}\)", shown, re.M)
        gdb.console("kprobe detach")


def run_with_both(
    guest: Probed, gdb: GdbMi, theirs: Own, expected: dict[str, int], own_hits: int
) -> tuple[dict[str, int], int]:
    """One round of calls with the guest's kprobe enabled: both count all. Returns what both have counted by then."""
    call(guest)
    counted = {name: hits + CALLS for name, hits in expected.items()}
    assert theirs.hits() == {"theirs": own_hits + CALLS}
    gdb.interrupt()
    assert guest.hits(gdb) == counted
    return counted, own_hits + CALLS


@on_both_kernels
@pytest.mark.parametrize("where", ["entry", "inside"])
def test_a_kprobe_of_the_guest_on_our_jump_is_known_and_keeps_it(
    probed: Boot, own: Callable[[Any], Own], kernel: str, where: str
) -> None:
    """Defined, enabled, with stops in between, disabled, removed: both count, and the jump goes only after it."""
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    start = guest.snapshot.guest.kallsyms.address(FUNCTION)
    behind = body(guest) if where == "entry" else boundaries(guest)[-1]
    place = FUNCTION if where == "entry" else f"{FUNCTION}+{behind}"
    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:ours {place}")
        assert (probe["rung"], int(probe["addr"], 16)) == ("optimized", start + behind)
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{behind}")
        gdb.interrupt()
        assert "a kprobe of the guest's own is at" in "".join(gdb.transcript[-40:])
        assert "[OPTIMIZED]" not in gdb.console("kprobe list")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        assert "its hits are counted, and not shown" in gdb.console("kprobe trace ours")
        theirs.enable("theirs")
        counted, own_hits = run_with_both(guest, gdb, theirs, {"ours": CALLS}, 0)
        gdb.console("kprobe disable ours")
        gdb.cont()
        call(guest)
        own_hits += CALLS
        gdb.interrupt()
        assert guest.hits(gdb) == counted
        gdb.console("kprobe enable ours")
        with pytest.raises(GdbCommandError, match=r"has saved our jump.*so more cannot be boosted"):
            guest.add(gdb, f"p:more {FUNCTION}+{behind}", "boosted")
        gdb.cont()
        counted, own_hits = run_with_both(guest, gdb, theirs, counted, own_hits)
        gdb.cont()
        theirs.enable("theirs", False)
        call(guest)
        counted = {"ours": counted["ours"] + CALLS}
        gdb.interrupt()
        assert guest.hits(gdb) == counted
        gdb.cont()
        theirs.remove("theirs")
        call(guest)
        counted = {"ours": counted["ours"] + CALLS}
        gdb.interrupt()
        assert guest.hits(gdb) == counted
        assert "[OPTIMIZED]" in gdb.console("kprobe list")
        assert guest.snapshot.differences() == ()
        gdb.console("kprobe detach")


@on_both_kernels
@pytest.mark.parametrize("enabled", [True, False])
def test_a_detach_leaves_what_a_kprobe_of_the_guest_has_saved(
    probed: Boot, own: Callable[[Any], Own], kernel: str, enabled: bool
) -> None:
    """The guest goes on, counts, and removes its kprobe; the next session takes the jump and the region away."""
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    behind = body(guest)
    last = boundaries(guest)[-1]
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{behind}")
        if enabled:
            theirs.enable("theirs")
        gdb.interrupt()
        answer = " ".join(gdb.console("kprobe detach").split())
        assert "still mapped" in answer
        assert "has saved our jump" in answer
        assert "remove it in the guest" in answer
    theirs.enable("theirs")
    call(guest)
    theirs.enable("theirs", False)
    call(guest)
    theirs.enable("theirs")
    call(guest)
    assert theirs.hits() == {"theirs": 2 * CALLS}
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        guest.add(gdb, f"p:other {FUNCTION}+{last}")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS, "other": CALLS}
        assert "still mapped" in gdb.console("kprobe detach")
    theirs.enable("theirs", False)
    theirs.remove("theirs")
    call(guest)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        assert "the region is unmapped" in gdb.console("kprobe detach")


@on_both_kernels
def test_a_deleted_probe_whose_jump_is_saved_counts_for_nobody_else(
    probed: Boot, own: Callable[[Any], Own], kernel: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    last = boundaries(guest)[-1]
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{body(guest)}")
        theirs.enable("theirs")
        gdb.interrupt()
        gdb.console("kprobe delete ours")
        guest.add(gdb, f"p:other {FUNCTION}+{last}")
        gdb.cont()
        call(guest)
        assert theirs.hits() == {"theirs": CALLS}
        theirs.enable("theirs", False)
        theirs.remove("theirs")
        gdb.interrupt()
        assert guest.hits(gdb) == {"other": CALLS}
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"other": 2 * CALLS, "ours": CALLS}
        assert "the region is unmapped" in gdb.console("kprobe detach")


@on_both_kernels
def test_a_killed_gdb_leaves_what_a_kprobe_of_the_guest_has_saved(
    probed: Boot, own: Callable[[Any], Own], kernel: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{body(guest)}")
        theirs.enable("theirs")
        call(guest)
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    call(guest)
    with guest.gdb() as gdb:
        gdb.cont()
        call(guest)
        theirs.enable("theirs", False)
        theirs.remove("theirs")
        call(guest)
        gdb.interrupt()
        assert "the region is unmapped" in gdb.console("kprobe detach")


@on_both_kernels
@pytest.mark.parametrize("enabled", [True, False])
def test_probes_whose_jump_a_kprobe_of_the_guest_has_saved_are_adopted(
    probed: Boot, own: Callable[[Any], Own], kernel: str, enabled: bool
) -> None:
    """With their counts, while the kprobe is there, enabled or not; and they go on when it has gone."""
    guest = probed(GuestSpec(kernel=kernel))
    theirs = own(guest)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        guest.add(gdb, f"p:never {FUNCTION} if di == 99")
        gdb.cont()
        theirs.define("theirs", f"{FUNCTION}+{body(guest)}")
        theirs.enable("theirs", enabled)
        call(guest)
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    call(guest)
    with guest.gdb(attach=False) as gdb:
        said = gdb.console(f"kprobe adopt {guest.profile}")
        assert "2 probe(s) taken over" in said
        assert "not taken over" not in said
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": 3 * CALLS, "never": 0}
        gdb.cont()
        theirs.enable("theirs")
        call(guest)
        gdb.console("kprobe disable ours")
        call(guest)
        gdb.console("kprobe enable ours")
        assert theirs.hits() == {"theirs": (5 if enabled else 2) * CALLS}
        theirs.enable("theirs", False)
        theirs.remove("theirs")
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": 5 * CALLS, "never": 0}
        assert "[OPTIMIZED]" in gdb.console("kprobe list")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": 6 * CALLS, "never": 0}
        assert "the region is unmapped" in gdb.console("kprobe detach")


def test_a_kprobe_whose_module_is_gone_is_none(probed: Boot, own: Callable[[Any], Own]) -> None:
    """It stays in the guest's table; its text is no more, and neither is the copy that it had of that."""
    guest = probed(GuestSpec())
    theirs, vm = own(guest), guest.guest
    kernel = guest.snapshot.guest
    jumps = (
        f"loop:{place.symbol.name}+{insn.addr - place.start}"
        for place in kernel.functions("loop:*")
        if place.symbol is not None
        for insn in function_insns(kernel, place.start, place.end)
        if insn.raw[:1] == b"\xe9"
    )
    theirs.define("theirs", next(jump for jump in jumps if theirs.is_taken(jump)))
    theirs.enable("theirs")
    vm.check_output("rmmod loop")
    assert "[GONE]" in theirs.listed()
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"ours": CALLS}
        gdb.console("kprobe detach")
    vm.check_output("insmod /modules/loop.ko")
