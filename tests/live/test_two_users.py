"""Two debuggers on one guest: one is told no, or finds what the other has left; nobody's text is harmed.

A stub that is busy is in tests/live/test_attach.py, a gdb that was killed in tests/live/test_kill9.py.
"""

from __future__ import annotations

import signal

import pytest

from gdb_kprobe.config.installation import LOADER
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

CALLS = 23


def address_of(guest: Probed) -> int:
    (symbol,) = guest.snapshot.guest.kallsyms.lookup("__x64_sys_getpriority")
    return int(symbol.addr)


def call_on_each_vcpu(guest: Probed) -> int:
    call = f"workload syscall {GETPRIORITY} {CALLS}"
    vcpus = range(guest.guest.spec.vcpus)
    guest.guest.check_output(" & ".join(f"taskset {1 << cpu:x} {call}" for cpu in vcpus) + " & wait")
    return CALLS * len(vcpus)


def move_stub(guest: Probed, path: str) -> None:
    # With one that listens on a socket still there, QEMU 7.2 makes no other.
    assert "Disabled gdbserver" in guest.guest.hmp("gdbserver none")
    assert "Could not open" not in guest.guest.hmp(f"gdbserver unix:{path},server=on,wait=off")


def test_breakpoints_of_a_plain_gdb_that_was_killed_stop_nobody(probed: Boot) -> None:
    """QEMU keeps them, on all vCPUs but the first one."""
    guest = probed(GuestSpec(vcpus=2))
    with GdbMi(load=False) as plain:
        plain.console(f"target remote {guest.guest.gdb_address}")
        plain.console(f"break *{address_of(guest):#x}")
        plain.cont()
        guest.guest.check_output("true")  # it runs
        plain.signal(signal.SIGKILL)
        plain.wait_exit()
    with guest.gdb() as gdb:
        guest.add(gdb, "p:mine __x64_sys_getpriority+behind")
        gdb.cont()
        calls = call_on_each_vcpu(guest)
        assert gdb.interrupt()["signal-name"] == "SIGINT"
        assert guest.hits(gdb) == {"mine": calls}
        gdb.console("kprobe detach")


def test_the_stub_is_taken_away_from_a_live_session(probed: Boot) -> None:
    """QEMU has one stub; its monitor can move it to another address, under a client."""
    guest = probed(GuestSpec())
    other = guest.guest.directory / "other-gdb"
    with guest.gdb() as first:
        guest.add(first, "p:mine __x64_sys_getpriority")
        first.cont()
        call_on_each_vcpu(guest)
        move_stub(guest, str(other))
        first.console("echo looks\\n")
        with guest.gdb(attach=False) as second:
            second.console(f"target remote {other}")
            assert "an earlier session left 1 site(s) armed in this guest" in "\n".join(second.transcript)
            said = second.console(f"kprobe attach {guest.profile}")
            assert "their text is restored" in said
            guest.add(second, "p:mine __x64_sys_getpriority+behind", "boosted")
            second.cont()
            calls = call_on_each_vcpu(guest)
            # The first one does what its user may do then, and changes nothing.
            first.console("echo looks again\\n")
            assert "these sites are still armed in it: __x64_sys_getpriority" in "\n".join(first.transcript)
            second.interrupt()
            assert guest.hits(second) == {"mine": calls}
            second.console("kprobe detach")
    move_stub(guest, guest.guest.gdb_address)


def test_a_plugin_that_is_loaded_twice_counts_once(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"source {LOADER}")
        gdb.console(f"kprobe attach {guest.profile}")
        guest.add(gdb, "p:mine __x64_sys_getpriority")
        gdb.cont()
        calls = call_on_each_vcpu(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"mine": calls}
        gdb.console("kprobe detach")
