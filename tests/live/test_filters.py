"""Conditions compiled into the guest, and probes that are switched while it runs: exact counts, and no stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdb_kprobe.testing import GdbCommandError
from kprobe_guest import GuestSpec
from tests.support.calls import BODY, GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

FUNCTION = BODY
"""Of the arguments as they were given: which in di, who in si."""
CALLS = 5000


on_each_guest = pytest.mark.parametrize(
    ("kernel", "vcpus"),
    [("debian", 1), ("debian", 2), ("newest", 2), pytest.param("newest", 1, marks=pytest.mark.full)],
)
on_each_rung = pytest.mark.parametrize("strategy", ["optimized", "boosted", "single-step"])

CONDITIONS: dict[str, Callable[[int, int], object]] = {
    "none": lambda which, who: True,
    "both": lambda which, who: which == 0 and who & 0x40,
    "either": lambda which, who: which == 1 or who > 64,
    "cast": lambda which, who: (who & 0xFF) == 0x41,
    "sum": lambda which, who: which + who == 66,
    "never": lambda which, who: False,
}
TEXTS = {
    "none": "",
    "both": " if di == 0 && (si & 0x40)",
    "either": " if di == 1 || si > 64",
    "cast": " if u8(si) == 0x41",
    "sum": " if di + si == 66",
    "never": " if flags == 0 || sp == 0 || ip == 0",
}
ARGUMENTS = ((0, 0x40), (1, 0x41), (0, 0x141), (1, 0))


@on_each_rung
@on_each_guest
def test_what_is_counted_is_what_the_condition_says(probed: Boot, kernel: str, vcpus: int, strategy: str) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    calls = 10 if strategy == "single-step" else CALLS
    with guest.gdb() as gdb:
        for name, text in TEXTS.items():
            # On 6.1 the compiler has made one function of both: the arguments are in pt_regs of the system call.
            assert guest.add(gdb, f"p:{name} {FUNCTION}{text}", strategy)["rung"] == strategy
        gdb.cont()
        for which, who in ARGUMENTS:
            guest.guest.check_output(f"workload syscall {GETPRIORITY} {calls} {which} {who}", timeout=120)
        gdb.interrupt()
        expected = {
            name: calls * sum(bool(holds(which, who)) for which, who in ARGUMENTS) for name, holds in CONDITIONS.items()
        }
        assert guest.hits(gdb) == expected
        gdb.console("kprobe detach")


@pytest.mark.parametrize("shared", [True, False], ids=["shared RAM", "memory of QEMU's process"])
@pytest.mark.parametrize("strategy", ["optimized", "boosted"])
def test_probes_are_switched_while_the_guest_runs(probed: Boot, shared: bool, strategy: str) -> None:
    guest = probed(GuestSpec(vcpus=2, shared_ram=shared))
    vm = guest.guest
    with guest.gdb() as gdb:
        for name in ("first", "second"):
            guest.add(gdb, f"p:{name} {FUNCTION}", strategy)
        gdb.console("kprobe p:host __x64_sys_getpriority")
        gdb.console("kprobe disable host")
        gdb.cont()

        def call() -> None:
            vm.check_output(f"workload syscall {GETPRIORITY} {CALLS}")

        call()
        gdb.console("kprobe disable first")
        call()
        gdb.console("kprobe disable second")
        call()
        gdb.console("kprobe enable first")
        call()
        assert vm.is_running()
        with pytest.raises(GdbCommandError, match="host has no handler in the guest now"):
            gdb.console("kprobe enable host")
        gdb.interrupt()
        assert guest.hits(gdb) == {"first": 2 * CALLS, "second": 2 * CALLS, "host": 0}
        gdb.console("kprobe enable second")
        gdb.cont()
        call()
        gdb.interrupt()
        assert guest.hits(gdb) == {"first": 3 * CALLS, "second": 3 * CALLS, "host": 0}
        gdb.console("kprobe detach")
