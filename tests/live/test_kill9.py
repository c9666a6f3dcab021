"""gdb is killed at a random moment of each phase; its probes are left alone, adopted or restored."""

from __future__ import annotations

import random

import pytest

from kprobe_guest import GuestSpec, GuestVm
from tests.torture.kill9 import After, Kill9, Phase

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    ("kernel", "vcpus", "first"),
    [
        ("debian", 2, 0),
        pytest.param("debian", 1, 1, marks=pytest.mark.full),
        pytest.param("newest", 1, 2, marks=pytest.mark.full),
        pytest.param("newest", 2, 1, marks=pytest.mark.full),
    ],
)
def test_a_killed_gdb_harms_nothing(kernel: str, vcpus: int, first: int) -> None:
    """The oracle is the guest: the calls it has made, its log, and its text."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    afters = list(After)
    with GuestVm(GuestSpec(kernel=kernel, vcpus=vcpus)) as guest:
        kill = Kill9(guest, random.Random(seed))
        for number, phase in enumerate(Phase):
            one = kill.round(phase, afters[(first + number) % len(afters)])
            print(one)
            assert not one.wrong, one
