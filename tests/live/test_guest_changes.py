"""What the guest does under armed probes: it is reset, it unloads modules, its user has breakpoints of his own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbTimeoutError
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Booted, MakeProbed

pytestmark = pytest.mark.live

CALLS = 23


@pytest.fixture
def unchecked(booted_guest: Booted, make_probed: MakeProbed) -> Callable[[GuestSpec], Any]:
    """A guest under test whose text is another one afterwards, so that it cannot be compared."""
    return lambda spec: make_probed(booted_guest(spec))


def test_a_reset_is_noticed_and_the_probes_are_armed_again(unchecked: Callable[[GuestSpec], Any]) -> None:
    guest = unchecked(GuestSpec())
    with guest.gdb() as gdb:
        guest.add(gdb, "p:mine __x64_sys_getpriority")
        gdb.cont()
        guest.guest.reset()
        gdb.interrupt()
        assert gdb.command("-kprobe-list")["probes"][0]["state"] == "pending"
        output = gdb.console(f"kprobe attach {guest.profile}")
        assert "earlier boot; it was cleared" in output
        assert "mine: __x64_sys_getpriority+0x0 armed" in output
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} {CALLS}")
        gdb.interrupt()
        assert guest.hits(gdb) == {"mine": CALLS}
        gdb.console("kprobe detach")
    assert guest.guest.dmesg_problems() == []


def test_a_reset_in_the_firmware_writes_nothing(unchecked: Callable[[GuestSpec], Any]) -> None:
    guest = unchecked(GuestSpec(extra_cmdline=("nokaslr",)))
    with guest.gdb() as gdb:
        guest.add(gdb, "p:mine __x64_sys_getpriority")
        guest.guest.reset(wait=False)
        with pytest.raises(GdbCommandError, match="the guest was reset"):
            gdb.console(guest.spelled("kprobe p:other __x64_sys_getpriority+behind"))
        assert gdb.command("-kprobe-list")["probes"][0]["state"] == "pending"
    guest.guest.wait_ready()


@pytest.mark.parametrize("strategy", ["boosted", "single-step"])
def test_a_breakpoint_right_behind_a_probe_stops_every_time(probed: Boot, strategy: str) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        probe = guest.add(gdb, "p:mine __x64_sys_getpriority", strategy)
        behind = int(probe["addr"], 16) + int(probe["bytes"])
        gdb.console(f"break *{behind:#x}")
        gdb.cont()
        # It runs only between the stops: a thread waits for it.
        worker = threading.Thread(target=guest.guest.run, args=(f"workload syscall {GETPRIORITY} {CALLS}", 120))
        worker.start()
        for _ in range(CALLS):
            assert int(gdb.wait_stop(60)["frame"]["addr"], 16) == behind
            gdb.cont()
        # gdb steps over its breakpoint, and once in some 500 steps QEMU executes nothing: then it stops there again.
        again = 0
        worker.join(2)
        while worker.is_alive() and again < 3:
            with contextlib.suppress(GdbTimeoutError):
                assert int(gdb.wait_stop(60)["frame"]["addr"], 16) == behind
                again += 1
                gdb.cont()
            worker.join(2)
        assert not worker.is_alive()
        gdb.interrupt()
        assert guest.hits(gdb) == {"mine": CALLS}
        gdb.console("delete")
        gdb.console("kprobe detach")
