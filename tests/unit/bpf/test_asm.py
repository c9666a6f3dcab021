"""Programs put together with the builder are the same as in the notation of the kernel."""

from __future__ import annotations

import pytest

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R10, Builder, Label
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Size, decode, encode, text


def test_every_method() -> None:
    out = Builder()
    out.mov(R2, R1)
    out.mov(R2, -5)
    out.mov(R2, R1, bits=32)
    out.alu(AluOp.ADD, R2, 7)
    out.alu(AluOp.XOR, R2, R3, bits=32)
    out.alu(AluOp.DIV, R2, R3, signed=True)
    out.neg(R2, bits=32)
    out.sign_extend(R2, R3, 16)
    out.sign_extend(R2, R3, 8, bits=32)
    out.to_little(R2, 16)
    out.to_big(R2, 32)
    out.bswap(R2, 64)
    out.load_number(R2, 0xFFFF_FFFF_FFFF_FFFE)
    out.load_number(R2, 0xFFFF_FFFE)
    out.load_region(R2, 3, 8)
    out.load(R0, R1, 112, Size.DW)
    out.load(R0, R1, 112, Size.H, signed=True)
    out.store(R10, -8, R0, Size.W)
    out.store(R10, -8, -1, Size.B)
    out.atomic(AluOp.ADD, R2, 0, R3, Size.DW)
    out.atomic(AluOp.AND, R2, 4, R3, Size.W, fetch=True)
    out.xchg(R2, 0, R3, Size.DW)
    out.cmpxchg(R2, 0, R3, Size.W)
    out.call(9)
    out.exit()
    program = out.finish()
    assert decode(encode(program)) == program
    assert [text(insn) for insn in program] == [
        "r2 = r1",
        "r2 = -5",
        "w2 = w1",
        "r2 += 7",
        "w2 ^= w3",
        "r2 s/= r3",
        "w2 = -w2",
        "r2 = (s16)r3",
        "w2 = (s8)w3",
        "r2 = le16 r2",
        "r2 = be32 r2",
        "r2 = bswap64 r2",
        "r2 = -2",
        "r2 = 0xfffffffe",
        "r2 = region[3]+8",
        "r0 = *(u64 *)(r1 +112)",
        "r0 = *(s16 *)(r1 +112)",
        "*(u32 *)(r10 -8) = r0",
        "*(u8 *)(r10 -8) = -1",
        "lock *(u64 *)(r2 +0) += r3",
        "r3 = atomic_fetch_and((u32 *)(r2 +4), r3)",
        "r3 = atomic64_xchg((u64 *)(r2 +0), r3)",
        "r0 = atomic_cmpxchg((u32 *)(r2 +0), r0, r3)",
        "call #9",
        "exit",
    ]


def test_jumps_count_both_halves_of_a_wide_load() -> None:
    out, far, near = Builder(), Label(), Label()
    out.jump_if(JmpOp.JEQ, R1, 3, far)
    out.jump_if(JmpOp.JSLT, R1, R2, near, bits=32)
    out.load_number(R2, 1 << 40)
    out.bind(near)
    out.jump(far)
    out.bind(far)
    out.exit()
    assert [text(insn) for insn in out.finish()] == [
        "if r1 == 0x3 goto pc+4",
        "if w1 s< w2 goto pc+2",
        "r2 = 0x10000000000",
        "goto pc+0",
        "exit",
    ]


def test_mistakes_of_the_caller() -> None:
    out = Builder()
    out.mov(R2, 1 << 31)
    with pytest.raises(AssertionError, match="instruction 0: immediate 2147483648 does not fit 32 bits"):
        out.finish()
    out, label = Builder(), Label()
    out.jump(label)
    with pytest.raises(AssertionError, match="instruction 0 jumps to was never bound"):
        out.finish()
    out.bind(label)
    with pytest.raises(AssertionError, match="bound twice"):
        out.bind(label)
