"""The windows of jumps in a live kernel's text: what is displaced does elsewhere what it did there.

GDB_KPROBE_FULL=1 in the environment: both kernels, with and without mitigations.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gdb_kprobe.guest.linux import MODULES, open_linux
from gdb_kprobe.guest.symbol_text import pieces, read_references
from gdb_kprobe.kprobes.insn_info import InsnInfos
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.window import Window, can_optimize, make_function
from gdb_kprobe.linux.branch_targets import CodeReferences
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.detour import displaced, displaced_size
from kprobe_guest import GuestSpec
from tests.proof.emulator import Emulator, has_meaning, is_extended, random_state
from tests.proof.operands import make_sensible
from tests.proof.state import PAGE, differences

pytestmark = pytest.mark.live

FULL = bool(os.environ.get("GDB_KPROBE_FULL"))
OFF = ("mitigations=off",)
GUESTS = [
    GuestSpec(),
    *(
        pytest.param(spec, marks=pytest.mark.full)
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
class Text:
    """A guest's text by the piece, and its branch targets."""

    release: str
    pieces: list[Piece]
    references: CodeReferences


@pytest.fixture(scope="module")
def text_of(guest_pool: Any) -> Callable[[GuestSpec], Text]:
    known: dict[GuestSpec, Text] = {}

    def get(spec: GuestSpec) -> Text:
        if spec not in known:
            vm = guest_pool.get(spec)
            vm.stop()
            guest = open_linux(GuestMonitor(vm), GuestRam(vm))
            snapshot = guest.snapshot(TextMap())
            vm.cont()
            known[spec] = Text(guest.release, list(pieces(snapshot)), read_references(snapshot))
        return known[spec]

    return get


def name_of(spec: GuestSpec) -> str:
    return f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}"


@pytest.mark.parametrize("spec", GUESTS, ids=name_of)
def test_the_displaced_code_does_what_the_window_does(spec: GuestSpec, text_of: Callable[[GuestSpec], Text]) -> None:
    """Random windows of several instructions of the live text, in unicorn."""
    found = text_of(spec)
    rng = random.Random(SEED)
    emulator, forms = Emulator(), InsnInfos()
    proved: dict[str, int] = {"windows": 0, "states": 0, "with a call": 0, "with a jcc": 0, "returning at the end": 0}
    while proved["windows"] < PROVED:
        piece = rng.choice(found.pieces)
        if piece.rule is not None:
            continue
        function = make_function(piece, forms.read(piece.addr, piece.code, len(piece.code))[0])
        if not function.addrs:
            continue
        index = rng.randrange(len(function.addrs))
        window = can_optimize(function, index, lambda: found.references, MODULES)
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
    code = displaced(insns, slot, window.end, window.jump_end).code
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
