"""Encodings of the emitter, read back by capstone, for every register and kind of operand."""

from __future__ import annotations

from collections.abc import Callable

import capstone
import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, DisplacementError, Label
from gdb_kprobe.x86.emit import At, Cc, Emitter, Gp, Mem, Op, Rm, Shift

CODE = VirtAddr(0xFFFF_FFFF_C050_0000)
DATA = VirtAddr(0xFFFF_FFFF_C040_0010)

LOW = {Gp.RAX: "a", Gp.RCX: "c", Gp.RDX: "d", Gp.RBX: "b"}
POINTERS = {1: "byte", 2: "word", 4: "dword", 8: "qword"}


def name(register: Gp, width: int) -> str:
    """What the assembler calls the low *width* bytes."""
    plain = register.name.lower()
    if register >= Gp.R8:
        return plain + {8: "", 4: "d", 2: "w", 1: "b"}[width]
    if width == 8:
        return plain
    if width == 1:
        return LOW[register] + "l" if register in LOW else plain[1:] + "l"
    return ("e" if width == 4 else "") + plain[1:]


def shown(rm: Rm, width: int, end: int) -> str:
    """*rm* as capstone writes it in an instruction that ends at *end*."""
    match rm:
        case Gp():
            return name(rm, width)
        case Mem(base, displacement):
            sign = f" {'-' if displacement < 0 else '+'} {number(abs(displacement))}" if displacement else ""
            return f"{POINTERS[width]} ptr [{name(base, 8)}{sign}]"
        case At(addr):
            distance = addr - end
            return f"{POINTERS[width]} ptr [rip {'-' if distance < 0 else '+'} {number(abs(distance))}]"


def number(value: int) -> str:
    return str(value) if value < 10 else hex(value)


def disassembled(code: bytes) -> str:
    insns = list(capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, CODE))
    assert len(insns) == 1
    assert insns[0].size == len(code)
    return f"{insns[0].mnemonic} {insns[0].op_str}".strip()


def call(method: Callable[..., None], *arguments: object, **options: object) -> Callable[[Emitter], None]:
    return lambda out: method(out, *arguments, **options)


def emitted(act: Callable[[Emitter], None]) -> tuple[bytes, Emitter]:
    asm = Assembler(CODE)
    out = Emitter(asm)
    act(out)
    return asm.finish(), out


MEMORY: list[Mem | At] = [
    *(Mem(base, displacement) for base in Gp for displacement in (0, 8, -0x80, 0x80, -0x12345678)),
    At(DATA),
    At(VirtAddr(CODE + 0x1000)),
]
ANYWHERE: list[Rm] = [*Gp, *MEMORY]
WIDTHS = (1, 2, 4, 8)


@pytest.mark.parametrize("width", WIDTHS)
def test_register_and_operand(width: int) -> None:
    for rm in ANYWHERE:
        for register in Gp:
            for text, act in {
                "mov {r}, {m}": call(Emitter.mov, register, rm, width),
                "mov {m}, {r}": call(Emitter.store, rm, register, width),
                "add {r}, {m}": call(Emitter.alu, Op.ADD, register, rm, width),
                "cmp {m}, {r}": call(Emitter.alu_store, Op.CMP, rm, register, width),
                "test {m}, {r}": call(Emitter.test, rm, register, width),
            }.items():
                code, _ = emitted(act)
                expected = text.format(r=name(register, width), m=shown(rm, width, CODE + len(code)))
                assert disassembled(code) == expected


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [1, 0x7F, -1, -0x80])
def test_immediates(width: int, value: int) -> None:
    immediate = number(value & (1 << 8 * width) - 1 if value < 0 else value)
    for rm in ANYWHERE:
        for op in Op:
            code, _ = emitted(call(Emitter.alu_imm, op, rm, value, width))
            target = shown(rm, width, CODE + len(code))
            # Capstone shows the immediate of and, or, xor unsigned, and of the others with its sign.
            assert disassembled(code) in {
                f"{op.name.lower()} {target}, {text}" for text in (immediate, number(value), f"-{number(-value)}")
            }
        code, _ = emitted(call(Emitter.test_imm, rm, 0x41, width))
        assert disassembled(code) == f"test {shown(rm, width, CODE + len(code))}, 0x41"


@pytest.mark.parametrize("width", [4, 8])
def test_atomic_instructions(width: int) -> None:
    for rm in MEMORY:
        for register in Gp:
            for text, act in {
                "xchg {m}, {r}": call(Emitter.xchg, rm, register, width),
                "lock xadd {m}, {r}": call(Emitter.lock_xadd, rm, register, width),
                "lock cmpxchg {m}, {r}": call(Emitter.lock_cmpxchg, rm, register, width),
                "lock or {m}, {r}": call(Emitter.alu_store, Op.OR, rm, register, width, lock=True),
            }.items():
                code, _ = emitted(act)
                expected = text.format(r=name(register, width), m=shown(rm, width, CODE + len(code)))
                assert disassembled(code) == expected
        for text, act in {
            "lock add {m}, 1": call(Emitter.alu_imm, Op.ADD, rm, 1, width, lock=True),
            "lock add {m}, 5": call(Emitter.alu_imm, Op.ADD, rm, 5, width, lock=True),
        }.items():
            code, _ = emitted(act)
            assert disassembled(code) == text.format(m=shown(rm, width, CODE + len(code)))


def test_extensions() -> None:
    for rm in ANYWHERE:
        for register in Gp:
            for width in (1, 2):
                code, _ = emitted(call(Emitter.movzx, register, rm, width))
                expected = f"movzx {name(register, 4)}, {shown(rm, width, CODE + len(code))}"
                assert disassembled(code) == expected
            for width, to in ((1, 4), (1, 8), (2, 4), (2, 8), (4, 8)):
                code, _ = emitted(call(Emitter.movsx, register, rm, width, to))
                mnemonic = "movsxd" if width == 4 else "movsx"
                assert disassembled(code) == f"{mnemonic} {name(register, to)}, {shown(rm, width, CODE + len(code))}"


@pytest.mark.parametrize("width", [4, 8])
def test_one_register(width: int) -> None:
    for register in Gp:
        for text, act in {
            "neg {r}": call(Emitter.neg, register, width),
            "bswap {r}": call(Emitter.bswap, register, width),
            "idiv {r}": call(Emitter.div, register, width, signed=True),
            "div {r}": call(Emitter.div, register, width, signed=False),
            "shl {r}, 5": call(Emitter.shift_imm, Shift.SHL, register, 5, width),
            "sar {r}, cl": call(Emitter.shift_cl, Shift.SAR, register, width),
            "imul {r}, {r}, 0x1234": call(Emitter.imul_imm, register, register, 0x1234, width),
            "imul {r}, {r}": call(Emitter.imul, register, register, width),
        }.items():
            code, out = emitted(act)
            assert disassembled(code) == text.format(r=name(register, width))
            assert out.written >= ({register} if "div" not in text else {Gp.RAX, Gp.RDX})
            assert out.writes_flags is ("bswap" not in text)
        for text, act in {"push": call(Emitter.push, register), "pop": call(Emitter.pop, register)}.items():
            code, out = emitted(act)
            assert disassembled(code) == f"{text} {name(register, 8)}"
            assert not out.written


@pytest.mark.parametrize(
    ("value", "size", "text"),
    [
        (0, 5, "mov eax, 0"),
        (0xFFFF_FFFF, 5, "mov eax, 0xffffffff"),
        (-1, 7, "mov rax, 0xffffffffffffffff"),
        (0xFFFF_FFFF_8000_0000, 7, "mov rax, 0xffffffff80000000"),
        (0x1_0000_0000, 10, "movabs rax, 0x100000000"),
    ],
)
def test_a_constant_takes_the_shortest_move(value: int, size: int, text: str) -> None:
    code, out = emitted(call(Emitter.mov_imm, Gp.RAX, value))
    assert (len(code), disassembled(code)) == (size, text)
    assert not out.writes_flags
    high, _ = emitted(call(Emitter.mov_imm, Gp.R13, value))
    assert disassembled(high).split(", ")[1] == text.split(", ")[1]


def test_jumps() -> None:
    for condition in Cc:
        assert condition.inverse.inverse is condition
        target = Label("there")
        target.addr = VirtAddr(CODE + 0x100)
        code, _ = emitted(call(Emitter.jcc, condition, target))
        assert disassembled(code) == f"j{condition.name.lower()} {CODE + 0x100:#x}"


def test_what_an_instruction_changes_is_noted() -> None:
    for act, written, flags in (
        (call(Emitter.mov, Gp.RAX, Gp.RCX, 8), {Gp.RAX}, False),
        (call(Emitter.store, Mem(Gp.RAX, 0), Gp.RCX, 8), set(), False),
        (call(Emitter.alu, Op.CMP, Gp.RAX, Gp.RCX, 8), set(), True),
        (call(Emitter.alu, Op.ADD, Gp.RAX, Gp.RCX, 8), {Gp.RAX}, True),
        (call(Emitter.alu_imm, Op.ADD, Mem(Gp.RAX, 0), 1, 8), set(), True),
        (call(Emitter.test_imm, Gp.RAX, 1, 8), set(), True),
        (call(Emitter.lea, Gp.RDX, Mem(Gp.RSP, 8)), {Gp.RDX}, False),
        (call(Emitter.lea, Gp.RSP, Mem(Gp.RSP, 8)), set(), False),
        (call(Emitter.extend_rax, 8), {Gp.RDX}, False),
        (call(Emitter.lock_cmpxchg, Mem(Gp.RBX, 0), Gp.RCX, 8), {Gp.RAX}, True),
    ):
        _, out = emitted(act)
        assert (out.written, out.writes_flags) == (written, flags)


def test_out_of_reach() -> None:
    with pytest.raises(DisplacementError, match="an access at"):
        emitted(call(Emitter.mov, Gp.RAX, At(VirtAddr(0x5000_0000_0000)), 8))
