"""CPUs that go offline and come back, with probes armed."""

from __future__ import annotations

from argparse import Namespace

import pytest

from gdb_kprobe.launcher.torture import hotplug

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_a_cpu_goes_and_comes(kernel: str) -> None:
    """The oracle is the guest: the calls it has made on all CPUs, its log, and its text."""
    assert hotplug.run(Namespace(n=3, kernel=kernel, cpus=2)) == 0
