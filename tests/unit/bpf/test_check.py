"""What the checker refuses, at which instruction and why; and what it knows of what it accepts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R4, R5, R6, R9, R10, Builder, Label
from gdb_kprobe.bpf.insn import AluOp, BpfInsn, JmpOp, Program, Size
from gdb_kprobe.bpf.interpreter import Machine
from gdb_kprobe.bpf.value import (
    ContextPointer,
    Field,
    Number,
    RegionPointer,
    Scalar,
    StackPointer,
    Unreadable,
    Value,
)
from gdb_kprobe.bpf.verifier import MOST_INSNS, BpfRefusedError, Helper, check
from gdb_kprobe.linux import pt_regs
from tests.proof.bpf import OUTPUT, OUTPUT_SIZE, WORK, WORK_SIZE, context_of, packed, random_program
from tests.proof.emulator import random_state

REGIONS = {0: 24, 7: 4}
HELPERS = {4: Helper("both", 2), 5: Helper("none", 0)}
DI = pt_regs.OFFSETS["rdi"]
EXIT = BpfInsn(0x95)


def built(write: Callable[[Builder], object]) -> Program:
    out = Builder()
    write(out)
    out.exit()
    return out.finish()


def refusal(program: Program) -> tuple[int, str]:
    with pytest.raises(BpfRefusedError) as caught:
        check(program, REGIONS, HELPERS)
    assert str(caught.value).startswith(f"eBPF instruction {caught.value.index}")
    assert str(caught.value).endswith(caught.value.reason)
    return caught.value.index, caught.value.reason


@pytest.mark.parametrize(
    ("program", "index", "reason"),
    [
        ((), 0, "the program is empty"),
        ((EXIT,) * (MOST_INSNS + 1), 0, "the program has more than 65536 instructions"),
        ((BpfInsn(0xE7), EXIT), 0, "opcode 0xe7 is not known"),
        ((BpfInsn(0xB7),), 0, "the program goes on after its last instruction: exit is missing"),
        ((BpfInsn(0xB7), BpfInsn(0x15, off=0)), 1, "the program goes on after its last instruction: exit is missing"),
        ((BpfInsn(0xB7), BpfInsn(0x05, off=-1), EXIT), 1, "jumps go forward only, so that the program ends"),
        ((BpfInsn(0xB7), BpfInsn(0x06, imm=-2), EXIT), 1, "jumps go forward only, so that the program ends"),
        ((BpfInsn(0x05, off=1), EXIT), 0, "jumps out of the program"),
        ((BpfInsn(0xB7), BpfInsn(0x15, off=5), EXIT), 1, "jumps out of the program"),
        ((BpfInsn(0x05, off=1), BpfInsn(0x18), EXIT), 0, "jumps into the second half of an instruction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_program_ends(program: Program, index: int, reason: str) -> None:
    assert refusal(program) == (index, reason)


@pytest.mark.parametrize(
    ("write", "index", "reason"),
    [
        (lambda b: b.mov(R2, R3), 0, "r3 was never written"),
        (lambda b: b.alu(AluOp.ADD, R2, 1), 0, "r2 was never written"),
        (lambda b: b.neg(R2), 0, "r2 was never written"),
        (lambda b: b.bswap(R2, 16), 0, "r2 was never written"),
        (lambda b: b.jump_if(JmpOp.JEQ, R2, 0, here(b)), 0, "r2 was never written"),
        (lambda b: b.load(R2, R3, 0, Size.B), 0, "r3 was never written"),
        (lambda b: b.store(R10, -8, R3, Size.B), 0, "r3 was never written"),
        (lambda b: b.store(R3, -8, 1, Size.B), 0, "r3 was never written"),
        (lambda b: b.mov(R10, 1), 0, "r10 cannot be written"),
        (lambda b: b.load_number(R10, 1 << 40), 0, "r10 cannot be written"),
        (lambda b: b.load(R10, R1, DI, Size.DW), 0, "r10 cannot be written"),
        (lambda b: b.alu(AluOp.ADD, R10, 8), 0, "r10 cannot be written"),
        (lambda b: b.alu(AluOp.MUL, R1, 1), 0, "r1 is a pointer: only constants can be added to it"),
        (lambda b: b.alu(AluOp.ADD, R1, 1, bits=32), 0, "r1 is a pointer: only constants can be added to it"),
        (lambda b: b.neg(R1), 0, "r1 is a pointer: only constants can be added to it"),
        (lambda b: (b.mov(R2, 1), b.alu(AluOp.ADD, R2, R1)), 1,
         "r1 is a pointer: there is no arithmetic with it on this side"),
        (lambda b: (b.load(R2, R1, DI, Size.B), b.alu(AluOp.ADD, R1, R2)), 1,
         "r1 is a pointer: only constants can be added to it"),
        (lambda b: b.mov(R2, R1, bits=32), 0, "r1 is a pointer: only all of it can be moved"),
        (lambda b: b.sign_extend(R2, R1, 32), 0, "r1 is a pointer: only all of it can be moved"),
        (lambda b: b.jump_if(JmpOp.JEQ, R1, 0, here(b)), 0, "r1 is a pointer: it cannot be compared"),
        (lambda b: (b.mov(R2, 1), b.jump_if(JmpOp.JEQ, R2, R10, here(b))), 1,
         "r10 is a pointer: it cannot be compared"),
        (lambda b: b.store(R10, -8, R1, Size.DW), 0, "r1 is a pointer: it must not leave the program"),
        (lambda b: b.mov(R0, R10), 1, "r0 is a pointer: it cannot be returned"),
    ],
)  # fmt: skip
def test_registers(write: Callable[[Builder], object], index: int, reason: str) -> None:
    assert refusal(built(write)) == (index, reason)


def here(out: Builder) -> Label:
    """The place right behind a jump that is emitted now, as the label of that jump."""
    label = Label()
    program_so_far = len(out.finish())
    label.slot = program_so_far + 1
    return label


@pytest.mark.parametrize(
    ("write", "index", "reason"),
    [
        (lambda b: (b.mov(R2, 8), b.load(R3, R2, 0, Size.B)), 1, "r2 is a number, not a pointer"),
        (lambda b: b.load(R2, R1, DI + 4, Size.W), 0, "no register is at offset 116 of the context"),
        (lambda b: b.load(R2, R1, pt_regs.SIZE, Size.DW), 0, "no register is at offset 168 of the context"),
        (lambda b: b.load(R2, R1, -8, Size.DW), 0, "no register is at offset -8 of the context"),
        (lambda b: b.store(R1, DI, 1, Size.DW), 0, "the context can only be read"),
        (lambda b: b.atomic(AluOp.ADD, R1, DI, R2, Size.DW), 0, "r2 was never written"),
        (lambda b: (b.mov(R2, 1), b.atomic(AluOp.ADD, R1, DI, R2, Size.DW)), 1, "the context can only be read"),
        (lambda b: b.load(R2, R10, -8, Size.DW), 0, "reads stack bytes at -8 that were never written"),
        (lambda b: (b.store(R10, -8, 1, Size.W), b.load(R2, R10, -8, Size.DW)), 1,
         "reads stack bytes at -8 that were never written"),
        (lambda b: (b.store(R10, -8, 1, Size.W), b.load(R2, R10, -7, Size.W)), 1,
         "reads stack bytes at -7 that were never written"),
        (lambda b: (b.mov(R2, 1), b.atomic(AluOp.ADD, R10, -8, R2, Size.DW)), 1,
         "reads stack bytes at -8 that were never written"),
        (lambda b: b.store(R10, 0, 1, Size.B), 0, "1 bytes at +0 are not within the stack of 512 bytes"),
        (lambda b: b.store(R10, -4, 1, Size.DW), 0, "8 bytes at -4 are not within the stack of 512 bytes"),
        (lambda b: b.store(R10, -513, 1, Size.B), 0, "1 bytes at -513 are not within the stack of 512 bytes"),
        (lambda b: b.load_region(R2, 3), 0, "there is no region 3"),
        (lambda b: (b.load_region(R2, 0), b.load(R3, R2, 17, Size.DW)), 1,
         "8 bytes at +17 are not within region 0 of 24 bytes"),
        (lambda b: (b.load_region(R2, 0, 24), b.load(R3, R2, 0, Size.B)), 1,
         "1 bytes at +24 are not within region 0 of 24 bytes"),
        (lambda b: (b.load_region(R2, 7), b.store(R2, -1, 0, Size.B)), 1,
         "1 bytes at -1 are not within region 7 of 4 bytes"),
        (lambda b: (b.load_region(R2, 7), b.mov(R3, 1), b.xchg(R2, 0, R3, Size.DW)), 2,
         "8 bytes at +0 are not within region 7 of 4 bytes"),
        (lambda b: (b.load_region(R2, 0), b.mov(R3, 1), b.xchg(R2, 4, R3, Size.DW)), 2,
         "an atomic access of 8 bytes must be aligned"),
        (lambda b: (b.load_region(R2, 0), b.mov(R3, 1), b.cmpxchg(R2, 0, R3, Size.DW)), 2, "r0 was never written"),
        (lambda b: (b.load_region(R2, 0), b.mov(R0, R1), b.mov(R3, 1), b.cmpxchg(R2, 0, R3, Size.DW)), 3,
         "r0 is a pointer: it is compared with memory"),
    ],
)  # fmt: skip
def test_memory(write: Callable[[Builder], object], index: int, reason: str) -> None:
    assert refusal(built(write)) == (index, reason)


@pytest.mark.parametrize(
    ("write", "index", "reason"),
    [
        (lambda b: b.call(3), 0, "there is no helper 3"),
        (lambda b: (b.mov(R1, 1), b.call(4)), 1, "r2 was never written"),
        (lambda b: (b.mov(R2, 1), b.call(4)), 1, "r1 is a pointer: both takes numbers"),
        *(
            (lambda b, register=register: (b.mov(register, 1), b.call(5), b.mov(R6, register)), 2,
             f"r{register} was given up to the call of none")
            for register in (R1, R2, R3, R4, R5)
        ),
    ],
)  # fmt: skip
def test_calls(write: Callable[[Builder], object], index: int, reason: str) -> None:
    assert refusal(built(write)) == (index, reason)


def test_a_call_keeps_r6_to_r9_and_gives_r0() -> None:
    def write(out: Builder) -> None:
        out.mov(R6, R1)
        out.mov(R9, 5)
        out.call(5)
        out.mov(R2, R0)

    after = check(built(write), REGIONS, HELPERS).steps[3]
    assert after is not None
    assert [after.after.registers[r] for r in (R0, R2, R6, R9)] == [Scalar(), Scalar(), ContextPointer(0), Number(5)]


def diamond(left: Callable[[Builder], object], right: Callable[[Builder], object]) -> tuple[Value, ...]:
    """The registers where two paths meet again."""
    out, other, both = Builder(), Label(), Label()
    out.load(R3, R1, DI, Size.DW)
    out.jump_if(JmpOp.JEQ, R3, 0, other)
    left(out)
    out.jump(both)
    out.bind(other)
    right(out)
    out.bind(both)
    out.exit()
    step = check(out.finish(), REGIONS).steps[-1]
    assert step is not None
    return step.before.registers


@pytest.mark.parametrize(
    ("left", "right", "together"),
    [
        (lambda b: b.mov(R2, 1), lambda b: b.mov(R2, 1), Number(1)),
        (lambda b: b.mov(R2, 1), lambda b: b.mov(R2, 2), Scalar()),
        (lambda b: b.mov(R2, R3), lambda b: b.mov(R2, 2), Scalar()),
        (lambda b: b.mov(R2, R3), lambda b: b.mov(R2, R3), Field("rdi", 8)),
        (lambda b: b.mov(R2, 1), lambda b: b.mov(R4, 1), Unreadable("was never written")),
        (lambda b: b.mov(R2, R1), lambda b: b.mov(R2, R1), ContextPointer(0)),
        (lambda b: b.mov(R2, R1), lambda b: b.mov(R2, R10),
         Unreadable("does not point to the same place on all paths")),
        (lambda b: b.load_region(R2, 0, 8), lambda b: b.load_region(R2, 0, 16),
         Unreadable("does not point to the same place on all paths")),
        (lambda b: b.load_region(R2, 0, 8), lambda b: b.mov(R2, 1),
         Unreadable("does not point to the same place on all paths")),
    ],
)  # fmt: skip
def test_where_paths_meet(
    left: Callable[[Builder], object], right: Callable[[Builder], object], together: Value
) -> None:
    assert diamond(left, right)[2] == together


def test_a_stack_byte_must_be_written_on_all_paths() -> None:
    out, other = Builder(), Label()
    out.load(R3, R1, DI, Size.DW)
    out.jump_if(JmpOp.JEQ, R3, 0, other)
    out.store(R10, -8, 1, Size.DW)
    out.bind(other)
    out.load(R2, R10, -8, Size.DW)
    out.exit()
    assert refusal(out.finish()) == (3, "reads stack bytes at -8 that were never written")


@pytest.mark.parametrize(
    ("write", "value"),
    [
        (lambda b: (b.mov(R2, R10), b.alu(AluOp.SUB, R2, 24)), StackPointer(-24)),
        (lambda b: (b.load_region(R2, 7, 2), b.mov(R3, -1), b.alu(AluOp.ADD, R2, R3)), RegionPointer(7, 1)),
        (lambda b: (b.load_number(R2, 1 << 40), b.alu(AluOp.ADD, R2, -1)), Number((1 << 40) - 1)),
        (lambda b: (b.mov(R2, -1), b.alu(AluOp.ADD, R2, 1, bits=32)), Number(0)),
        (lambda b: (b.mov(R2, -8), b.alu(AluOp.ARSH, R2, 1)), Number((1 << 64) - 4)),
        (lambda b: b.load(R2, R1, DI, Size.H, signed=True), Field("rdi", 2, signed=True)),
        (lambda b: (b.load(R2, R1, DI, Size.DW), b.mov(R2, R2, bits=32)), Field("rdi", 4)),
        (lambda b: (b.load(R2, R1, DI, Size.DW), b.alu(AluOp.AND, R2, 0xFF)), Field("rdi", 1)),
        (lambda b: (b.load(R2, R1, DI, Size.B), b.alu(AluOp.AND, R2, 0xFFFF)), Scalar()),
        (lambda b: (b.load(R2, R1, DI, Size.W), b.sign_extend(R2, R2, 16)), Field("rdi", 2, signed=True)),
        (lambda b: (b.load(R2, R1, DI, Size.B), b.sign_extend(R2, R2, 16)), Scalar()),
        (lambda b: (b.load(R2, R1, DI, Size.B), b.alu(AluOp.ADD, R2, 1)), Scalar()),
    ],
)
def test_what_is_known(write: Callable[[Builder], object], value: Value) -> None:
    step = check(built(write), REGIONS).steps[-1]
    assert step is not None
    assert step.before.registers[2] == value


def test_a_path_that_is_never_taken_is_not_looked_at() -> None:
    def write(out: Builder) -> None:
        end = Label()
        out.mov(R2, 4)
        out.jump_if(JmpOp.JGT, R2, 3, end)
        out.load(R3, R2, 0, Size.DW)
        out.bind(end)

    checked = check(built(write))
    assert [step is None for step in checked.steps] == [False, False, True, False]


def test_the_stack_that_is_used() -> None:
    assert check(built(lambda b: b.store(R10, -13, 1, Size.B))).stack_used == 13
    assert check(built(lambda b: b.mov(R0, 1))).stack_used == 0


def test_what_is_accepted_runs_without_an_error() -> None:
    """Random programs with one field changed: the checker refuses them, or the interpreter has nothing to say."""
    accepted = refused = 0
    context = packed(context_of(random_state(random.Random(0))))
    for seed in range(3000):
        rng = random.Random(seed)
        program = list(random_program(rng, 20))
        at = rng.randrange(len(program))
        change = {"op": rng.randrange(256)} if rng.random() < 0.3 else rng.choice(
            [{"dst": rng.randrange(11)}, {"src": rng.randrange(11)}, {"off": rng.randrange(-40, 40)},
             {"imm": rng.randrange(-300, 300)}]
        )  # fmt: skip
        program[at] = replace(program[at], **change)
        try:
            check(tuple(program), {OUTPUT: OUTPUT_SIZE, WORK: WORK_SIZE})
        except BpfRefusedError:
            refused += 1
            continue
        accepted += 1
        Machine(context, {OUTPUT: bytearray(OUTPUT_SIZE), WORK: bytearray(WORK_SIZE)}).run(tuple(program))
    assert accepted > 500
    assert refused > 500
