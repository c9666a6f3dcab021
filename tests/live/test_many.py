"""Many probes at once: by pattern, and on every function of a running kernel."""

from __future__ import annotations

import re

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

NOP5 = bytes.fromhex("0f1f440000")
"""At a function's entry: the place of ftrace's call. A probe is behind it."""
CALLS = 5000
SOME = "s*"
"""Functions of all kinds of code: scheduler, sockets, security, system calls, seq_file, slab, sysfs."""
ADDRESSES = "addr for site in api.sites() if site.is_armed for addr in range(site.range.start, site.range.end)"


def armed_of(answer: str) -> tuple[int, int]:
    found = re.search(r"(\d+) of (\d+) functions armed", answer)
    assert found is not None, answer
    return int(found[1]), int(found[2])


def touched(gdb: GdbMi) -> set[int]:
    return {int(addr, 16) for addr in re.findall(r"^([0-9a-f]{16}) ", gdb.console("kprobe list"), re.M)}


def test_a_pattern_arms_what_the_guest_calls_so(probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    vm = guest.guest
    listed = [line.split()[:3] for line in vm.kallsyms().splitlines()]
    bounds = {name: int(addr, 16) for addr, _, name in listed if name in ("_text", "_etext")}
    functions = [(addr, name) for addr, kind, name in listed if kind in "tT" and not name.endswith(".cold")]
    live = {int(addr, 16) for addr, name in functions if name.startswith("vfs_")}
    live = {addr for addr in live if bounds["_text"] <= addr < bounds["_etext"]}

    def probed_place(addr: int) -> int:
        nop: int = addr + guest.pad(addr)
        found = guest.snapshot.original(VirtAddr(nop), len(NOP5)) == NOP5
        return nop + len(NOP5) if found else nop

    probed_at = {probed_place(addr) for addr in live}
    assert len(probed_at - live) > 0.9 * len(live)
    with guest.gdb() as gdb:
        armed, of = armed_of(gdb.console("kprobe add 'vfs_*'"))
        assert of == len(live)
        assert armed == of == len(gdb.command("-kprobe-list")["probes"])
        assert {int(probe["asked"], 16) for probe in gdb.command("-kprobe-list")["probes"]} == live
        assert touched(gdb) == probed_at
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        vm.run("true")  # it runs now
        # The last byte of a jump may be what was there before.
        assert guest.probed_bytes() <= guest.touched
        assert guest.probed_bytes() >= probed_at
        before = guest.hits(gdb)
        vm.check_output("dd if=/dev/zero of=/dev/null bs=1 count=1000")
        after = guest.hits(gdb)
        # The shell and the start of the program read and write a little, too.
        for name in ("p_vfs_read_0", "p_vfs_write_0"):
            assert 1000 <= after[name] - before[name] < 1100
        gdb.interrupt()
        with pytest.raises(GdbCommandError, match=r"what matches start_kern\* is init text.*: start_kernel\+0x0"):
            gdb.console("kprobe add 'start_kern*'")
        with pytest.raises(GdbCommandError, match="no function's name matches nothing_like_"):
            gdb.console("kprobe add 'nothing_like_*'")
        again = gdb.console("kprobe add 'vfs_*'")
        assert armed_of(again) == (0, of)
        assert f"{of} refused: a probe of that name is there already" in " ".join(again.split())
        assert f"{armed} probes deleted" in gdb.console("kprobe delete all")
        assert guest.snapshot.differences() == ()
        module_armed, module_of = armed_of(gdb.console("kprobe add 'loop:loop_*'"))
        assert 0 < module_armed <= module_of
        gdb.console("kprobe detach")


@pytest.mark.parametrize(
    ("what", "least"),
    [(SOME, 2_000), pytest.param("--all-functions", 40_000, marks=pytest.mark.full)],
    ids=["some", "all"],
)
@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
def test_thousands_of_functions_at_once(probed: Boot, vcpus: int, what: str, least: int) -> None:
    """The guest does all kinds of work with a probe on every function that can have one; then it is as it was."""
    guest = probed(GuestSpec(vcpus=vcpus))
    vm = guest.guest
    with guest.gdb() as gdb:
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        answer = gdb.console(f"kprobe add {what}", timeout=240)
        armed, of = armed_of(answer)
        print(answer)
        assert armed > least
        assert armed / of > 0.95
        hits = "python from gdb_kprobe.gdbext import api; print(api.get('prio').hits)"
        sites = gdb.console(f"python from gdb_kprobe.gdbext import api; print(*({ADDRESSES}))")
        assert len(sites.split()) >= 5 * armed * 0.9
        guest.touched |= set(map(int, sites.split()))
        gdb.cont()
        jobs = [vm.spawn(f"workload syscall {GETPRIORITY} {CALLS}", timeout=120) for _ in range(vcpus)]
        vm.check_output(
            "ls -lR /etc /proc/self >/dev/null; cat /proc/kallsyms | grep -c vfs; sleep 0.2 & wait", timeout=120
        )
        for job in jobs:
            assert vm.finish(job, timeout=120)[0] == 0
        assert int(gdb.console(hits)) == CALLS * vcpus
        assert vm.dmesg_problems() == []
        gdb.interrupt()
        gdb.console("kprobe detach", timeout=120)
