"""Bytes and text of eBPF instructions. The bytes are laid out by hand from the figures of RFC 9669."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.bpf.insn import LD_IMM64, BpfEncodingError, BpfInsn, decode, encode, invalid, text

# opcode, registers (source in the upper half), offset, immediate
KNOWN = [
    ("07 01 0000 05000000", BpfInsn(0x07, 1, imm=5), "r1 += 5"),
    ("0f 21 0000 00000000", BpfInsn(0x0F, 1, 2), "r1 += r2"),
    ("0c 21 0000 00000000", BpfInsn(0x0C, 1, 2), "w1 += w2"),
    ("17 09 0000 ffffffff", BpfInsn(0x17, 9, imm=-1), "r9 -= -1"),
    ("3f 21 0000 00000000", BpfInsn(0x3F, 1, 2), "r1 /= r2"),
    ("3f 21 0100 00000000", BpfInsn(0x3F, 1, 2, 1), "r1 s/= r2"),
    ("94 01 0100 03000000", BpfInsn(0x94, 1, 0, 1, 3), "w1 s%= 3"),
    ("87 03 0000 00000000", BpfInsn(0x87, 3), "r3 = -r3"),
    ("c7 03 0000 04000000", BpfInsn(0xC7, 3, imm=4), "r3 s>>= 4"),
    ("bf a2 0000 00000000", BpfInsn(0xBF, 2, 10), "r2 = r10"),
    ("bf 12 2000 00000000", BpfInsn(0xBF, 2, 1, 32), "r2 = (s32)r1"),
    ("bc 12 0800 00000000", BpfInsn(0xBC, 2, 1, 8), "w2 = (s8)w1"),
    ("d4 01 0000 10000000", BpfInsn(0xD4, 1, imm=16), "r1 = le16 r1"),
    ("dc 01 0000 40000000", BpfInsn(0xDC, 1, imm=64), "r1 = be64 r1"),
    ("d7 01 0000 20000000", BpfInsn(0xD7, 1, imm=32), "r1 = bswap32 r1"),
    ("05 00 feff 00000000", BpfInsn(0x05, off=-2), "goto pc-2"),
    ("06 00 0000 00000100", BpfInsn(0x06, imm=0x10000), "gotol pc+65536"),
    ("15 01 0300 05000000", BpfInsn(0x15, 1, off=3, imm=5), "if r1 == 0x5 goto pc+3"),
    ("6e 21 0300 00000000", BpfInsn(0x6E, 1, 2, 3), "if w1 s> w2 goto pc+3"),
    ("45 01 0100 08000000", BpfInsn(0x45, 1, off=1, imm=8), "if r1 & 0x8 goto pc+1"),
    ("85 00 0000 05000000", BpfInsn(0x85, imm=5), "call #5"),
    ("95 00 0000 00000000", BpfInsn(0x95), "exit"),
    ("79 12 7000 00000000", BpfInsn(0x79, 2, 1, 0x70), "r2 = *(u64 *)(r1 +112)"),
    ("91 12 ffff 00000000", BpfInsn(0x91, 2, 1, -1), "r2 = *(s8 *)(r1 -1)"),
    ("62 0a fcff 07000000", BpfInsn(0x62, 10, off=-4, imm=7), "*(u32 *)(r10 -4) = 7"),
    ("6b 1a feff 00000000", BpfInsn(0x6B, 10, 1, -2), "*(u16 *)(r10 -2) = r1"),
    ("db 21 0000 00000000", BpfInsn(0xDB, 1, 2), "lock *(u64 *)(r1 +0) += r2"),
    ("c3 21 0400 a1000000", BpfInsn(0xC3, 1, 2, 4, 0xA1), "r2 = atomic_fetch_xor((u32 *)(r1 +4), r2)"),
    ("db 21 0000 e1000000", BpfInsn(0xDB, 1, 2, 0, 0xE1), "r2 = atomic64_xchg((u64 *)(r1 +0), r2)"),
    ("c3 21 0000 f1000000", BpfInsn(0xC3, 1, 2, 0, 0xF1), "r0 = atomic_cmpxchg((u32 *)(r1 +0), r0, r2)"),
    ("18 01 0000 88776655 00 00 0000 44332211", BpfInsn(0x18, 1, imm=0x1122334455667788), "r1 = 0x1122334455667788"),
    ("18 21 0000 03000000 00 00 0000 08000000", BpfInsn(0x18, 1, 2, imm=0x800000003), "r1 = region[3]+8"),
]


@pytest.mark.parametrize(("code", "insn", "notation"), KNOWN, ids=[k[2] for k in KNOWN])
def test_bytes_fields_and_text(code: str, insn: BpfInsn, notation: str) -> None:
    assert decode(bytes.fromhex(code)) == (insn,)
    assert encode([insn]) == bytes.fromhex(code)
    assert text(insn) == notation


@pytest.mark.parametrize(
    ("insn", "reason"),
    [
        (BpfInsn(0x100), "opcode 0x100 is not a byte"),
        (BpfInsn(0xBF, 11), "there are only the registers r0 to r10"),
        (BpfInsn(0x05, off=0x8000), "offset 32768 does not fit 16 bits"),
        (BpfInsn(0xB7, imm=1 << 31), "immediate 2147483648 does not fit 32 bits"),
        (BpfInsn(LD_IMM64, imm=-1), "immediate -1 does not fit 64 bits"),
        (BpfInsn(LD_IMM64, src=1), "a 64-bit load of kind 1 is not known here"),
        (BpfInsn(LD_IMM64, off=1), "the offset field must be zero here"),
        (BpfInsn(0xE7), "opcode 0xe7 is not known"),
        (BpfInsn(0x8F), "opcode 0x8f is not known"),
        (BpfInsn(0xDF, imm=16), "opcode 0xdf is not known"),
        (BpfInsn(0xD4, imm=8), "there is no byte swap of 8 bits"),
        (BpfInsn(0x0F, imm=1), "the immediate field must be zero here"),
        (BpfInsn(0x07, src=1), "the source field must be zero here"),
        (BpfInsn(0x07, off=1), "the offset field must be zero here"),
        (BpfInsn(0x3F, off=2), "the offset field must be zero here"),
        (BpfInsn(0xBC, off=32), "there is no sign extension of 32 bits here"),
        (BpfInsn(0xB7, off=8), "the offset field must be zero here"),
        (BpfInsn(0xE5), "opcode 0xe5 is not known"),
        (BpfInsn(0x0D), "opcode 0x0d is not known"),
        (BpfInsn(0x06, off=1), "the offset field must be zero here"),
        (BpfInsn(0x86), "opcode 0x86 is not known"),
        (BpfInsn(0x96), "opcode 0x96 is not known"),
        (BpfInsn(0x85, src=1), "only helpers can be called, by their number"),
        (BpfInsn(0x95, dst=1), "the destination field must be zero here"),
        (BpfInsn(0x99), "opcode 0x99 is not known"),
        (BpfInsn(0x20), "opcode 0x20 is not known"),
        (BpfInsn(0xCB), "an atomic operation has 32 or 64 bits"),
        (BpfInsn(0xDB, imm=0xE0), "atomic operation 0xe0 is not known"),
    ],
    ids=str,
)
def test_what_the_rfc_gives_no_meaning_to_is_refused(insn: BpfInsn, reason: str) -> None:
    assert invalid(insn) == reason
    with pytest.raises(BpfEncodingError) as caught:
        encode([BpfInsn(0x95), insn])
    assert (caught.value.index, caught.value.reason) == (1, reason)


@pytest.mark.parametrize("code", ["95 00 0000 000000", "18 01 0000 00000000"])
def test_cut_short(code: str) -> None:
    with pytest.raises(BpfEncodingError, match=r"^eBPF instruction 0: is cut short$"):
        decode(bytes.fromhex(code))


def test_reserved_fields_of_a_second_half() -> None:
    with pytest.raises(
        BpfEncodingError, match=r"^eBPF instruction 1: reserved fields of its second half are not zero$"
    ):
        decode(bytes.fromhex("95 00 0000 00000000 18 01 0000 00000000 00 01 0000 00000000"))


@given(st.data())
def test_what_decodes_encodes_to_the_same_bytes(data: st.DataObject) -> None:
    # Small numbers, so that many of them mean something; the opcodes and fields that do not are refused.
    op = data.draw(st.integers(0, 0xFF))
    registers = data.draw(st.sampled_from((0x00, 0x01, 0x20, 0x21, 0xA9, 0x9A)))
    off = data.draw(st.sampled_from((0, 1, 8, 16, 32)))
    imm = data.draw(st.sampled_from((0, 1, 16, 32, 64, 0xF1)))
    code = bytes((op, registers, off, 0, imm, 0, 0, 0)) + (bytes(8) if op == LD_IMM64 else b"")
    insn = BpfInsn(op, registers & 0x0F, registers >> 4, off, imm)
    if invalid(insn) is None:
        assert decode(code) == (insn,)
        assert encode([insn]) == code
    else:
        with pytest.raises(BpfEncodingError):
            decode(code)


def test_every_opcode_that_is_known() -> None:
    # Counted from the tables of RFC 9669: 32- and 64-bit arithmetic (12 operations of two operands, each with register
    # and immediate; negation; byte swaps: le and be, bswap), jumps (11 comparisons likewise; ja twice, call, exit),
    # loads (4 sizes, 3 of them sign-extending), stores (4 + 4), atomics (2 sizes), the 64-bit load.
    def known(op: int) -> bool:
        return any(invalid(BpfInsn(op, imm=imm)) is None for imm in (0, 16))

    assert sum(known(op) for op in range(256)) == 2 * (12 * 2 + 1) + 3 + 2 * 11 * 2 + 4 + 4 + 3 + 8 + 2 + 1
