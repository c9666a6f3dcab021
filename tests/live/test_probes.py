"""Probes on a live guest, against workloads of a known number of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kprobe_guest import GuestSpec

pytestmark = pytest.mark.live

GETPRIORITY = 140
"""A system call that nothing else in the guest makes."""


@pytest.mark.parametrize("vcpus", [1, 2])
def test_every_call_is_one_hit_on_both_rungs(probed: Callable[[GuestSpec], Any], vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        guest.add(gdb, "p:boosted __x64_sys_getpriority", "boosted")
        guest.add(gdb, "p:stepped __x64_sys_getpriority+5", "single-step")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {GETPRIORITY} 50") for _ in range(vcpus)]
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"boosted": 50 * vcpus, "stepped": 50 * vcpus}
        gdb.console("kprobe detach")
