"""Every instruction of functions that a workload runs, probed at once: each is hit as often as QEMU has executed it.

A sample; `./install.sh torture boundaries` takes as many functions as one likes. GDB_KPROBE_FULL=1 in the environment
takes 200 in the guest, and 20 by the stub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.workload import PARTS, SPIN
from kprobe_guest.execution_log import KERNEL_TEXT
from tests.support import boundaries
from tests.support.functions import Function, Kind, Limits
from tests.torture.boundary_check import STUB_LIMITS, BoundaryCheck, Outcome, boundary_check

pytestmark = pytest.mark.live

BootedGuest = Callable[[GuestSpec], GuestVm]
Record = Callable[[str, object], None]

FULL = bool(os.environ.get("GDB_KPROBE_FULL"))

IN_GUEST, BY_STUB = (200, 20) if FULL else (len(Kind), 2)
SOME_PARTS = PARTS if FULL else ("pipes", "copies", "tasks", SPIN)
KERNELS = ("debian", pytest.param("newest", marks=pytest.mark.full))
RUNTIME = 1800 if FULL else 900
"""Seconds."""


@contextmanager
def tortured(booted_guest: BootedGuest, kernel: str, vcpus: int) -> Iterator[tuple[BoundaryCheck, GdbMi]]:
    """A guest with its workload, and a gdb that is not attached yet; afterwards, the proof that nothing is left."""
    guest = booted_guest(GuestSpec(kernel=kernel, vcpus=vcpus, extra_args=KERNEL_TEXT))
    with boundary_check(guest) as found, GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
        yield found, gdb
    assert found.leftovers() == []


def check(
    found: BoundaryCheck, gdb: GdbMi, functions: tuple[Function, ...], dispatch: str, strategy: str
) -> list[Outcome]:
    gdb.console(f"kprobe attach --dispatch {dispatch} debian")
    boundaries.prepare(gdb)
    outcomes = [found.check(gdb, function, strategy) for function in functions]
    gdb.console("kprobe detach")
    return outcomes


@pytest.mark.timeout(RUNTIME)
@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_hits_in_the_guest_are_what_was_executed(
    booted_guest: BootedGuest, record_property: Record, kernel: str, vcpus: int
) -> None:
    with tortured(booted_guest, kernel, vcpus) as (found, gdb):
        functions = found.choose(IN_GUEST, Limits(), SOME_PARTS)
        assert len(functions) == IN_GUEST
        assert {function.kind for function in functions} == set(Kind)
        outcomes = check(found, gdb, functions, "guest", "boosted")
    record_property("summary", [str(outcome) for outcome in outcomes])
    assert [difference for outcome in outcomes for difference in outcome.wrong] == []
    # What runs only now and then may be seen by the one run of the workload and not by the other.
    assert sum(bool(outcome.executed) for outcome in outcomes) >= 0.9 * len(outcomes)


@pytest.mark.timeout(RUNTIME)
@pytest.mark.parametrize("strategy", [pytest.param("boosted", marks=pytest.mark.full), "single-step"])
@pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_hits_by_the_stub_are_what_was_executed(
    booted_guest: BootedGuest, record_property: Record, kernel: str, vcpus: int, strategy: str
) -> None:
    with tortured(booted_guest, kernel, vcpus) as (found, gdb):
        functions = found.choose(BY_STUB, STUB_LIMITS, SOME_PARTS)
        assert len(functions) == BY_STUB
        outcomes = check(found, gdb, functions, "stub", strategy)
    record_property("summary", [str(outcome) for outcome in outcomes])
    assert [difference for outcome in outcomes for difference in outcome.wrong] == []
    assert all(outcome.often for outcome in outcomes)


@pytest.mark.timeout(RUNTIME)
def test_a_hit_that_is_not_counted_is_noticed(booted_guest: BootedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = boundaries.arm
    silent: list[VirtAddr] = []

    def arm_all_but_the_first(gdb: GdbMi, addresses: Iterable[VirtAddr], strategy: str) -> boundaries.Armed:
        armed = arm(gdb, addresses, strategy)
        silent.append(min(armed.rungs))
        gdb.console(f"kprobe disable b_{silent[0]:x}")
        return armed

    monkeypatch.setattr(boundaries, "arm", arm_all_but_the_first)
    with tortured(booted_guest, "debian", 1) as (found, gdb):
        (function,) = found.choose(1, STUB_LIMITS, ("pipes", SPIN))
        (outcome,) = check(found, gdb, (function,), "guest", "boosted")
    assert [line.partition(" ")[0] for line in outcome.wrong] == [f"{function}+{silent[0] - function.range.start:#x}"]
    assert outcome.wrong[0].endswith(", counted 0, missed 0")
