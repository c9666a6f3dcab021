"""Compiled programs against interpreted ones, in every kind of surroundings; and what the code looks like."""

from __future__ import annotations

import itertools
import random

import capstone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Builder, Label, Reg
from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Program, Size
from gdb_kprobe.bpf.jit import emit, prepare
from gdb_kprobe.bpf.verifier import CheckedProgram, Helper, check
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler
from gdb_kprobe.x86.emit import Emitter, Gp, Op
from tests.proof.bpf import (
    IP,
    OUTPUT,
    OUTPUT_SIZE,
    SURROUNDINGS,
    WORK,
    WORK_SIZE,
    compare,
    random_program,
)
from tests.proof.emulator import Emulator, random_state

EMULATOR = Emulator()
REGIONS = {OUTPUT: OUTPUT_SIZE, WORK: WORK_SIZE}
NUMBERS = (R0, R2, R3, R4, R5, R6, R7, R8, R9)
EDGES = (0, 1, 5, 31, 33, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1, 0x1122_3344_5566_7788)


def require_equal(program: Program, seed: int) -> None:
    """The program does the same compiled as interpreted, from one state in each kind of surroundings."""
    rng = random.Random(seed)
    checked = check(program, REGIONS)
    for surroundings in SURROUNDINGS:
        regions = {OUTPUT: bytes(OUTPUT_SIZE), WORK: rng.randbytes(WORK_SIZE)}
        trial = compare(checked, surroundings, EMULATOR, random_state(rng), regions)
        assert trial.differences == [], surroundings.name


@given(st.integers(0, 1 << 64), st.integers(1, 60))
@settings(deadline=None, max_examples=500)
def test_random_programs(seed: int, length: int) -> None:
    rng = random.Random(seed)
    require_equal(random_program(rng, length), seed)


class Operands:
    """Numbers that are constants to the checker, or (from memory) that nobody knows."""

    def __init__(self, rng: random.Random, *, known: bool) -> None:
        self.out = Builder()
        self.rng = rng
        self.known = known
        self.stored = 0

    def number(self, register: Reg, value: int) -> None:
        self.out.load_number(register, value)
        if not self.known:
            self.stored += 8
            self.out.store(R10, -self.stored, register, Size.DW)
            self.out.load(register, R10, -self.stored, Size.DW)

    def finish(self) -> Program:
        self.out.load_region(R1, OUTPUT)
        for at, register in enumerate(NUMBERS):
            self.out.store(R1, 8 * at, register, Size.DW)
        self.out.exit()
        return self.out.finish()


BINARY = [op for op in AluOp if op not in (AluOp.NEG, AluOp.END)]
UNSIGNED: list[tuple[AluOp, bool]] = [(op, False) for op in BINARY]
SIGNED: list[tuple[AluOp, bool]] = [(op, True) for op in (AluOp.DIV, AluOp.MOD)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("op", "signed"), UNSIGNED + SIGNED)
def test_arithmetic_of_every_pair_of_registers(op: AluOp, signed: bool, bits: int, known: bool) -> None:
    for seed, (dst, src) in enumerate(itertools.product((R0, R3, R4, R5, R8), repeat=2)):
        rng = random.Random(seed)
        operands = Operands(rng, known=known)
        for register in NUMBERS:
            operands.number(register, rng.choice(EDGES))
        operands.out.alu(op, dst, src, bits=bits, signed=signed)
        operands.out.alu(op, src, rng.choice((0, 1, -1, 7, -0x8000_0000)), bits=bits, signed=signed)
        require_equal(operands.finish(), seed)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("op", [op for op in JmpOp if op not in (JmpOp.JA, JmpOp.CALL, JmpOp.EXIT)])
def test_conditional_jumps(op: JmpOp, bits: int, known: bool) -> None:
    for seed, (left, right) in enumerate(itertools.product(EDGES[::2], EDGES)):
        operands = Operands(random.Random(seed), known=known)
        for register in NUMBERS:
            operands.number(register, 0)
        operands.number(R2, left)
        operands.number(R7, right)
        out = operands.out
        for result, operand in ((R3, R7), (R4, (right + 0x8000_0000) % (1 << 32) - 0x8000_0000)):
            there = Label()
            out.jump_if(op, R2, operand, there, bits=bits)
            out.mov(result, 1)
            out.bind(there)
        require_equal(operands.finish(), seed)


@pytest.mark.parametrize("op", [op for op in JmpOp if op not in (JmpOp.JA, JmpOp.CALL, JmpOp.EXIT)])
@pytest.mark.parametrize("from_context", [False, True])
def test_narrow_values_compared_with_constants(op: JmpOp, from_context: bool) -> None:
    """A field, or memory, of any width against constants that it can and cannot hold."""
    constants = (0, 1, 0x40, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, -1, -0x80, -0x8000, -0x8000_0000)
    forms = [(size, signed) for size in Size for signed in (False, True) if not (signed and size is Size.DW)]
    for seed, constant in enumerate(constants):
        for bits, mirrored in itertools.product((32, 64), (False, True)):
            out = Builder()
            out.mov(R8, R1)
            out.load_region(R9, OUTPUT)
            out.load_region(R6, WORK)
            for at, (size, signed) in enumerate(forms):
                there = Label()
                out.mov(R3, 1)
                if from_context:
                    out.load(R2, R8, pt_regs.OFFSETS["rdx"], size, signed=signed)
                else:
                    out.load(R2, R6, 8 * at, size, signed=signed)
                if mirrored:
                    out.mov(R4, constant)
                    out.jump_if(op, R4, R2, there, bits=bits)
                else:
                    out.jump_if(op, R2, constant, there, bits=bits)
                out.mov(R3, 0)
                out.bind(there)
                out.store(R9, 8 * at, R3, Size.DW)
            out.exit()
            checked = check(out.finish(), REGIONS)
            rng = random.Random(seed)
            for surroundings in SURROUNDINGS:
                state = random_state(rng)
                near = (constant + rng.choice((-1, 0, 0, 1))) % (1 << 64)
                state.registers["rdx"] = near
                regions = {OUTPUT: bytes(OUTPUT_SIZE), WORK: near.to_bytes(8, "little") * (WORK_SIZE // 8)}
                assert compare(checked, surroundings, EMULATOR, state, regions).differences == []


@pytest.mark.parametrize("jumps", [False, True])
def test_a_load_is_no_operand_of_an_instruction_that_others_reach(jumps: bool) -> None:
    out, there, end = Builder(), Label(), Label()
    out.load_region(R9, OUTPUT)
    out.load_region(R6, WORK)
    out.load(R2, R6, 0, Size.DW)
    out.load(R3, R6, 8, Size.B)
    out.jump_if(JmpOp.JEQ if jumps else JmpOp.JNE, R3, 7, there)
    out.load(R2, R6, 16, Size.DW)
    out.bind(there)
    out.jump_if(JmpOp.JEQ, R2, 5, end)
    out.store(R9, 0, 1, Size.DW)
    out.bind(end)
    out.exit()
    checked = check(out.finish(), REGIONS)
    for words in ((5, 7, 6), (6, 7, 5)):
        work = b"".join(word.to_bytes(8, "little") for word in words).ljust(WORK_SIZE, b"\0")
        for surroundings in SURROUNDINGS:
            regions = {OUTPUT: bytes(OUTPUT_SIZE), WORK: work}
            trial = compare(checked, surroundings, EMULATOR, random_state(random.Random(1)), regions)
            assert trial.differences == []
            assert trial.regions[OUTPUT][0] == (words[0 if jumps else 2] != 5)


@pytest.mark.parametrize("size", [Size.W, Size.DW])
@pytest.mark.parametrize("base", [R10, R1])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", [AluOp.ADD, AluOp.OR, AluOp.AND, AluOp.XOR, "xchg", "cmpxchg"])
def test_atomic_operations(what: AluOp | str, known: bool, base: Reg, size: Size) -> None:
    for seed, (src, fetch, value) in enumerate(itertools.product((R0, R3, R6), (False, True), (1, 5, (1 << 64) - 1))):
        operands = Operands(random.Random(seed), known=known)
        out = operands.out
        for register in NUMBERS:
            operands.number(register, seed)
        operands.number(src, value)
        if base is R1:
            out.load_region(R1, WORK)
        out.store(base, -256 if base is R10 else 8, 5, Size.DW)
        at = -256 if base is R10 else 8
        match what:
            case "xchg":
                out.xchg(base, at, src, size)
            case "cmpxchg":
                if fetch:
                    operands.number(R0, 5 if size is Size.DW else 0xF_0000_0005)
                out.cmpxchg(base, at, src, size)
            case AluOp():
                out.atomic(what, base, at, src, size, fetch=fetch)
        if base is R10:
            out.load(R9, base, at, Size.DW)
        require_equal(operands.finish(), seed)


@pytest.mark.parametrize("name", pt_regs.OFFSETS)
def test_every_field_in_every_width(name: str) -> None:
    out = Builder()
    out.load_region(R9, OUTPUT)
    forms = [(size, signed) for size in Size for signed in (False, True) if not (signed and size is Size.DW)]
    for at, (size, signed) in enumerate(forms):
        out.load(R2, R1, pt_regs.OFFSETS[name], size, signed=signed)
        out.store(R9, 8 * at, R2, Size.DW)
    out.exit()
    require_equal(out.finish(), 1)


# What the code looks like

CODE = VirtAddr(0xFFFF_FFFF_C050_0000)


def listing(checked: CheckedProgram, frame: Frame) -> list[str]:
    asm = Assembler(CODE)
    emit(asm, prepare(checked, frame), dict.fromkeys(checked.regions, CODE), dict.fromkeys(checked.helpers, CODE))
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    return [f"{insn.mnemonic} {insn.op_str}" for insn in disassembler.disasm(asm.finish(), CODE)]


def test_a_counter_is_one_instruction() -> None:
    out = Builder()
    out.load_region(R1, 0, 16)
    out.mov(R2, 1)
    out.atomic(AluOp.ADD, R1, 0, R2, Size.DW)
    out.exit()
    checked = check(out.finish(), {0: 24})
    for frame in (InDetour(IP), InHandler(IP)):
        prepared = prepare(checked, frame)
        assert (prepared.saves, prepared.clobbers, prepared.stack) == ((), frozenset(), 0)
        assert prepared.clobbers_flags
        assert not prepared.reads_flags
        assert listing(checked, frame) == ["lock add qword ptr [rip + 7], 1"]


def test_only_registers_that_are_changed_are_saved() -> None:
    out = Builder()
    out.load(R2, R1, pt_regs.OFFSETS["rdi"], Size.DW)
    out.load(R3, R1, pt_regs.OFFSETS["rsi"], Size.DW)
    out.alu(AluOp.ADD, R2, R3)
    out.load_region(R3, 0)
    out.store(R3, 0, R2, Size.DW)
    out.exit()
    checked = check(out.finish(), {0: 8})
    assert listing(checked, InDetour(IP)) == [
        "push rsi", "mov rsi, rdi", "add rsi, qword ptr [rsp]", "mov qword ptr [rip - 0xf], rsi", "pop rsi",
    ]  # fmt: skip
    assert listing(checked, InDetour(IP, 16, {"rsi": 8})) == [
        "mov rsi, rdi", "add rsi, qword ptr [rsp + 8]", "mov qword ptr [rip - 0xf], rsi",
    ]  # fmt: skip


def test_a_program_without_effect_is_no_code() -> None:
    out, end = Builder(), Label()
    out.load(R2, R1, pt_regs.OFFSETS["rdi"], Size.DW)
    out.alu(AluOp.MUL, R2, R2)
    out.jump(end)
    out.bind(end)
    out.exit()
    checked = check(out.finish())
    assert listing(checked, InDetour(IP)) == []
    assert not prepare(checked, InDetour(IP)).clobbers_flags


def test_the_flags_must_be_saved_if_they_are_read() -> None:
    out = Builder()
    out.load(R2, R1, pt_regs.OFFSETS["eflags"], Size.DW)
    out.load_region(R3, 0)
    out.store(R3, 0, R2, Size.DW)
    out.exit()
    checked = check(out.finish(), {0: 8})
    prepared = prepare(checked, InDetour(IP))
    assert prepared.reads_flags
    assert not prepared.clobbers_flags
    with pytest.raises(AssertionError, match="reads the flags"):
        listing(checked, InDetour(IP))


def test_a_program_is_moved_to_another_probe() -> None:
    def program(name: str) -> CheckedProgram:
        out = Builder()
        out.load(R2, R1, pt_regs.OFFSETS[name], Size.DW)
        out.load_region(R3, 0)
        out.store(R3, 0, R2, Size.DW)
        out.exit()
        return check(out.finish(), {0: 8})

    other = InDetour(VirtAddr(0x1234_5678_9ABC), 8, {"rbx": 0})
    for name, reads_ip in (("rip", True), ("rdi", False)):
        prepared = prepare(program(name), InDetour(IP, 8, {"rbx": 0}))
        assert prepared.reads_ip is reads_ip
        assert prepared.moved(other.ip) == prepare(program(name), other)
    assert listing(program("rip"), other) == [
        "push r11", "movabs r11, 0x123456789abc", "mov qword ptr [rip - 0x13], r11", "pop r11",
    ]  # fmt: skip


@pytest.mark.parametrize("in_handler", [False, True])
def test_calls(in_handler: bool) -> None:
    """The helper adds its first two arguments and spoils all that a C function may."""
    out = Builder()
    out.load(R6, R1, pt_regs.OFFSETS["rdi"], Size.DW)
    out.load(R7, R1, pt_regs.OFFSETS["rsi"], Size.DW)
    out.mov(R8, R1)
    out.alu(AluOp.MUL, R7, 3)
    out.mov(R1, R7)
    out.mov(R2, R6)
    out.call(9)
    out.load_region(R2, 0)
    out.alu(AluOp.ADD, R0, R7)
    out.store(R2, 0, R0, Size.DW)
    out.load(R0, R8, pt_regs.OFFSETS["rdx"], Size.DW)
    out.store(R2, 8, R0, Size.DW)
    out.exit()
    checked = check(out.finish(), {0: 16}, {9: Helper("add", 2)})

    helper_asm = Assembler(VirtAddr(CODE + 0x800))
    helper = Emitter(helper_asm)
    helper.mov(Gp.RAX, Gp.RDI, 8)
    helper.alu(Op.ADD, Gp.RAX, Gp.RSI, 8)
    for register in (Gp.RCX, Gp.RDX, Gp.RSI, Gp.RDI, Gp.R8, Gp.R9, Gp.R10, Gp.R11):
        helper.mov_imm(register, 0xDEAD)
    helper_asm.ret()

    state = random_state(random.Random(4))
    before = dict(state.registers)
    context, data = VirtAddr(0xFFFF_C900_8000_0010), VirtAddr(CODE - 0x1000)
    if in_handler:
        for name in ("rdi", "rsi", "rdx"):
            state.write(context + pt_regs.OFFSETS[name], before[name].to_bytes(8, "little"))
        state.registers["rdi"] = context
    asm = Assembler(CODE)
    emit(asm, prepare(checked, InHandler(IP) if in_handler else InDetour(IP)), {0: data}, {9: VirtAddr(CODE + 0x800)})
    code = asm.finish()
    # The emulator stops at the int3 behind the code.
    whole = code.ljust(0x800, b"\xcc") + helper_asm.finish()
    after = EMULATOR.run(state, {CODE: whole}, CODE, 200)
    assert after.registers["rip"] - CODE - len(code) in (0, 1)
    product = before["rsi"] * 3
    assert int.from_bytes(after.read(data, 8), "little") == (product * 2 + before["rdi"]) % (1 << 64)
    assert int.from_bytes(after.read(data + 8, 8), "little") == before["rdx"]
    kept = {"rdi", "rbx", "rbp", "rsp", "r12", "r13", "r14", "r15"} if in_handler else set(before) - {"rip", "eflags"}
    for name in kept:
        assert after.registers[name] == state.registers[name], name
