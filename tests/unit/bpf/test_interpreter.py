"""What instructions mean: results worked out by hand from the text of RFC 9669, sections 4 and 5."""

from __future__ import annotations

import pytest

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R10, Builder, Label
from gdb_kprobe.bpf.insn import AluOp, BpfInsn, InsnClass, JmpOp, Mode, Program, Size
from gdb_kprobe.bpf.interpreter import BpfRunError, Machine

A = 0x1122_3344_5566_7788
HIGH = 0x8000_0000_0000_0000
ONES = 0xFFFF_FFFF_FFFF_FFFF

# op, bits, destination, operand, result
ALU = [
    (AluOp.ADD, 64, ONES, 1, 0),
    (AluOp.ADD, 64, A, ONES, A - 1),
    (AluOp.ADD, 32, A, 0xFFFF_FFFF, 0x5566_7787),
    (AluOp.SUB, 64, 0, 1, ONES),
    (AluOp.SUB, 32, A, 0x5566_7789, 0xFFFF_FFFF),
    (AluOp.MUL, 64, A, 0x100, 0x2233_4455_6677_8800),
    (AluOp.MUL, 64, ONES, ONES, 1),
    (AluOp.MUL, 32, 0x1_0001_0000, 0x1_0000, 0),
    (AluOp.DIV, 64, ONES, 2, 0x7FFF_FFFF_FFFF_FFFF),
    (AluOp.DIV, 64, A, 0, 0),
    (AluOp.DIV, 32, 0x5_0000_000A, 0x7_0000_0003, 3),
    (AluOp.DIV, 32, A, HIGH, 0),
    (AluOp.MOD, 64, ONES, 10, 5),
    (AluOp.MOD, 64, A, 0, A),
    (AluOp.MOD, 32, 0x5_0000_000A, 0x7_0000_0003, 1),
    (AluOp.MOD, 32, A, HIGH, 0x5566_7788),
    (AluOp.OR, 64, A, HIGH, 0x9122_3344_5566_7788),
    (AluOp.OR, 32, A, 0xFF, 0x5566_77FF),
    (AluOp.AND, 64, A, 0xFFFF_0000_0000_00FF, 0x1122_0000_0000_0088),
    (AluOp.AND, 32, A, ONES, 0x5566_7788),
    (AluOp.XOR, 64, A, ONES, 0xEEDD_CCBB_AA99_8877),
    (AluOp.XOR, 32, A, ONES, 0xAA99_8877),
    (AluOp.LSH, 64, A, 8, 0x2233_4455_6677_8800),
    (AluOp.LSH, 64, 1, 64 + 63, HIGH),
    (AluOp.LSH, 32, A, 8, 0x6677_8800),
    (AluOp.LSH, 32, 1, 32 + 31, 0x8000_0000),
    (AluOp.RSH, 64, HIGH, 63, 1),
    (AluOp.RSH, 64, HIGH, 64, HIGH),
    (AluOp.RSH, 32, 0xF_8000_0000, 31, 1),
    (AluOp.ARSH, 64, HIGH, 63, ONES),
    (AluOp.ARSH, 64, A, 4, 0x0112_2334_4556_6778),
    (AluOp.ARSH, 32, 0x8000_0000, 31, 0xFFFF_FFFF),
    (AluOp.ARSH, 32, A, 32 + 4, 0x0556_6778),
    (AluOp.MOV, 64, 0, A, A),
    (AluOp.MOV, 32, A, HIGH | 5, 5),
]

SIGNED = [
    (AluOp.DIV, 64, -7 & ONES, 2, -3 & ONES),
    (AluOp.DIV, 64, 7, -2 & ONES, -3 & ONES),
    (AluOp.DIV, 64, HIGH, ONES, HIGH),
    (AluOp.DIV, 64, A, 0, 0),
    (AluOp.DIV, 32, 0xFFFF_FFF9, 2, 0xFFFF_FFFD),
    (AluOp.DIV, 32, 0x8000_0000, 0xFFFF_FFFF, 0x8000_0000),
    (AluOp.MOD, 64, -7 & ONES, 2, ONES),
    (AluOp.MOD, 64, 7, -2 & ONES, 1),
    (AluOp.MOD, 64, HIGH, ONES, 0),
    (AluOp.MOD, 64, A, 0, A),
    (AluOp.MOD, 32, 0xFFFF_FFF9, 2, 0xFFFF_FFFF),
    (AluOp.MOD, 32, 0x8000_0000, 0xFFFF_FFFF, 0),
    (AluOp.MOD, 32, A, 0, 0x5566_7788),
]


def run(out: Builder, machine: Machine | None = None) -> int:
    out.exit()
    return (machine or Machine()).run(out.finish())


@pytest.mark.parametrize(("op", "bits", "dst", "operand", "result"), ALU)
def test_alu(op: AluOp, bits: int, dst: int, operand: int, result: int) -> None:
    out = Builder()
    out.load_number(R0, dst)
    out.load_number(R3, operand)
    out.alu(op, R0, R3, bits=bits)
    assert run(out) == result


@pytest.mark.parametrize(("op", "bits", "dst", "operand", "result"), SIGNED)
def test_signed_division(op: AluOp, bits: int, dst: int, operand: int, result: int) -> None:
    out = Builder()
    out.load_number(R0, dst)
    out.load_number(R3, operand)
    out.alu(op, R0, R3, bits=bits, signed=True)
    assert run(out) == result


@pytest.mark.parametrize(
    ("op", "bits", "dst", "immediate", "result"),
    [
        (AluOp.ADD, 64, 1, -2, ONES),
        (AluOp.ADD, 32, 1, -2, 0xFFFF_FFFF),
        (AluOp.AND, 64, A, -0x100, 0x1122_3344_5566_7700),
        (AluOp.MOV, 64, 0, -1, ONES),
        (AluOp.MOV, 32, 0, -1, 0xFFFF_FFFF),
        (AluOp.DIV, 64, ONES, -1, 1),
        (AluOp.LSH, 64, 1, 0x7F, HIGH),
    ],
)
def test_immediates_are_extended_by_sign(op: AluOp, bits: int, dst: int, immediate: int, result: int) -> None:
    out = Builder()
    out.load_number(R0, dst)
    out.alu(op, R0, immediate, bits=bits)
    assert run(out) == result


@pytest.mark.parametrize(("bits", "result"), [(64, 0xEEDD_CCBB_AA99_8878), (32, 0xAA99_8878)])
def test_negation(bits: int, result: int) -> None:
    out = Builder()
    out.load_number(R0, A)
    out.neg(R0, bits=bits)
    assert run(out) == result


@pytest.mark.parametrize(
    ("width", "bits", "value", "result"),
    [
        (8, 64, A, 0xFFFF_FFFF_FFFF_FF88),
        (16, 64, A, 0x7788),
        (32, 64, 0x1_8000_0000, 0xFFFF_FFFF_8000_0000),
        (8, 32, A, 0xFFFF_FF88),
        (16, 32, 0x18000, 0xFFFF_8000),
    ],
)
def test_sign_extension(width: int, bits: int, value: int, result: int) -> None:
    out = Builder()
    out.load_number(R3, value)
    out.sign_extend(R0, R3, width, bits=bits)
    assert run(out) == result


@pytest.mark.parametrize(
    ("kind", "width", "result"),
    [
        ("to_little", 16, 0x7788),
        ("to_little", 32, 0x5566_7788),
        ("to_little", 64, A),
        ("to_big", 16, 0x8877),
        ("to_big", 32, 0x8877_6655),
        ("to_big", 64, 0x8877_6655_4433_2211),
        ("bswap", 16, 0x8877),
        ("bswap", 32, 0x8877_6655),
        ("bswap", 64, 0x8877_6655_4433_2211),
    ],
)
def test_byte_swaps(kind: str, width: int, result: int) -> None:
    out = Builder()
    out.load_number(R0, A)
    getattr(out, kind)(R0, width)
    assert run(out) == result


# op, bits, left, right: taken; each is tried with the immediate's sign extension in mind.
JUMPS = [
    (JmpOp.JEQ, 64, 5, 5, True),
    (JmpOp.JEQ, 64, 0x1_0000_0005, 5, False),
    (JmpOp.JEQ, 32, 0x1_0000_0005, 5, True),
    (JmpOp.JNE, 64, ONES, -1, False),
    (JmpOp.JNE, 32, 0xFFFF_FFFF, -1, False),
    (JmpOp.JNE, 64, 0xFFFF_FFFF, -1, True),
    (JmpOp.JGT, 64, 5, 5, False),
    (JmpOp.JGT, 64, ONES, 5, True),
    (JmpOp.JGT, 32, HIGH, 0, False),
    (JmpOp.JGE, 64, 5, 5, True),
    (JmpOp.JGE, 64, 4, -1, False),
    (JmpOp.JLT, 64, 4, -1, True),
    (JmpOp.JLT, 64, 5, 5, False),
    (JmpOp.JLE, 64, 5, 5, True),
    (JmpOp.JLE, 32, 0x1_0000_0000, 0, True),
    (JmpOp.JSGT, 64, 0, -1, True),
    (JmpOp.JSGT, 64, HIGH, 0, False),
    (JmpOp.JSGE, 64, ONES, -1, True),
    (JmpOp.JSGE, 32, 0x8000_0000, 0, False),
    (JmpOp.JSLT, 64, ONES, 0, True),
    (JmpOp.JSLT, 64, 0xFFFF_FFFF, 0, False),
    (JmpOp.JSLT, 32, 0xFFFF_FFFF, 0, True),
    (JmpOp.JSLE, 64, 0, 0, True),
    (JmpOp.JSLE, 64, 1, 0, False),
    (JmpOp.JSET, 64, 6, 4, True),
    (JmpOp.JSET, 64, 6, 1, False),
    (JmpOp.JSET, 64, HIGH, -0x8000_0000, True),
    (JmpOp.JSET, 32, HIGH, -1, False),
]


@pytest.mark.parametrize(("op", "bits", "left", "right", "taken"), JUMPS)
@pytest.mark.parametrize("by_register", [False, True])
def test_conditional_jumps(op: JmpOp, bits: int, left: int, right: int, taken: bool, by_register: bool) -> None:
    out, there = Builder(), Label()
    out.mov(R0, 1)
    out.load_number(R2, left)
    out.mov(R3, right)
    out.jump_if(op, R2, R3 if by_register else right, there, bits=bits)
    out.mov(R0, 0)
    out.bind(there)
    assert run(out) == int(taken)


def test_a_jump_counts_both_halves_of_a_wide_load() -> None:
    out, there = Builder(), Label()
    out.mov(R0, 1)
    out.jump(there)
    out.load_number(R0, A)
    out.bind(there)
    assert run(out) == 1


def test_a_long_jump() -> None:
    program: Program = (BpfInsn(0xB7, 0, imm=4), BpfInsn(0x06, imm=1), BpfInsn(0xB7, 0, imm=9), BpfInsn(0x95))
    assert Machine().run(program) == 4


@pytest.mark.parametrize(
    ("size", "signed", "result"),
    [
        (Size.B, False, 0x88),
        (Size.H, False, 0x9988),
        (Size.W, False, 0xBBAA_9988),
        (Size.DW, False, 0xFFEE_DDCC_BBAA_9988),
        (Size.B, True, 0xFFFF_FFFF_FFFF_FF88),
        (Size.H, True, 0xFFFF_FFFF_FFFF_9988),
        (Size.W, True, 0xFFFF_FFFF_BBAA_9988),
    ],
)
def test_loads(size: Size, signed: bool, result: int) -> None:
    out = Builder()
    out.load(R0, R1, 8, size, signed=signed)
    assert run(out, Machine(context=bytes(range(0, 0x88, 0x11)) + bytes.fromhex("8899aabbccddeeff"))) == result


@pytest.mark.parametrize(("size", "expected"), [(Size.B, "88"), (Size.H, "8877"), (Size.W, "88776655")])
def test_stores_write_the_low_bytes(size: Size, expected: str) -> None:
    memory = bytearray(16)
    out = Builder()
    out.load_region(R2, 4, 5)
    out.load_number(R3, A)
    out.store(R2, -2, R3, size)
    run(out, Machine(regions={4: memory}))
    assert memory.hex() == "000000" + expected + "00" * (13 - size.width)


def test_a_stored_immediate_is_extended_by_sign() -> None:
    out = Builder()
    out.store(R10, -8, -2, Size.DW)
    out.load(R0, R10, -8, Size.DW)
    assert run(out) == ONES - 1


@pytest.mark.parametrize(
    ("op", "width", "old", "source", "new"),
    [
        (AluOp.ADD, 64, ONES, 2, 1),
        (AluOp.ADD, 32, 0x1_FFFF_FFFF, 2, 0x1_0000_0001),
        (AluOp.OR, 64, A, HIGH, 0x9122_3344_5566_7788),
        (AluOp.AND, 32, A, HIGH, 0x1122_3344_0000_0000),
        (AluOp.XOR, 64, A, A, 0),
    ],
)
@pytest.mark.parametrize("fetch", [False, True])
def test_atomic_operations(op: AluOp, width: int, old: int, source: int, new: int, fetch: bool) -> None:
    memory = bytearray(old.to_bytes(8, "little"))
    out = Builder()
    out.load_region(R2, 0)
    out.load_number(R0, source)
    out.atomic(op, R2, 0, R0, Size.DW if width == 64 else Size.W, fetch=fetch)
    assert run(out, Machine(regions={0: memory})) == (old & (1 << width) - 1 if fetch else source)
    assert int.from_bytes(memory, "little") == new


@pytest.mark.parametrize(
    ("width", "compared", "memory_after", "result"),
    [
        (64, A, 9, A),
        (64, A + 1, A, A),
        (32, 0x5566_7788, 0x1122_3344_0000_0009, 0x5566_7788),
        (32, HIGH | 0x5566_7788, 0x1122_3344_0000_0009, 0x5566_7788),
        (32, 1, A, 0x5566_7788),
    ],
)
def test_compare_and_exchange(width: int, compared: int, memory_after: int, result: int) -> None:
    memory = bytearray(A.to_bytes(8, "little"))
    out = Builder()
    out.load_region(R2, 0)
    out.load_number(R0, compared)
    out.mov(R3, 9)
    out.cmpxchg(R2, 0, R3, Size.DW if width == 64 else Size.W)
    assert run(out, Machine(regions={0: memory})) == result
    assert int.from_bytes(memory, "little") == memory_after


def test_exchange() -> None:
    memory = bytearray(A.to_bytes(8, "little"))
    out = Builder()
    out.load_region(R2, 0)
    out.mov(R0, -1)
    out.xchg(R2, 4, R0, Size.W)
    assert run(out, Machine(regions={0: memory})) == 0x1122_3344
    assert int.from_bytes(memory, "little") == 0xFFFF_FFFF_5566_7788


def test_a_helper_gets_the_arguments_and_takes_the_registers() -> None:
    out = Builder()
    for register, value in zip((R1, R2, R3), (7, 8, 9), strict=True):
        out.mov(register, value)
    out.call(3)
    assert run(out, Machine(helpers={3: lambda a, b, c, d, e: a * 100 + b * 10 + c})) == 789
    out = Builder()
    out.call(3)
    out.mov(R0, R1)
    with pytest.raises(BpfRunError, match="r1 was never written"):
        run(out, Machine(helpers={3: lambda a, b, c, d, e: 0}))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ((BpfInsn(0xB7),), "no eBPF instruction begins at 1"),
        ((BpfInsn(0x05, off=-1),), "no end within 100 eBPF instructions"),
        ((BpfInsn(0xBF, 0, 3),), "r3 was never written"),
        ((BpfInsn(InsnClass.LDX | Mode.MEM | Size.DW, 0, 10, 0),), "accesses 8 bytes at 0x200000200"),
        ((BpfInsn(0x85, imm=4),), "there is no eBPF helper 4"),
    ],
)
def test_what_a_checked_program_does_not_do(program: Program, message: str) -> None:
    with pytest.raises(BpfRunError, match=message):
        Machine().run(program, limit=100)
