"""Debian's kernels of all flavours and ages, by name: each rung and a condition against a known number of calls.

None is pinned: a name stands for the newest that is served of its kind; what is not served is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kprobe_guest import GuestSpec, GuestVm
from tests.support.probed import Booted
from tests.torture.cell import Cell, check

pytestmark = pytest.mark.live

FUNCTION, OTHER = "loop:loop_control_ioctl", "dummy"
"""A function of a module, and another module."""
NO_SUCH_COMMAND = 0x1234
CALLS = 25
CALL = "workload syscall 16 {calls} 3 {command} 0 3</dev/loop-control"  # ioctl

KERNELS = (
    pytest.param("cloud@stable-backports", id="newest of all"),
    pytest.param("rt", id="PREEMPT_RT"),
    pytest.param("small", id="no modules"),
    pytest.param("small-nobtf", id="no types"),
    pytest.param("generic", id="generic", marks=pytest.mark.full),
    pytest.param("rt@stable-backports", id="newest PREEMPT_RT", marks=pytest.mark.full),
    *(pytest.param(f"6.{minor}", marks=pytest.mark.full) for minor in (1, 12, 16, 17, 18, 19)),
    *(pytest.param(f"7.{minor}", marks=pytest.mark.full) for minor in range(4)),
)


by_name = pytest.mark.parametrize("served", KERNELS, indirect=True)


@by_name
def test_a_probe_on_each_rung(booted_guest: Booted, served: str) -> None:
    cell = Cell(GuestSpec(kernel=served, vcpus=2))
    outcome = check(booted_guest(cell.spec), cell)
    assert outcome.wrong == ()
    assert outcome.rungs == ("optimized", "boosted", "single-step")


@by_name
def test_functions_of_a_module_on_each_rung(
    booted_guest: Booted, make_probed: Callable[[GuestVm], Any], served: str
) -> None:
    """Since 6.16 texts of modules may share large pages (``EXECMEM_ROX_CACHE``): one comes beside probes, and goes."""
    vm = booted_guest(GuestSpec(kernel=served, vcpus=2))
    if not vm.modules():
        pytest.skip(f"the modules of kernel {served} are not served")
    vm.check_output(f"rmmod {OTHER}")
    guest = make_probed(vm)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:jump {FUNCTION}")
        guest.add(gdb, f"p:trap {FUNCTION}+behind", "boosted")
        guest.add(gdb, f"p:odd {FUNCTION} if u32(si) == {NO_SUCH_COMMAND + 1}")
        gdb.cont()
        for command in (NO_SUCH_COMMAND, NO_SUCH_COMMAND + 1):
            vm.check_output(f"insmod /modules/{OTHER}.ko")
            vm.check_output(CALL.format(calls=CALLS, command=command))
            vm.check_output(f"rmmod {OTHER}")
            vm.check_output(CALL.format(calls=CALLS, command=command))
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": 4 * CALLS, "trap": 4 * CALLS, "odd": 2 * CALLS}
        gdb.console("kprobe detach")
    guest.check_untouched()
    vm.check_output(f"insmod /modules/{OTHER}.ko")
