"""The program of a probe: it decides as evaluate() does, interpreted and compiled, in the shortest code there is."""

from __future__ import annotations

import random
from functools import reduce

import capstone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_kprobe.actions.lower import COUNTER, COUNTER_SIZE, ENABLE, HITS, REGIONS, lower
from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.insn import Program
from gdb_kprobe.bpf.jit import emit, prepare
from gdb_kprobe.bpf.liveness import is_exit
from gdb_kprobe.bpf.verifier import STACK_SIZE, check
from gdb_kprobe.kprobes.action import Verdict
from gdb_kprobe.language.condition import Condition, parse_condition
from gdb_kprobe.language.expression import Binary, BinaryOp, Cast, Expr, Number, Register, Unary, UnaryOp, evaluate
from gdb_kprobe.model import PT_REGS_NAMES, VirtAddr
from gdb_kprobe.x86.assemble import Assembler, Label
from tests.proof.bpf import IP, SURROUNDINGS, Surroundings, compare, context_of, interpret
from tests.proof.emulator import Emulator, random_state
from tests.proof.state import State

EMULATOR = Emulator()
CODE = VirtAddr(0xFFFF_FFFF_C050_0000)
DATA = VirtAddr(0xFFFF_FFFF_C040_0000)


def counter(hits: int, enabled: int) -> dict[int, bytes]:
    """A counter whose number of misses is 5."""
    data = hits.to_bytes(8, "little") + (5).to_bytes(8, "little") + enabled.to_bytes(4, "little") + bytes(4)
    assert len(data) == COUNTER_SIZE
    return {COUNTER: data}


NUMBERS = st.sampled_from([0, 1, 3, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63]) | (
    st.integers(0, (1 << 64) - 1)
)
LEAVES = NUMBERS.map(Number) | st.sampled_from(sorted(PT_REGS_NAMES)).map(Register)


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return (
        st.builds(Unary, st.sampled_from(UnaryOp), inner)
        | st.builds(Cast, inner, st.sampled_from([8, 16, 32, 64]), st.booleans())
        | st.builds(Binary, st.sampled_from(BinaryOp), inner, inner)
    )


EXPRESSIONS: st.SearchStrategy[Expr] = st.recursive(LEAVES, grown, max_leaves=24)


def named(state: State) -> dict[str, int]:
    """What the condition sees of a hit at IP in *state*."""
    context = context_of(state)
    return {name: context[hardware] for name, hardware in PT_REGS_NAMES.items()}


@given(EXPRESSIONS, st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=600)
def test_a_hit_is_counted_exactly_if_the_condition_holds(expr: Expr, seed: int) -> None:
    state = random_state(random.Random(seed))
    value = evaluate(expr, named(state)) & (1 << 64) - 1
    # The value itself is looked at, too: it is equal to itself, and not to another one.
    same, other = (Binary(BinaryOp.EQ, Cast(expr, 64, False), Number(value ^ bit)) for bit in (0, 1))
    for condition, expected in ((expr, value != 0), (same, True), (other, False)):
        checked = check(lower(Condition("", condition)), REGIONS)
        _, after = interpret(checked.program, context_of(state), counter(41, 1))
        assert after == counter(41 + expected, 1)
        for surroundings in SURROUNDINGS:
            trial = compare(checked, surroundings, EMULATOR, state, counter(41, 1))
            assert trial.differences == []


@given(EXPRESSIONS, st.integers(0, 1 << 32), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=200)
def test_the_host_is_asked_exactly_if_the_condition_holds(expr: Expr, seed: int, enabled: int) -> None:
    state = random_state(random.Random(seed))
    value = evaluate(expr, named(state)) & (1 << 64) - 1
    checked = check(lower(Condition("", expr), Verdict.HOST), REGIONS)
    said, after = interpret(checked.program, context_of(state), counter(41, enabled))
    assert (said, after) == (Verdict.HOST if enabled and value else Verdict.CONTINUE, counter(41, enabled))
    for surroundings in SURROUNDINGS:
        assert compare(checked, surroundings, EMULATOR, state, counter(41, enabled)).differences == []


@pytest.mark.parametrize("surroundings", SURROUNDINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("enabled", [0, 1])
def test_the_enable_word(surroundings: Surroundings, enabled: int) -> None:
    checked = check(lower(None), REGIONS)
    trial = compare(checked, surroundings, EMULATOR, random_state(random.Random(1)), counter(7, enabled))
    assert trial.differences == []
    assert trial.regions == counter(7 + enabled, enabled)


def test_256_terms_need_no_stack() -> None:
    casts: list[Expr] = [Cast(Register(name), 32, True) for name in sorted(PT_REGS_NAMES)]
    terms = casts * 13
    balanced: list[Expr] = terms[:256]
    while len(balanced) > 1:
        pairs = zip(balanced[::2], balanced[1::2], strict=True)
        balanced = [Binary(BinaryOp.XOR, left, right) for left, right in pairs]
    left = reduce(lambda a, b: Binary(BinaryOp.SUB, a, b), terms[:256])
    right = reduce(lambda a, b: Binary(BinaryOp.SUB, b, a), terms[:256])
    state = random_state(random.Random(3))
    for expr in (balanced[0], left, right):
        for wanted in (0, 1):
            value = evaluate(expr, named(state)) & (1 << 64) - 1
            equal = Binary(BinaryOp.EQ, Cast(expr, 64, False), Number(value ^ wanted))
            checked = check(lower(Condition("", equal)), REGIONS)
            assert checked.stack_used == 0
            for surroundings in SURROUNDINGS:
                trial = compare(checked, surroundings, EMULATOR, state, counter(0, 1))
                assert trial.differences == []
                assert trial.regions == counter(1 - wanted, 1)


def test_a_tree_of_1024_terms_goes_to_the_stack() -> None:
    rng = random.Random(5)
    names = sorted(PT_REGS_NAMES)
    terms: list[Expr] = [Register(rng.choice(names)) for _ in range(1024)]
    while len(terms) > 1:
        ops = [rng.choice([BinaryOp.ADD, BinaryOp.SUB, BinaryOp.XOR, BinaryOp.SHR]) for _ in terms[::2]]
        terms = [Binary(op, a, b) for op, a, b in zip(ops, terms[::2], terms[1::2], strict=True)]
    state = random_state(rng)
    value = evaluate(terms[0], named(state))
    for wanted in (0, 1):
        equal = Binary(BinaryOp.EQ, terms[0], Number(value ^ wanted))
        checked = check(lower(Condition("", equal)), REGIONS)
        assert 0 < checked.stack_used <= STACK_SIZE
        for surroundings in SURROUNDINGS:
            trial = compare(checked, surroundings, EMULATOR, state, counter(0, 1))
            assert trial.differences == []
            assert trial.regions == counter(1 - wanted, 1)


# What the code looks like


def listing(program: Program, frame: Frame) -> list[str]:
    """The instructions, by capstone; the counter's fields by name, the end by "end"."""
    asm = Assembler(CODE)
    prepared = prepare(check(program, REGIONS), frame, decides=_says(program))
    said = Label("said") if prepared.decides else None
    emit(asm, prepared, {COUNTER: DATA}, said=said)
    size = asm.pc - CODE
    if said is not None:
        asm.raw(bytes(64))
        asm.bind(said)
    code = asm.finish()[:size]
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    disassembler.detail = True
    lines = []
    for insn in disassembler.disasm(code, CODE):
        text = f"{insn.mnemonic} {insn.op_str}"
        for operand in insn.operands:
            if operand.type == capstone.x86.X86_OP_MEM and operand.mem.base == capstone.x86.X86_REG_RIP:
                target = insn.address + insn.size + operand.mem.disp - DATA
                at = text.index("[rip")
                text = text[:at] + {HITS: "[hits]", ENABLE: "[enable]"}[target] + text[text.index("]", at) + 1 :]
        lines.append(text.replace(hex(CODE + size), "end").replace(hex(CODE + size + 64), "said"))
    return lines


def _says(program: Program) -> bool:
    """Whether it has a verdict other than CONTINUE: a second exit."""
    return sum(is_exit(insn) for insn in program) > 1


GUARD = ["cmp dword ptr [enable], 0", "je end"]
COUNT = ["lock add qword ptr [hits], 1"]


@pytest.mark.parametrize(
    ("condition", "in_detour", "in_handler"),
    [
        (
            "di == 3 && (si & 0x40)",
            ["cmp rdi, 3", "jne end", "test sil, 0x40", "je end"],
            ["cmp qword ptr [rdi + 0x70], 3", "jne end", "test byte ptr [rdi + 0x68], 0x40", "je end"],
        ),
        ("s32(di) < 0", ["test edi, edi", "jge end"], ["cmp dword ptr [rdi + 0x70], 0", "jge end"]),
        ("u8(dx) > 200", ["cmp dl, 0xc8", "jbe end"], ["cmp byte ptr [rdi + 0x60], 0xc8", "jbe end"]),
        ("!r8", ["test r8, r8", "jne end"], ["cmp qword ptr [rdi + 0x48], 0", "jne end"]),
        (
            "di != si",
            ["cmp rdi, rsi", "je end"],
            ["mov r11, qword ptr [rdi + 0x68]", "cmp qword ptr [rdi + 0x70], r11", "je end"],
        ),
        (
            "ip == 0xffffffff81234567 && cx",
            ["test rcx, rcx", "je end"],
            ["cmp qword ptr [rdi + 0x58], 0", "je end"],
        ),
    ],
)
def test_code(condition: str, in_detour: list[str], in_handler: list[str]) -> None:
    program = lower(parse_condition(condition))
    assert listing(program, InDetour(IP)) == [*GUARD, *in_detour, *COUNT]
    assert listing(program, InHandler(IP)) == [*GUARD, *in_handler, *COUNT]


def test_code_that_asks_the_host() -> None:
    """A verdict is no value, but a jump; the flags are all that it changes."""
    assert listing(lower(None, Verdict.HOST), InDetour(IP)) == ["cmp dword ptr [enable], 0", "jne said"]
    program = lower(parse_condition("di == 3 && (si & 0x40)"), Verdict.HOST)
    assert listing(program, InDetour(IP)) == [*GUARD, "cmp rdi, 3", "jne end", "test sil, 0x40", "je end", "jmp said"]
    program = lower(parse_condition("s32(di) < 0"), Verdict.HOST)
    assert listing(program, InDetour(IP)) == [*GUARD, "test edi, edi", "jl said"]


def test_code_without_a_condition() -> None:
    """There is no branch in it, at which QEMU would end a translation."""
    counting = ["mov eax, dword ptr [enable]", "lock add qword ptr [hits], rax"]
    assert listing(lower(None), InDetour(IP)) == ["push rax", *counting, "pop rax"]
    assert listing(lower(None), InHandler(IP)) == counting


def test_a_program_says_whether_it_reads_the_flags() -> None:
    checked = check(lower(parse_condition("flags & 0x200")), REGIONS)
    assert prepare(checked, InDetour(IP)).reads_flags
    assert prepare(checked, InDetour(IP, 8, {"eflags": 0})).reads_flags
    assert not prepare(check(lower(parse_condition("di & 0x200")), REGIONS), InDetour(IP)).reads_flags
