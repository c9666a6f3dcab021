"""Original against relocated and against stepped copy, on an independent processor, from random states."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86 import decode, families
from gdb_kprobe.x86.families import Family
from tests.proof.cases import CASES
from tests.proof.differential import check
from tests.proof.emulator import Emulator, has_meaning, is_extended
from tests.proof.operands import make_sensible

# Addresses of original and slot: kernel text and the end of the module area; and a bare-metal guest in low memory.
PAGE = 0x1000
PLACES = [(0xFFFF_FFFF_8123_4567, 0xFFFF_FFFF_C0FF_E123), (0x10_0123, 0x20_0456)]


def same_machine(machine: Emulator, state_from: Any, insn: decode.Insn, seed: object, slot: int) -> bool:
    """Compare all three; true when the instruction was executed and did not raise an exception."""
    before = state_from(seed, is_extended(insn))
    make_sensible(insn, before, random.Random(str(seed)))
    return check(machine, before, insn, VirtAddr(slot))


@pytest.mark.parametrize("family", CASES, ids=lambda family: family.replace(" ", "-"))
@pytest.mark.parametrize(("addr", "slot"), PLACES, ids=["kernel", "low"])
def test_written_cases_leave_the_same_machine(
    machine: Emulator, state_from: Any, family: Family, addr: int, slot: int
) -> None:
    executed: Counter[str] = Counter()
    for text in CASES[family]:
        insn = decode.decode(bytes.fromhex(text), VirtAddr(addr))
        assert families.classify(insn) is family, insn
        for seed in range(8):
            executed[text] += same_machine(machine, state_from, insn, f"{text} {seed}", slot)
    assert not [text for text in CASES[family] if not executed[text]], "never executed without a fault"


LEGACY = st.lists(st.sampled_from(b"\xf0\x66\x2e\x3e\x64\x65\x67\xf2\xf3"), max_size=2).map(bytes)
REX = st.one_of(st.just(b""), st.integers(0x40, 0x4F).map(lambda b: bytes((b,))))
OPCODE = st.one_of(
    st.integers(0, 255).map(lambda b: bytes((b,))),
    st.integers(0, 255).map(lambda b: bytes((0x0F, b))),
    st.integers(0, 255).map(lambda b: bytes((0x0F, 0x38, b))),
)
MODRM = st.one_of(
    st.integers(0, 255).map(lambda b: bytes((b,))),
    st.integers(0, 7).map(lambda reg: bytes((reg << 3 | 5,))),  # RIP-relative
    st.sampled_from((b"\x44\x24", b"\x04\x24", b"\x84\x24")),  # on RSP
)


@st.composite
def instructions(draw: st.DrawFn) -> bytes:
    """Anything of the handled families: prefixes, REX, opcode, ModRM; then bytes for whatever follows."""
    start = draw(LEGACY) + draw(REX) + draw(OPCODE) + draw(MODRM)
    return (start + draw(st.binary(min_size=12, max_size=12)))[:15]


def handled(raw: bytes, addr: int) -> decode.Insn | None:
    try:
        insn = decode.decode(raw, VirtAddr(addr))
    except decode.DecodeError:
        return None
    if insn.rip_target is not None and -PAGE < insn.rip_target - addr < PAGE:
        return None  # unicorn does not get past a store into the page that it executes
    if insn.opcode_map == 0 and insn.opcode == 0xC2 and (insn.immediate or 0) < 0:
        return None  # unicorn takes the operand of ret as signed
    return insn if isinstance(families.classify(insn), Family) and has_meaning(insn) else None


def can_reach(insn: decode.Insn, slot: int) -> bool:
    operand = insn.rip_target if 0x67 not in insn.prefixes else None
    targets = [t for t in (operand, insn.branch_target) if t is not None]
    return all(abs(t - slot) < 0x7FFF_FF00 for t in targets)


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=instructions(), seed=st.integers(0, 1 << 32), place=st.sampled_from(PLACES))
def test_generated_instructions_leave_the_same_machine(
    machine: Emulator, state_from: Any, raw: bytes, seed: int, place: tuple[int, int]
) -> None:
    addr, slot = place
    insn = handled(raw, addr)
    if insn is None:
        return
    if can_reach(insn, slot):
        same_machine(machine, state_from, insn, seed, slot)
