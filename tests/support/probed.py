"""A guest with a gdb and the plugin attached to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbDiedError, GdbMi, GdbTimeoutError, TextSnapshot
from kprobe_guest import GuestSpec, GuestVm
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


Boot = Callable[[GuestSpec], Probed]
"""What the fixture ``probed`` is: boots a guest, and looks at its text."""

Booted = Callable[[GuestSpec], GuestVm]
"""What the fixture ``booted_guest`` is."""

MakeProbed = Callable[[GuestVm], Probed]
"""What the fixture ``make_probed`` is."""
