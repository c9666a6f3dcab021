"""CPUs that go offline and come back, with probes armed."""

from __future__ import annotations

from argparse import Namespace

import pytest

from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, MakeProbed
from tests.torture import hotplug

pytestmark = pytest.mark.live

CALLS = 1000
ONLINE = "/sys/devices/system/cpu/cpu1/online"


@pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_a_cpu_goes_and_comes(kernel: str) -> None:
    """The oracle is the guest: the calls it has made on all CPUs, its log, and its text."""
    assert hotplug.run(Namespace(n=3, kernel=kernel, cpus=2, unprepared=False)) == 0


def test_a_cpu_that_is_plugged_in_is_looked_at_too(expandable: GuestVm, make_probed: MakeProbed) -> None:
    """QEMU's stub lists it from the next stop on; hits on it are counted at once."""
    guest, vm = make_probed(expandable), expandable
    slots = vm.qmp("query-hotpluggable-cpus")
    assert isinstance(slots, list)
    (slot,) = [found for found in slots if "qom-path" not in found]
    with guest.gdb() as gdb:
        guest.add(gdb, "p:jump __x64_sys_getpriority")
        assert gdb.console(CPUS).split() == ["1"]
        gdb.cont()
        vm.qmp("device_add", driver=slot["type"], id="plugged", **slot["props"])
        vm.check_output(f"i=0; until [ -e {ONLINE} ] || [ $i = 100 ]; do i=$((i+1)); sleep 0.1; done; echo 1 >{ONLINE}")
        for calls in (CALLS, 2 * CALLS):
            vm.check_output(f"taskset 2 workload syscall {GETPRIORITY} {CALLS}")
            gdb.interrupt()
            assert guest.hits(gdb) == {"jump": calls}
            assert gdb.console(CPUS).split() == ["2"]
            gdb.console("kprobe disable jump")
            gdb.console("kprobe enable jump")
            gdb.cont()
        gdb.interrupt()
        gdb.console("kprobe detach")
    assert vm.dmesg_problems() == []
    # The guest's lock prefixes come with its second CPU (alternatives_enable_smp); nothing else has changed.
    found = [change for change in guest.snapshot.differences() if not change.own or change.addr in guest.touched]
    assert {(change.before, change.after) for change in found} <= {(0x3E, 0xF0)}


def test_attach_and_detach_while_a_cpu_is_offline(probed: Boot) -> None:
    """It has loaded no page table of ours then, and keeps none: it comes online through real mode."""
    guest = probed(GuestSpec(vcpus=2))
    vm = guest.guest
    for before, after in ((0, 0), (0, 1), (1, 0)):
        vm.check_output(f"echo {before} >{ONLINE}")
        with guest.gdb() as gdb:
            guest.add(gdb, "p:jump __x64_sys_getpriority")
            gdb.cont()
            vm.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
            vm.check_output(f"echo {after} >{ONLINE}")
            vm.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
            gdb.interrupt()
            assert guest.hits(gdb) == {"jump": 2 * CALLS}
            gdb.console("kprobe detach")
        vm.check_output(f"echo 1 >{ONLINE}")
        vm.check_output(f"taskset 2 workload syscall {GETPRIORITY} {CALLS}")


CPUS = "python from gdb_kprobe.gdbext import api; print(api.guest().vcpus)"
