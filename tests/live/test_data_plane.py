"""Counters that are read while the guest runs: through shared RAM, through QEMU's process, or not at all, and why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import GETPRIORITY
from tests.support.inside import take_for_qemu
from tests.support.probed import Boot, Booted, Probed

pytestmark = pytest.mark.live

CALLS = 400_000
PROFILE = """\
gdbstub: {gdbstub}
region:
  source: {region}
{physical}  size: 16M
shared_memory: {shared}
"""

HIGH = 0x1_1000_0000
ABOVE_4_GIB = {"shared_ram": False, "memory_mb": 4096, "region": "none", "extra_cmdline": (f"memmap=16M${HIGH:#x}",)}
"""RAM above 4 GiB is another piece of the guest's memory, and of the same piece of QEMU's."""


def profile(guest: Probed, directory: Path, shared: str = "auto") -> Path:
    """A profile for *guest* as it is, whatever its stub listens on."""
    file = directory / "mine.yaml"
    spec = guest.guest.spec
    region = "ivshmem" if spec.region == "ivshmem" else "reserved"
    base = guest.guest.reserved_base or HIGH
    physical = f"  physical: {base:#x}\n" if region == "reserved" else ""
    text = PROFILE.format(gdbstub=guest.guest.gdb_address, region=region, physical=physical, shared=shared)
    file.write_text(text)
    return file


def plane(gdb: GdbMi) -> str:
    """What ``kprobe info`` says of how counters are read."""
    lines = dict(line.split(":", 1) for line in gdb.console("kprobe info").splitlines() if ":" in line)
    return str(lines["counters"]).strip()


def total(gdb: GdbMi) -> int:
    return int(gdb.command("-kprobe-stats")["tables"][0]["total"]["hits"])


def stats_fail(gdb: GdbMi) -> str:
    with pytest.raises(GdbCommandError) as error:
        gdb.console("kprobe stats")
    assert "Error occurred in Python" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({"shared_ram": True}, "shared memory (ram)", id="shared"),
        pytest.param({"shared_ram": False}, "process memory of QEMU (pid {pid})", id="private-unix"),
        pytest.param({"shared_ram": False, "gdb": "tcp"}, "process memory of QEMU (pid {pid})", id="private-tcp"),
        pytest.param(ABOVE_4_GIB, "process memory of QEMU (pid {pid})", id="private-above-4-GiB"),
        pytest.param({"shared_ram": False, "region": "ivshmem"}, "shared memory (region)", id="ivshmem"),
    ],
)
def test_counts_are_read_while_the_guest_runs(
    probed: Boot, tmp_path: Path, spec: dict[str, Any], expected: str, vcpus: int
) -> None:
    guest = probed(GuestSpec(vcpus=vcpus, **spec))
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe attach {profile(guest, tmp_path)}")
        assert plane(gdb) == expected.format(pid=guest.guest.pid)
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} {CALLS}", timeout=60) for _ in range(vcpus)]
        seen = [0]
        deadline = time.monotonic() + 60
        while seen[-1] < vcpus * CALLS and time.monotonic() < deadline:
            seen.append(total(gdb))
            time.sleep(0.005)
        for job in jobs:
            assert guest.guest.finish(job, timeout=60)[0] == 0
        assert guest.guest.is_running()
        assert seen == sorted(seen)
        assert len(set(seen)) > 3, "read while they grew"
        assert total(gdb) == vcpus * CALLS, "while it runs"
        gdb.interrupt()
        assert guest.hits(gdb) == {"prio": vcpus * CALLS}
        gdb.console("kprobe detach")


def test_it_is_told_why_counts_can_be_read_only_at_stops(probed: Boot, tmp_path: Path) -> None:
    guest = probed(GuestSpec())
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe attach {profile(guest, tmp_path, shared='off')}")
        assert plane(gdb) == "only at stops (the profile says shared_memory: off)"
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        with pytest.raises(GdbCommandError, match="while the guest runs: the profile says shared_memory: off"):
            gdb.console("kprobe stats --live")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        said = stats_fail(gdb)
        assert "cannot be read while the guest runs: the profile says shared_memory: off" in said
        assert "hint: interrupt the guest" in said
        gdb.interrupt()
        assert total(gdb) == 23
        gdb.console("kprobe detach")


def test_another_process_is_not_taken_for_qemu(probed: Boot, tmp_path: Path) -> None:
    guest = probed(GuestSpec(shared_ram=False))
    with guest.gdb(attach=False) as gdb:
        gdb.console(take_for_qemu(os.getpid()))
        gdb.console(f"kprobe attach {profile(guest, tmp_path)}")
        told = plane(gdb)
        assert told.startswith(f"only at stops (process {os.getpid()} ")
        assert "has no memory for physical" in told or "does not hold this guest's memory" in told
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        assert f"process {os.getpid()} " in stats_fail(gdb)
        gdb.interrupt()
        assert total(gdb) == 23
        gdb.console("kprobe detach")


def test_a_process_that_may_not_be_read_is_told(probed: Boot, tmp_path: Path) -> None:
    guest = probed(GuestSpec(shared_ram=False))
    with guest.gdb(attach=False) as gdb:
        gdb.console(
            "python import os; really_open = os.open; "
            "os.open = lambda path, *rest: really_open(path, *rest) if not str(path).endswith('/mem') "
            "else (_ for _ in ()).throw(PermissionError(13, 'Permission denied'))"
        )
        gdb.console(f"kprobe attach {profile(guest, tmp_path)}")
        told = plane(gdb)
        assert told.startswith(f"only at stops (the memory of process {guest.guest.pid} (qemu-system-x86)")
        assert "cannot be opened: Permission denied (another user's" in told
        gdb.console("kprobe detach")


def test_that_qemu_has_ended_is_told(
    booted_guest: Booted, make_probed: Callable[[GuestVm], Any], tmp_path: Path
) -> None:
    guest = make_probed(booted_guest(GuestSpec(shared_ram=False)))
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe attach {profile(guest, tmp_path)}")
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        assert total(gdb) == 23
        guest.guest.kill()
        said = stats_fail(gdb)
        # gdb may have noticed by itself; then there is nothing to be read any more.
        assert f"process {guest.guest.pid} has ended" in said or "not attached to a guest" in said
