"""The same two probes on guests of all kinds, and every instruction of the bare-metal guest's functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import GuestRam
from gdb_kprobe.x86.families import Family, classify
from kprobe_guest import GuestSpec, GuestVm
from tests.support.path import PathTracer
from tests.support.probed import Booted
from tests.torture.cell import check
from tests.torture.matrix import CELLS

pytestmark = pytest.mark.live

IN_SHORT = (
    "default CPU",
    "default CPU, 2 vCPUs",
    "no KASLR",
    "gdbstub by TCP",
    "private RAM",
    "ivshmem",
    "-M pc",
    "mitigations=off",
    "6.12, default CPU, ivshmem",
    "6.12, private RAM",
)


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.full) for name in CELLS]
)
def test_a_probe_on_each_rung(booted_guest: Booted, name: str) -> None:
    outcome = check(booted_guest(CELLS[name].spec), CELLS[name])
    assert outcome.wrong == ()
    assert outcome.rungs == ("optimized", "boosted", "single-step")


# -- the bare-metal guest ---------------------------------------------------------------------------------------------

BARE = GuestSpec(kernel="bare")
BARE_HITS = 50
ALTERNATING = "f_jcc"
"""Goes one way in every other round of the main loop."""


class BareGuest:
    """The bare-metal guest's text, and which instructions each round of its main loop executes."""

    def __init__(self, guest: GuestVm) -> None:
        self.guest = guest
        self.symbols = guest.bare_image().symbols
        self._ram = GuestRam(guest)

    def read(self, addr: VirtAddr, size: int) -> bytes:
        return self._ram.read_physical(PhysAddr(addr - self.symbols["image"] + self._image), size)

    @property
    def _image(self) -> int:
        return self.guest.bare_image().physical("image")

    def text(self) -> bytes:
        start = VirtAddr(self.symbols["image"])
        return self.read(start, self.symbols["end_of_text"] - start)

    def counts_of_two_rounds(self) -> Counter[VirtAddr]:
        """How often the instructions that may be probed are executed in two rounds, by address."""
        tracer = PathTracer(self.guest.gdb_address, self.read)
        total: Counter[VirtAddr] = Counter()
        for name in self.guest.bare_image().functions:
            if name == "f_int3":
                continue
            start = VirtAddr(self.symbols[name])
            # Anything that the guest calls is within its text; leaf is followed, too.
            ranges = [AddressRange(start, VirtAddr(self.symbols["bp_entry"]))]
            paths = {tracer.trace(ranges).executed}
            while name == ALTERNATING and len(paths) < 2:
                paths.add(tracer.trace(ranges).executed)
            for path in paths:
                for step in path:
                    if isinstance(classify(step.insn), Family):
                        total[step.insn.addr] += 3 - len(paths)
        return total


@pytest.mark.parametrize("rung", ["single-step", "boosted"])
def test_every_instruction_of_the_bare_metal_guest(
    booted_guest: Booted, record_property: Callable[[str, object], None], rung: str
) -> None:
    guest = booted_guest(BARE)
    bare = BareGuest(guest)
    per_two_rounds = bare.counts_of_two_rounds()
    before = bare.text()
    environment = {"KPROBE_GUEST": str(guest.directory), "KPROBE_SYMBOLS": str(guest.bare_image().symbols_path)}

    def rounds() -> int:
        return guest.read_u64(guest.bare_image().physical("rounds"))

    with GdbMi(environment) as gdb:
        gdb.console("kprobe attach bare")
        gdb.console(f"set kprobe strategy {rung}")
        gdb.console(f"thbreak *{bare.symbols['main_loop']:#x}")
        gdb.cont()
        gdb.wait_stop()
        for addr in per_two_rounds:
            gdb.command(f'-kprobe-add "p:a{addr:x} {addr:#x}"')
        first = rounds()
        # An even number of whole rounds.
        gdb.console(f"hbreak *{bare.symbols['main_loop']:#x}")
        turns = BARE_HITS
        stops = 0
        # gdb steps over its breakpoint, and once in some 500 steps QEMU executes nothing: then it stops there again.
        while rounds() < first + turns and stops < 2 * turns:
            gdb.cont()
            gdb.wait_stop()
            stops += 1
        assert rounds() == first + turns
        found = {
            VirtAddr(int(probe["asked"], 16)): int(probe["hits"])
            for probe in gdb.command("-kprobe-list")["probes"]
            if probe["missed"] == "0" and probe["rung"] == rung
        }
        gdb.console("kprobe detach")
    assert found == {addr: count * turns // 2 for addr, count in per_two_rounds.items()}
    record_property("summary", f"{len(found)} instructions, {sum(found.values())} hits")
    assert bare.text() == before
    counters = guest.bare_counters()
    assert rounds() > first + turns
    assert all(count > 0 for name, count in counters.items() if name != "f_int3")
