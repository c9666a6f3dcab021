"""The anatomy of single instructions, and of a row of them."""

from __future__ import annotations

import capstone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, boundaries, decode, iter_insns
from gdb_kprobe.x86.encoding import EncodingError, parse

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)


def insn(text: str, addr: VirtAddr = ADDR) -> Insn:
    return decode(bytes.fromhex(text), addr)


@pytest.mark.parametrize(
    ("text", "length", "disp", "imm"),
    [
        ("c3", 1, (0, 0), (0, 0)),
        ("48 89 e5", 3, (0, 0), (0, 0)),
        ("48 8b 44 24 10", 5, (4, 1), (0, 0)),
        ("48 8b 05 01 02 03 04", 7, (3, 4), (0, 0)),
        ("48 8b 04 25 01 02 03 04", 8, (4, 4), (0, 0)),  # SIB without base
        ("c7 84 24 01 02 03 04 05 06 07 08", 11, (3, 4), (7, 4)),
        ("66 c7 00 34 12", 5, (0, 0), (3, 2)),  # imm16
        ("66 48 c7 00 78 56 34 12", 8, (0, 0), (4, 4)),  # REX.W wins over 66
        ("48 b8 01 02 03 04 05 06 07 08", 10, (0, 0), (2, 8)),
        ("66 b8 34 12", 4, (0, 0), (2, 2)),
        ("48 66 b8 34 12", 5, (0, 0), (3, 2)),  # a REX before a legacy prefix is void
        ("a1 01 02 03 04 05 06 07 08", 9, (0, 0), (1, 8)),
        ("67 a1 01 02 03 04", 6, (0, 0), (2, 4)),
        ("f6 c3 01", 3, (0, 0), (2, 1)),
        ("f6 d3", 2, (0, 0), (0, 0)),  # not: no immediate
        ("f7 05 01 02 03 04 05 06 07 08", 10, (2, 4), (6, 4)),
        ("c8 10 00 01", 4, (0, 0), (1, 3)),
        ("0f ba e0 07", 4, (0, 0), (3, 1)),
        ("0f 20 18", 3, (0, 0), (0, 0)),  # mov rax, cr3 names registers whatever its mod says
        ("66 0f 3a 0f c1 08", 6, (0, 0), (5, 1)),
        ("c5 f8 77", 3, (0, 0), (0, 0)),  # vzeroupper
        ("c4 e3 fb f0 c1 07", 6, (0, 0), (5, 1)),  # rorx
        ("62 f1 7c 48 10 05 01 02 03 04", 10, (6, 4), (0, 0)),  # vmovups zmm0, [rip + d]
    ],
)
def test_parts_are_where_the_opcode_maps_say(
    text: str, length: int, disp: tuple[int, int], imm: tuple[int, int]
) -> None:
    encoding = parse(bytes.fromhex(text) + bytes(8))
    assert encoding.length == length
    assert (encoding.disp_offset, encoding.disp_size) == disp
    assert (encoding.imm_offset, encoding.imm_size) == imm
    assert insn(text).length == length


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("75 f0", ADDR + 2 - 0x10),  # negative rel8
        ("74 7f", ADDR + 2 + 0x7F),
        ("0f 84 f0 ff ff ff", ADDR + 6 - 0x10),
        ("eb fe", ADDR),
        ("eb 80", ADDR + 2 - 0x80),
        ("e9 00 00 00 80", ADDR + 5 - 0x8000_0000),
        ("e8 fb ff ff ff", ADDR),
        ("2e e8 10 00 00 00", ADDR + 6 + 0x10),  # the prefix counts
        ("48 e8 10 00 00 00", ADDR + 6 + 0x10),
        ("66 48 e8 10 00 00 00", ADDR + 7 + 0x10),
        ("e2 f0", ADDR + 2 - 0x10),
        ("e3 10", ADDR + 2 + 0x10),
    ],
)
def test_branch_target_counts_from_the_end_of_the_instruction(text: str, target: int) -> None:
    assert insn(text).branch_target == target
    assert int(insn(text).op_str, 16) == target


def test_branch_target_wraps_at_the_top_of_the_address_space() -> None:
    assert insn("e9 00 00 00 70", VirtAddr(0xFFFF_FFFF_F000_0000)).branch_target == 0x6000_0005


@pytest.mark.parametrize(
    ("text", "operand"),
    [
        ("48 8b 05 10 00 00 00", ADDR + 7 + 0x10),
        ("c7 05 f0 ff ff ff 01 00 00 00", ADDR + 10 - 0x10),  # the immediate counts
        ("ff 15 00 00 00 00", ADDR + 6),
        ("65 48 8b 05 10 00 00 00", ADDR + 8 + 0x10),
        ("67 8b 05 10 00 00 00", (ADDR + 7 + 0x10) & 0xFFFF_FFFF),
    ],
)
def test_rip_relative_operand(text: str, operand: int) -> None:
    assert insn(text).is_rip_relative
    assert insn(text).rip_target == operand


def test_operand_without_base_is_not_rip_relative() -> None:
    assert not insn("48 8b 04 25 01 02 03 04").is_rip_relative
    assert insn("48 8b 04 25 01 02 03 04").rip_target is None


def test_control_flow_predicates() -> None:
    flags = ("is_jcc", "is_loop", "is_jmp", "is_call", "is_ret", "is_indirect_call", "is_indirect_jmp", "falls_through")
    expected = {
        "90": {"falls_through"},
        "75 f0": {"is_jcc", "falls_through"},
        "0f 8f 00 00 00 00": {"is_jcc", "falls_through"},
        "e3 00": {"is_loop", "falls_through"},
        "eb 00": {"is_jmp"},
        "ff e0": {"is_jmp", "is_indirect_jmp"},
        "e8 00 00 00 00": {"is_call", "falls_through"},
        "ff 10": {"is_call", "is_indirect_call", "falls_through"},
        "ff 18": {"falls_through"},  # callf is no near call
        "c3": {"is_ret"},
        "c2 08 00": {"is_ret"},
        "0f e8 c1": {"falls_through"},  # psubsb: only the second byte is that of call
    }
    assert {text: {flag for flag in flags if getattr(insn(text), flag)} for text in expected} == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not end within"),
        ("48", "does not end within"),
        ("e8 00 00 00", "does not end within"),
        ("06", "not an instruction"),
        ("0f 04", "not an instruction"),
        ("66 " * 15 + "90", "longer than 15"),
        ("66 e8 00 00 00 00", "its length depends on the processor"),
        ("66 0f 84 00 00 00 00", "its length depends on the processor"),
        ("f0 48 83 c0 01", "the disassembler does not know it"),  # lock on a register
        ("48 c5 f8 77", "in front of a VEX"),
    ],
)
def test_refuses_what_is_no_instruction_and_says_why(text: str, why: str) -> None:
    code = bytes.fromhex(text)
    with pytest.raises(DecodeError, match=why) as caught:
        decode(code, ADDR)
    assert caught.value.addr == ADDR
    assert f"{ADDR:#x}" in str(caught.value)


FUNCTION = bytes.fromhex("f30f1efa 0f1f440000 55 4889e5 488b0510000000 75f0 e8fbffffff 5d c3")


def test_boundaries_of_a_function() -> None:
    starts = [ADDR + o for o in (0, 4, 9, 10, 13, 20, 22, 27, 28)]
    assert list(boundaries(FUNCTION, ADDR)) == starts
    assert [i.addr for i in iter_insns(FUNCTION, ADDR)] == starts
    assert b"".join(i.raw for i in iter_insns(FUNCTION, ADDR)) == FUNCTION


def test_boundaries_stop_with_an_error_at_what_is_no_instruction() -> None:
    walk = boundaries(b"\x90\x06\x90", ADDR)
    assert next(walk) == ADDR
    assert next(walk) == ADDR + 1
    with pytest.raises(DecodeError, match=f"{ADDR + 1:#x}"):
        next(walk)


def capstone_view(raw: bytes) -> tuple[int, int, int] | None:
    """Length, ModRM offset and immediate offset in the opinion of capstone's detail mode."""
    machine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    machine.detail = True
    found = next(machine.disasm(raw, ADDR, 1), None)
    return found and (found.size, found.encoding.modrm_offset, found.encoding.imm_offset)


PREFIX = st.lists(st.sampled_from(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\x40\x41\x48\x4c"), max_size=3).map(bytes)
OPCODE = st.one_of(
    st.integers(0, 255).map(lambda b: bytes((b,))),
    st.integers(0, 255).map(lambda b: bytes((0x0F, b))),
)
# By map and opcode, where capstone 5 is of another opinion: AMD's extrq in the place of a prefixed vmread; ud1 and ud0,
# which it takes without ModRM; ret imm16, which it gives an imm32 after 66 and REX.W; the last byte of 3DNow, which is
# no immediate to it.
DISPUTED = {(1, 0x78), (1, 0xB9), (1, 0xFF), (0, 0xC2), (1, 0x0F)}


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(prefix=PREFIX, opcode=OPCODE, rest=st.binary(min_size=14, max_size=14))
def test_agrees_with_capstone_wherever_both_know_the_instruction(prefix: bytes, opcode: bytes, rest: bytes) -> None:
    raw = (prefix + opcode + rest)[:15]
    try:
        encoding = parse(raw)
    except EncodingError:
        return
    theirs = capstone_view(raw)
    if theirs is None or (encoding.map, encoding.opcode) in DISPUTED:
        return
    if encoding.map == 0 and encoding.opcode in (0xA0, 0xA1, 0xA2, 0xA3, 0xC8):
        # The address in a mov is no immediate to capstone, and of those of enter it names the second.
        theirs = (*theirs[:2], encoding.imm_offset)
    modrm_offset = encoding.opcode_offset + 1 if encoding.modrm is not None else 0
    assert (encoding.length, modrm_offset, encoding.imm_offset) == theirs, raw.hex(" ")
