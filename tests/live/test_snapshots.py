"""A snapshot is loaded under a session: it goes on, or lets go, and never writes where it does not know what is there.

What gdb has written is seen on the wire, in gdb's own log of its connection.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kprobe_guest import GuestSpec, Snapshots
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Probed
from tests.support.wire import Wire

pytestmark = pytest.mark.live

CALLS = 23


def call(guest: Probed, times: int = CALLS) -> None:
    guest.guest.check_output(f"workload syscall {GETPRIORITY} {times}")


def test_a_snapshot_with_the_same_probes_goes_on_with_its_counts(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    snapshots = Snapshots(guest.guest)
    with guest.gdb() as gdb:
        guest.add(gdb, "p:jump __x64_sys_getpriority")
        guest.add(gdb, "p:int3 __x64_sys_getpriority+behind", "boosted")
        gdb.cont()
        call(guest)
        snapshots.save("running")
        call(guest)
        gdb.interrupt()
        snapshots.save("stopped")
        gdb.cont()
        call(guest)  # gdb says that it runs before it does
        snapshots.load("running")
        call(guest, 100)
        gdb.interrupt()
        assert "a snapshot was loaded that has the probes of this session" in "\n".join(gdb.transcript)
        assert guest.hits(gdb) == {"jump": CALLS + 100, "int3": CALLS + 100}
        gdb.console("monitor loadvm stopped")
        assert guest.hits(gdb) == {"jump": 2 * CALLS, "int3": 2 * CALLS}
        # Armed text comes back to a stopped guest.
        gdb.console("monitor loadvm running")
        assert guest.snapshot.leftovers(guest.touched) == []
        assert guest.hits(gdb) == {"jump": CALLS, "int3": CALLS}
        gdb.cont()
        call(guest, 100)
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": CALLS + 100, "int3": CALLS + 100}
        gdb.console("kprobe detach")


full = pytest.mark.full


@pytest.mark.parametrize(
    ("saved", "by"),
    [
        ("before the attach", "monitor"),
        pytest.param("before the attach", "qmp", marks=full),
        pytest.param("with others", "monitor", marks=full),
        ("with others", "qmp"),
        ("of an earlier attach", "monitor"),
        pytest.param("of an earlier attach", "qmp", marks=full),
    ],
)
def test_a_snapshot_with_other_probes_is_not_written_to(probed: Boot, tmp_path: Path, saved: str, by: str) -> None:
    guest = probed(GuestSpec())
    snapshots = Snapshots(guest.guest)
    if saved == "before the attach":
        snapshots.save("it")
    with guest.gdb(attach=False) as gdb:
        wire = Wire(gdb, tmp_path / "wire")
        gdb.console(f"kprobe attach {guest.profile}")
        if saved != "before the attach":
            guest.add(gdb, "p:first __x64_sys_getpriority", "boosted")
            gdb.cont()
            call(guest)
            snapshots.save("it")
            gdb.interrupt()
            if saved == "of an earlier attach":
                gdb.console("kprobe detach")
                gdb.console(f"kprobe attach {guest.profile}")
            else:
                gdb.console("kprobe delete first")
        guest.add(gdb, "p:second __x64_sys_getpriority+behind", "boosted")
        gdb.cont()
        call(guest)
        if by == "qmp":
            snapshots.load("it")
            text = guest.snapshot.leftovers()
            wire.mark()
            gdb.interrupt()
            said = "\n".join(gdb.transcript)
        else:
            gdb.interrupt()
            wire.mark()
            gdb.console("monitor loadvm it")
            text = guest.snapshot.leftovers()
            said = "\n".join(gdb.transcript)
        assert wire.writes() == []
        assert guest.snapshot.leftovers() == text
        assert (
            "was reset" in said if saved == "before the attach" else "a snapshot with other probes was loaded" in said
        )
        assert gdb.command("-kprobe-list")["probes"][0]["state"] == "pending"
        gdb.console(f"kprobe attach {guest.profile}")
        gdb.cont()
        call(guest)
        gdb.interrupt()
        assert guest.hits(gdb) == {"second": CALLS}
        gdb.console("kprobe detach")
