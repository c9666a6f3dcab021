"""A guest with a gdb and the plugin attached to it; afterwards, the proof that nothing was left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.debian import cached_kernel
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.errors import BuildError
from tests.support.probed import Probed


@pytest.fixture(scope="session")
def kernels() -> dict[GuestVm, LinuxGuest]:
    """What was found out of the kernel of each guest: most of the time that a look at its text takes."""
    return {}


@pytest.fixture
def expandable() -> Iterator[GuestVm]:
    """A guest that a CPU can be plugged into; not one of those that are shared, for the CPU stays."""
    with GuestVm(GuestSpec(extra_args=("-smp", "1,maxcpus=2"))) as vm:
        if vm.check_output("cat /sys/devices/system/cpu/possible").strip() == "0":
            pytest.skip("this kernel sees no place for a second CPU")
        yield vm
        vm.check()


@pytest.fixture
def make_probed(kernels: dict[GuestVm, LinuxGuest]) -> Callable[[GuestVm], Probed]:
    """A function from a guest to a :class:`Probed`, for tests after which nothing can be checked any more."""

    def make(guest: GuestVm) -> Probed:
        for ended in [other for other in kernels if not other.alive()]:
            del kernels[ended]
        # Without KASLR one boot is not told from another.
        known = kernels.get(guest) if guest.spec.kaslr else None
        snapshot = text_of(guest, known)
        kernels[guest] = snapshot.guest
        return Probed(guest, snapshot)

    return make


@pytest.fixture
def probed(
    booted_guest: Callable[[GuestSpec], GuestVm], make_probed: Callable[[GuestVm], Probed]
) -> Iterator[Callable[[GuestSpec], Probed]]:
    """A function from a :class:`GuestSpec` to a :class:`Probed`, which is checked at the end of the test."""
    used: list[Probed] = []

    def boot(spec: GuestSpec) -> Probed:
        used.append(make_probed(booted_guest(spec)))
        return used[-1]

    yield boot
    for probed in used:
        probed.check_untouched()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> str:
    """The name of a kernel that can be had.

    To build one takes more than minutes: a small one is taken if it is there, and built where all tests are run.
    """
    name: str = request.param
    if name.startswith("small") and cached_kernel(name) is None and not os.environ.get("GDB_KPROBE_FULL"):
        pytest.skip(f"{name} is not built: 'gdb-kprobe build --kernel {name}' does it, or set GDB_KPROBE_FULL=1")
    try:
        find_kernel(name)
    except BuildError as error:
        pytest.skip(f"kernel {name} cannot be had: {error}")
    return name
