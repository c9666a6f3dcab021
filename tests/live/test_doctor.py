"""``kprobe doctor``: what it says of a guest that nobody has prepared is enough to prepare one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm

pytestmark = pytest.mark.live

UNPREPARED = GuestSpec(region="none", shared_ram=False, cpu="default", gdb="tcp")
PROFILE = "gdbstub: {address}\nregion: {{source: reserved, physical: {physical}, size: 16M}}\n"


def told(guest: GuestVm, gdb: GdbMi) -> str:
    gdb.console(f"target remote {guest.gdb_address}")
    answer = gdb.console("kprobe doctor", timeout=60)
    print(answer)
    return answer


def test_its_hint_makes_an_unprepared_guest_one_that_can_be_attached_to(tmp_path: Path) -> None:
    with GuestVm(UNPREPARED) as guest:
        symbols = len(guest.kallsyms().splitlines())
        with GdbMi() as gdb:
            answer = told(guest, gdb)
            gdb.console("detach")
        guest.check()
    assert f"{symbols}, from the guest's kallsyms" in answer
    assert "dispatch     inside the guest" in answer
    assert "!  memory" in answer.replace("! memory", "!  memory")
    assert "no memory is set aside for probes" in answer
    (word,) = re.findall(r"boot with (\S+) on the kernel's command line", answer)

    with GuestVm(replace(UNPREPARED, extra_cmdline=(word,))) as guest:
        with GdbMi() as gdb:
            answer = told(guest, gdb)
            assert "no memory is set aside" not in answer
            (physical,) = re.findall(r"'source: reserved', 'physical: (0x[0-9a-f]+)'", answer)
            assert word.endswith(f"${physical}")
            profile = tmp_path / "told.yaml"
            profile.write_text(PROFILE.format(address=guest.gdb_address, physical=physical))
            gdb.console(f"kprobe attach {profile}", timeout=60)
            assert "counters" in gdb.console("kprobe doctor", timeout=60)
            gdb.console("kprobe detach")
        assert guest.dmesg_problems() == []


def test_a_prepared_guest_has_memory_and_a_region() -> None:
    # Without cmpxchg16b, and with one vCPU: no fault of an old QEMU matters.
    with GuestVm(GuestSpec()) as guest, GdbMi() as gdb:
        answer = told(guest, gdb)
        gdb.console("detach")
    assert re.search(r"^  memory +shared memory \(ram\)", answer, re.M)
    assert "'physical: 0x10000000'" in answer
    assert not re.search("^!", answer, re.M)
