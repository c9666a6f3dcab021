"""A guest with a gdb and the plugin attached to it; afterwards, the proof that nothing was left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.linux_guest import LinuxGuest
from gdb_kprobe.testing import GdbDiedError, GdbMi, GdbTimeoutError, TextSnapshot
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.debian import cached_kernel
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.errors import BuildError
from tests.support.guests import environment, profile
from tests.support.places import spelled

PADS = tuple(bytes.fromhex(pad) for pad in ("f30f1efa", "660f1f00", "0f1f40d6"))
"""endbr64, and what the kernel puts over it where no indirect branch leads."""


@dataclass
class Probed:
    """A guest under test. *touched* collects the addresses of probes, for the comparison of the text."""

    guest: GuestVm
    snapshot: TextSnapshot
    touched: set[int] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        """What the profiles in configs/ refer to."""
        return environment(self.guest)

    @property
    def profile(self) -> str:
        return profile(self.guest)

    @property
    def borrowing(self) -> Path:
        """A profile that borrows the nops at the entries of functions."""
        text = (CONFIGS / f"{self.profile}.yaml").read_text()
        path = self.guest.directory / "borrow.yaml"
        path.write_text(text.replace("entry: behind", "entry: borrow"))
        return path

    @contextlib.contextmanager
    def gdb(
        self, *, attach: bool = True, dispatch: str = "auto", watchdog: bool = True, borrow: bool = False
    ) -> Iterator[GdbMi]:
        """A gdb with the plugin, attached; it is closed at the end whatever happened.

        *watchdog*: it has one, so that killing it leaves nothing to find. *borrow*: probes on functions borrow their
        nops of the guest's ftrace.
        """
        with GdbMi(self.environment) as gdb:
            gdb.console(f"set kprobe watchdog {'on' if watchdog else 'off'}")
            if attach:
                gdb.console(f"kprobe attach --dispatch {dispatch} {self.borrowing if borrow else self.profile}")
            try:
                yield gdb
            except BaseException:
                with contextlib.suppress(GdbTimeoutError, GdbDiedError):
                    gdb.wait_stop(0.2)  # reads what gdb has said since
                print("\n".join(gdb.transcript[-80:]))
                raise

    def add(self, gdb: GdbMi, definition: str, strategy: str = "auto") -> dict[str, str]:
        """Add a probe and return what ``-kprobe-list`` says of it; for *definition* see :meth:`spelled`."""
        gdb.console(f"set kprobe strategy {strategy}")
        probe: dict[str, str] = gdb.command(f'-kprobe-add "{self.spelled(definition)}"')["probe"]
        self.touched |= patched_by(probe)
        return probe

    def spelled(self, text: str) -> str:
        """Put in offsets for ``SYMBOL+entry``, a probe on it, and ``SYMBOL+behind``, the first one behind its jump."""
        return spelled(self.snapshot.guest, text)

    def pad(self, addr: int) -> int:
        """Bytes of the landing pad (``endbr64``, or what has taken its place) that the function at *addr* begins with.

        A kernel without CONFIG_X86_KERNEL_IBT has none. Behind it is the nop of ftrace.
        """
        return 4 if self.snapshot.original(VirtAddr(addr), 4) in PADS else 0

    def address(self, symbol: str) -> int:
        return int(self.snapshot.guest.kallsyms.address(symbol))

    def patched(self, gdb: GdbMi) -> set[int]:
        """The bytes of text that gdb's probes are in while the guest runs."""
        return {addr for probe in gdb.command("-kprobe-list")["probes"] for addr in patched_by(probe)}

    def hits(self, gdb: GdbMi) -> dict[str, int]:
        """Hits by probe name; no probe may have missed one."""
        probes = gdb.command("-kprobe-list")["probes"]
        assert all(probe["missed"] == "0" for probe in probes), probes
        return {probe["name"]: int(probe["hits"]) for probe in probes}

    def probed_bytes(self) -> set[int]:
        """Where the text differs from what it was, apart from the hook of dispatch inside the guest."""
        found = self.snapshot.differences()
        return {int(difference.addr) for difference in found if not difference.place.startswith("asm_exc_int3+")}

    def check_untouched(self) -> None:
        """The guest runs, its log is clean, and its text is what it was."""
        assert self.guest.is_running(), self.guest.qmp("query-status")
        assert self.guest.dmesg_problems() == []
        assert self.snapshot.leftovers(self.touched) == []


def patched_by(probe: dict[str, str]) -> set[int]:
    """The bytes of text that *probe*, of ``-kprobe-list``, is in: a jump, or an int3, and what fills the rest."""
    addr = int(probe["addr"], 16)
    return set(range(addr, addr + int(probe["bytes"])))


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
