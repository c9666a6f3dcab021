"""The proof itself: that it tells forms apart, and that it finds what is wrong."""

from __future__ import annotations

import random
from typing import Any

import iced_x86
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86 import relocate, step
from gdb_kprobe.x86.decode import DecodeError, Insn, decode
from gdb_kprobe.x86.encoding import parse
from tests.proof.decoding import check_decoding
from tests.proof.differential import check
from tests.proof.emulator import Emulator, has_meaning, is_extended
from tests.proof.forms import Form, Forms, Sample, form_of, read_forms
from tests.proof.operands import make_sensible

ADDR = VirtAddr(0xFFFF_FFFF_8123_4567)
SLOT = VirtAddr(0xFFFF_FFFF_C0FF_E123)


def insn(text: str) -> Insn:
    return decode(bytes.fromhex(text), ADDR)


# -- forms


def form(text: str) -> Form:
    raw = bytes.fromhex(text)
    return form_of(parse(raw), raw)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("48 89 e5", "48 89 c3"),  # other registers
        ("75 f0", "75 10"),
        ("48 8b 43 08", "48 8b 7d f0"),
        ("e8 10 00 00 00", "e8 00 00 00 80"),
        ("48 83 c0 01", "48 83 c3 7f"),
        ("c5 f1 ef c2", "c5 f9 ef d1"),
        ("62 f1 7c 48 10 c1", "62 f1 7c 48 10 d7"),
    ],
)
def test_same_form(one: str, other: str) -> None:
    assert form(one) == form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("48 89 e5", "89 e5"),  # REX
        ("48 89 c5", "49 c7 c5 00 00 00 00"),
        ("e8 10 00 00 00", "2e e8 10 00 00 00"),  # prefix
        ("75 f0", "0f 85 f0 ff ff ff"),
        ("ff d0", "ff e0"),  # group
        ("ff d0", "ff d4"),  # rsp
        ("ff 10", "ff 50 08"),
        ("ff 50 08", "ff 54 24 08"),
        ("ff 54 24 08", "ff 54 23 08"),
        ("ff 14 25 00 00 00 00", "ff 15 00 00 00 00"),  # absolute, RIP-relative
        ("48 83 c0 01", "48 81 c0 01 00 00 00"),
        ("0f 01 ca", "0f 01 cb"),
        ("c5 f1 ef c2", "c5 f5 ef c2"),  # 128 and 256 bits
        ("62 f1 7c 48 10 c1", "62 f1 7c 28 10 c1"),
        ("54", "55"),
    ],
)
def test_different_form(one: str, other: str) -> None:
    assert form(one) != form(other)


def test_text_is_walked_from_symbol_to_symbol() -> None:
    text = bytes.fromhex("4889e5 4889c3 c3 cccc" + "f6c3 90" + "ea" + "eb00 06 90") + bytes(80)
    found = read_forms([(ADDR, text)], [ADDR, ADDR + 9, ADDR + 10, ADDR + 13], [AddressRange(ADDR, ADDR)])
    assert found == Forms(
        instructions=6,
        distinct={
            text[:3]: ADDR,
            text[3:6]: VirtAddr(ADDR + 3),
            b"\xc3": VirtAddr(ADDR + 6),
            b"\x90": VirtAddr(ADDR + 11),
            b"\xeb\x00": VirtAddr(ADDR + 13),
        },
        samples={
            form("48 89 e5"): Sample(ADDR, text[:3]),
            form("c3"): Sample(VirtAddr(ADDR + 6), b"\xc3"),
            form("eb 00"): Sample(VirtAddr(ADDR + 13), b"\xeb\x00"),
            form("90"): Sample(VirtAddr(ADDR + 11), b"\x90"),
        },
        bad={
            ADDR + 9: "the instruction does not end within the bytes given",
            ADDR + 12: "opcode ea of map 0 is not an instruction in 64-bit mode",
            ADDR + 15: "opcode 06 of map 0 is not an instruction in 64-bit mode",
        },
    )


def test_init_text_is_left_out() -> None:
    found = read_forms([(ADDR, b"\x90\xc3")], [ADDR, ADDR + 1], [AddressRange(ADDR, VirtAddr(ADDR + 1))])
    assert list(found.samples) == [form("c3")]


# -- what is wrong is found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("48 8b 05 00 01 00 00", "rax"),  # its operand is elsewhere
        ("89 05 00 01 00 00", "memory at"),
        ("75 f0", "rip"),
        ("e8 10 00 00 00", "memory at"),  # it returns into the slot
        ("ff d0", "memory at"),
        ("ff 50 08", "memory at"),
        ("e2 f0", "rip"),
    ],
)
def test_a_copy_that_is_not_relocated_is_found(
    machine: Emulator, state_from: Any, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr(relocate, "relocate", lambda insn, slot: insn.raw)
    monkeypatch.setattr(relocate, "relocated_size", lambda insn: insn.length)
    before = state_from(1)
    before.registers.update(rcx=2, eflags=2)
    with pytest.raises(AssertionError, match=f"relocated: .*{what}"):
        check(machine, before, insn(text), SLOT)


@pytest.mark.parametrize(("text", "what"), [("90", "rip"), ("75 f0", "rip"), ("ff d0", "memory at")])
def test_a_step_that_is_not_fixed_up_is_found(
    machine: Emulator, state_from: Any, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr(step, "fix_up", lambda *_: step.StepFixup({}))
    with pytest.raises(AssertionError, match=f"stepped: .*{what}"):
        check(machine, state_from(1), insn(text), SLOT)


def test_an_operand_elsewhere_is_found_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    load = insn("62 f1 7c 48 10 05 00 01 00 00")
    check_decoding(load, SLOT)
    right = relocate.relocate(load, SLOT)
    monkeypatch.setattr(relocate, "relocate", lambda insn, slot: insn.raw + right[insn.length :])
    with pytest.raises(AssertionError):
        check_decoding(load, SLOT)


# -- which oracle may be asked


@pytest.mark.parametrize(
    "text",
    ["0f 30", "0f 22 d8", "ec", "f4", "0f 01 cb", "0f 01 f8", "f3 0f c7 f8", "66 0f 38 82 07", "0f ae 27", "8e d0"],
)
def test_unicorn_is_not_asked_about_what_it_only_seems_to_execute(text: str) -> None:
    assert not has_meaning(insn(text))


@pytest.mark.parametrize("text", ["c5 f5 ef c2", "62 f1 7c 48 10 c1", "0f 28 c1", "d9 c0", "0f 77"])
def test_vectors_are_known_as_such(text: str) -> None:
    assert is_extended(insn(text))


@pytest.mark.parametrize("text", ["48 89 e5", "fb", "9d", "f3 0f 1e fa", "c4 e2 7b f7 c0", "48 0f c7 0f"])
def test_unicorn_is_asked_about_the_rest(text: str) -> None:
    assert has_meaning(insn(text))
    assert not is_extended(insn(text))


# -- vectors with any operand: no machine at hand has EVEX


MODRM = st.one_of(st.integers(0, 255), st.integers(0, 7).map(lambda reg: reg << 3 | 5))


@st.composite
def vectors(draw: st.DrawFn) -> bytes:
    """VEX and EVEX instructions, every second one RIP-relative."""
    prefix = draw(st.sampled_from((b"", b"\x2e", b"\x65", b"\x67")))
    payload = draw(st.binary(min_size=3, max_size=3))
    first = draw(st.sampled_from((b"\xc5", b"\xc4", b"\x62")))
    if first == b"\xc5":
        start = first + payload[:1]
    elif first == b"\xc4":
        start = first + bytes((payload[0] & 0xE0 | draw(st.integers(1, 3)), payload[1]))
    else:
        start = first + bytes((payload[0] & 0xF0 | draw(st.integers(1, 3)), payload[1] | 4, payload[2]))
    tail = draw(st.binary(min_size=9, max_size=9))
    return prefix + start + bytes((draw(st.integers(0, 255)), draw(MODRM))) + tail


@settings(max_examples=4000, deadline=None, derandomize=True)
@given(raw=vectors(), slot=st.integers(0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_FF00_0000))
def test_generated_vector_instructions_decode_to_the_same(raw: bytes, slot: int) -> None:
    try:
        moved = decode(raw[:15], ADDR)
    except DecodeError:
        return
    if iced_x86.Decoder(64, moved.raw, ip=ADDR).decode().code == iced_x86.Code.INVALID:
        return
    if moved.rip_target is not None and 0x67 not in moved.prefixes and abs(moved.rip_target - slot) > 0x7FFF_FF00:
        with pytest.raises(relocate.RelocateError, match="cannot reach"):
            check_decoding(moved, VirtAddr(slot))
    else:
        check_decoding(moved, VirtAddr(slot))


def test_states_for_divisions_divide(machine: Emulator, state_from: Any) -> None:
    for text in ("48 f7 f3", "f6 f2", "66 f7 f9", "f7 f1"):
        before = state_from(text)
        make_sensible(insn(text), before, random.Random(text))
        assert check(machine, before, insn(text), SLOT), text
