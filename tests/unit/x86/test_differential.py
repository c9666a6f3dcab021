"""Original against relocated and against stepped copy, on an independent processor, from random states."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing.proof.differential import check
from gdb_kprobe.testing.proof.emulator import Emulator, has_meaning, is_extended
from gdb_kprobe.testing.proof.operands import make_sensible
from gdb_kprobe.x86 import decode, families
from gdb_kprobe.x86.families import Family

# Addresses of original and slot: kernel text and the end of the module area; and a bare-metal guest in low memory.
PAGE = 0x1000
PLACES = [(0xFFFF_FFFF_8123_4567, 0xFFFF_FFFF_C0FF_E123), (0x10_0123, 0x20_0456)]

# At least one of each kind that a family's rule tells apart; the operands are varied below.
CASES: dict[Family, list[str]] = {
    Family.NOP: [
        "90", "6690", "f390", "0f1f00", "0f1f440000", "660f1f840000000000", "2e0f1f840000000000", "f30f1efa",
    ],
    Family.PLAIN: [
        "55", "4157", "54", "5c", "5f", "6a80", "6812345678", "ff742408", "ff7424f8", "8f442408", "50", "c9",
        "c8100001",
        "4889e5", "4883ec18", "48b8efcdab8967452301", "b8ffffffff", "488b442410", "8d4701", "488d7c2408",
        "31c0", "85c0",
        "0fb6c3", "0fbe4708", "4863c7", "4801d8", "4811d8", "4819d8", "f7d8", "48ffc0", "fe4f08", "48c1e004", "d1f8",
        "480fafc3", "6bc30a", "48f7e3", "4887d8", "480f44c3", "0f94c0", "4898", "4899", "0fa3c8",
        "480fbae00a", "0fc8",
        "f3480fb8c3", "f30fbcc3", "658b042510000000", "65488b3c25c0ba0100", "a1efcdab8967452301", "9f", "9e",
        "f5", "fc", "a4", "48ab", "ae", "9d", "669d", "fa", "fb", "f048ff07", "f0480fb10f", "f00fc10b", "f0480fba2f07",
        "f34889e5", "0f0d0f", "0f28c1", "f30f6f07", "660fefc1", "660f7e07", "f20f1007", "660f3800c1", "660f3a0fc108",
        "0fb107", "480fc70f", "0fc1c3", "0faee8", "d7", "48f7f3", "0fbcc3", "480fa4d805", "0f184f10", "0f00ed",
    ],
    Family.RIP_RELATIVE: [
        "488b0512345678", "488d3df0ffffff", "c70512345600efbeadde", "803d1234560007", "ff3512345600", "8f0512345600",
        "65488b0512345600", "480fbf1512345600", "f3480fb80512345600", "480fba2d1234560011", "ff0500f0ffff",
        "678b0512345678", "67488d05f0ffffff", "6567488b0512345600", "f048ff0512345600", "f30f6f0512345600",
        "0f590500f0ffff",
    ],
    Family.REPEATED: ["f3a4", "f3a5", "f348a5", "f3aa", "f348ab", "f2ae", "f3a6", "f2a6", "f3ac", "67f3a4", "f366ab"],
    Family.PUSH_FLAGS: ["9c", "669c", "489c"],
    Family.JCC: [f"{op:02x}{rel}" for op in range(0x70, 0x80) for rel in ("10", "f0")]
    + [f"0f{op:02x}{rel}" for op in range(0x80, 0x90) for rel in ("10000000", "f0ffffff", "0000007f")]
    + ["2e75f0", "3e7410", "75fe"],
    Family.JMP: ["eb10", "ebf0", "ebfe", "e900100000", "e9f0f0ffff", "2ee900100000", "4ce900100000"],
    Family.CALL_REL: [
        "e800100000", "e8f0ffffff", "2ee800100000", "48e800100000", "67e800100000", "e800000000", "2e2ee800100000",
        "f2e800100000", "666648e800100000",
    ],
    Family.CALL_INDIRECT: [
        "ffd0", "ffd4", "41ffd3", "41ffd4", "2effd0", "3effd0", "ff10", "ff542408", "ff5424f8", "ff1424",
        "ff9424f0ffffff",
        "ff54c408", "42ff542408", "ff1512345600", "65ff142510000000", "ff14c500000081", "67ff5008", "48ffd0",
        "41ff5424f8",
    ],
    Family.JMP_INDIRECT: ["ffe0", "ffe4", "41ffe3", "3effe0", "ff20", "ff642408", "ff2512345600", "ff24c500000081"],
    Family.RET: ["c3", "f3c3", "f2c3", "2ec3", "c20800", "c2ff7f", "48c3"],
    Family.LOOP: [p + f"e{op}" + rel for p in ("", "67", "2e") for op in range(4) for rel in ("10", "f0", "80")]
    + ["e2fe", "e3fe"],
}  # fmt: skip


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
