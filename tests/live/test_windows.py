"""How much of a live kernel's text gets a jump; each of the rest with its reason.

GDB_KPROBE_FULL=1 in the environment: both kernels, with and without mitigations.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest

from gdb_kprobe.kprobes.forms import Forms
from gdb_kprobe.kprobes.kernel_rules import rules_of
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.survey import Piece
from gdb_kprobe.kprobes.window import Window, can_optimize, read_function
from gdb_kprobe.kprobes.window_survey import WindowSurvey, WindowSurveyor, probeable_of
from gdb_kprobe.launcher.oracle import GuestMonitor, GuestRam
from gdb_kprobe.linux.branch_targets import CodeReferences, find_references
from gdb_kprobe.model import AddressRange, Boost, VirtAddr
from gdb_kprobe.session.linux_guest import MODULES, open_linux
from gdb_kprobe.session.survey import Snapshot, pieces, survey, take_snapshot
from gdb_kprobe.testing.proof.emulator import Emulator, has_meaning, is_extended, random_state
from gdb_kprobe.testing.proof.operands import make_sensible
from gdb_kprobe.testing.proof.state import PAGE, differences
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.detour import displaced, displaced_size
from kprobe_guest import GuestSpec

pytestmark = pytest.mark.live

FULL = bool(os.environ.get("GDB_KPROBE_FULL"))
OFF = ("mitigations=off",)
GUESTS = [
    GuestSpec(),
    *(
        pytest.param(spec, marks=pytest.mark.skipif(not FULL, reason="takes minutes; set GDB_KPROBE_FULL=1"))
        for spec in (
            GuestSpec(extra_cmdline=OFF),
            GuestSpec(kernel="newest"),
            GuestSpec(kernel="newest", extra_cmdline=OFF),
        )
    ),
]
MOST_BYTES = 128
SEED = 20261123
PROVED = 3000 if FULL else 500


@dataclass
class Surveyed:
    """A guest's text by the piece, its branch targets, and the shares."""

    release: str
    snapshot: Snapshot
    pieces: list[Piece]
    references: CodeReferences
    seconds: float
    shares: WindowSurvey
    probeable: int


@pytest.fixture(scope="module")
def surveyed(guest_pool: Any) -> Callable[[GuestSpec], Surveyed]:
    known: dict[GuestSpec, Surveyed] = {}

    def get(spec: GuestSpec) -> Surveyed:
        if spec not in known:
            vm = guest_pool.get(spec)
            vm.stop()
            guest = open_linux(GuestMonitor(vm), GuestRam(vm))
            snapshot = take_snapshot(guest, TextMap())
            vm.cont()
            kallsyms = guest.kallsyms
            starts = sorted({addr for table in kallsyms.tables for addr in table.addrs})
            thunks = sorted(
                addr
                for table in kallsyms.tables
                for addr, name in zip(table.addrs, table.names, strict=True)
                if name.startswith("__x86_indirect_thunk_")
            )
            began = monotonic()
            references = find_references(
                snapshot.windows,
                starts,
                snapshot.facts.tables,
                thunks=AddressRange(VirtAddr(thunks[0]), VirtAddr(thunks[-1] + 32)) if thunks else None,
                jump_tables=not thunks,
            )
            seconds = monotonic() - began
            found = list(pieces(guest, snapshot))
            surveyor = WindowSurveyor(references, MODULES, rules_of(guest.release))
            for piece in found:
                surveyor.count(piece)
            probeable = survey(guest, snapshot, MODULES, Boost.RELOCATE).rungs.total()
            known[spec] = Surveyed(guest.release, snapshot, found, references, seconds, surveyor.survey, probeable)
        return known[spec]

    return get


def name_of(spec: GuestSpec) -> str:
    return f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}"


@pytest.mark.parametrize("spec", GUESTS, ids=name_of)
def test_share_of_the_text_that_gets_a_jump(spec: GuestSpec, surveyed: Callable[[GuestSpec], Surveyed]) -> None:
    found = surveyed(spec)
    shares, total = found.shares, found.shares.probeable
    print(f"\n{found.release} {' '.join(spec.extra_cmdline)}")
    print(f"branch targets {len(found.references.targets)} in {found.seconds:.1f} s")
    print(f"probeable boundaries {total}, a jump {shares.optimized / total:.2%} ({shares.single / total:.2%} alone,")
    print(f"  with a borrowed nop {shares.borrowed / total:.2%}); by the kernel's rules {shares.kernel / total:.2%}")
    for reason, count in shares.refused.most_common():
        print(f"  {count / total:7.2%} {count:8} {reason}")
    entries_with = shares.entries - shares.entries_refused.total()
    print(f"function entries {shares.entries}, a jump {entries_with / shares.entries:.2%}")
    for reason, count in shares.entries_refused.most_common():
        print(f"  {count / shares.entries:7.2%} {count:8} {reason}")
    assert shares.optimized >= 0.85 * total


@pytest.mark.parametrize("spec", GUESTS, ids=name_of)
def test_the_boundaries_are_those_of_the_survey(spec: GuestSpec, surveyed: Callable[[GuestSpec], Surveyed]) -> None:
    found = surveyed(spec)
    assert found.shares.probeable == found.probeable


@pytest.mark.parametrize("spec", GUESTS, ids=name_of)
def test_the_displaced_code_does_what_the_window_does(
    spec: GuestSpec, surveyed: Callable[[GuestSpec], Surveyed]
) -> None:
    """Random windows of several instructions of the live text, in unicorn."""
    found = surveyed(spec)
    rng = random.Random(SEED)
    emulator, forms = Emulator(), Forms()
    proved: dict[str, int] = {"windows": 0, "states": 0, "with a call": 0, "with a jcc": 0, "returning at the end": 0}
    while proved["windows"] < PROVED:
        piece = rng.choice(found.pieces)
        if piece.rule is not None:
            continue
        function = read_function(piece, forms)
        indexes = probeable_of(function)
        if not indexes:
            continue
        window = can_optimize(function, rng.choice(indexes), found.references, MODULES)
        if not isinstance(window, Window) or not window.interior:
            continue
        insns = insns_of(window, piece)
        if not all(has_meaning(insn) and not is_extended(insn) and not insn.is_halt for insn in insns):
            continue
        if any(insn.branch_target == window.start for insn in insns):
            continue
        executed = sum(same_in_slot(emulator, window, insns, rng) for _ in range(4))
        if executed:
            proved["windows"] += 1
            proved["states"] += executed
            proved["with a call"] += any(insn.is_call for insn in insns)
            proved["with a jcc"] += any(insn.is_jcc for insn in insns)
            proved["returning at the end"] += window.old_return is not None
    print(f"\n{found.release}: {proved}")
    assert proved["with a call"] > PROVED // 50
    assert proved["with a jcc"] > PROVED // 50


def insns_of(window: Window, piece: Piece) -> list[Insn]:
    """The instructions that are executed."""
    insns: list[Insn] = []
    at = window.start
    while at < window.end:
        insn = decode(piece.code[at - piece.addr :], at)
        insns.append(insn)
        if not insn.falls_through:
            break
        at = insn.end
    return insns


def same_in_slot(emulator: Emulator, window: Window, insns: Sequence[Insn], rng: random.Random) -> bool:
    """Whether there was something to compare: the window ran to its end."""
    # Of code in two pages, unicorn gives back only that which it fetched.
    slot = VirtAddr(rng.randrange(MODULES.start, MODULES.end - PAGE, PAGE) + rng.randrange(PAGE - MOST_BYTES))
    code = displaced(insns, slot, window.end, window.jump_end)
    assert len(code) <= MOST_BYTES
    assert len(code) <= displaced_size(insns)
    if window.start // PAGE != (window.end - 1) // PAGE:
        return False
    before = random_state(rng)
    for insn in reversed(insns):
        make_sensible(insn, before, rng)
    original_code = b"".join(insn.raw for insn in insns)
    before.registers["rip"] = window.start
    original = emulator.run(before, {window.start: original_code}, window.start, most=40)
    rip = original.registers["rip"]
    if original.fault or window.start <= rip < window.start + len(original_code):
        return False
    found = emulator.run(before, {slot: code}, slot, most=60)
    dead = range(0)
    called = next((insn for insn in insns if insn.is_call), None)
    if called is not None:
        top = original.registers["rsp"]
        dead = range(top - 8, top)
        # A branch in front of the call may have been taken.
        if called.end == window.old_return and original.read(top, 8) == called.end.to_bytes(8, "little"):
            original.write(top, window.end.to_bytes(8, "little"))
    told = differences(original, found, dead)
    assert not told, (hex(window.start), [str(insn) for insn in insns], code.hex(), told)
    return True
