"""Compiled eBPF against interpreted eBPF: the same regions, and nothing else changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gdb_kprobe.bpf.asm import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Builder, Label, Reg
from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.insn import AluOp, JmpOp, Program, Size
from gdb_kprobe.bpf.interpreter import Machine as Interpreter
from gdb_kprobe.bpf.jit import Prepared, emit, prepare
from gdb_kprobe.bpf.liveness import is_exit
from gdb_kprobe.bpf.value import is_number
from gdb_kprobe.bpf.verifier import CheckedProgram
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler
from gdb_kprobe.x86.assemble import Label as Label86
from gdb_kprobe.x86.emit import Emitter, Gp
from tests.proof.emulator import Emulator, random_state
from tests.proof.state import State

IP: Final = VirtAddr(0xFFFF_FFFF_8123_4567)
CODE: Final = VirtAddr(0xFFFF_FFFF_C050_0000)
SAID: Final = VirtAddr(CODE + 0x10_0000)
"""Where a program goes that decides, with another verdict than 0."""
_REGIONS: Final = 0xFFFF_FFFF_C040_0000
_PT_REGS: Final = 0xFFFF_C900_8000_0010
_STACK_BELOW: Final = 0x1000
_MOST: Final = 20_000
_PUSHFQ, _POPFQ = b"\x9c", b"\x9d"
_CALLEE_SAVED: Final = ("rbx", "rbp", "r12", "r13", "r14", "r15", "rsp", "rdi")


@dataclass(frozen=True)
class Surroundings:
    """What a program is put in line into: one of the two frames, and what is pushed around it in a detour."""

    name: str
    in_handler: bool = False
    pushed: tuple[Gp, ...] = ()

    def frame(self) -> Frame:
        if self.in_handler:
            return InHandler(IP)
        # First the flags, then the registers, each 8 bytes lower.
        saved = {"eflags": 8 * len(self.pushed)}
        saved |= {register.name.lower(): 8 * at for at, register in enumerate(reversed(self.pushed))}
        return InDetour(IP, 8 * (1 + len(self.pushed)), saved)

    def code(self, prepared: Prepared, regions: Mapping[int, VirtAddr]) -> bytes:
        asm = Assembler(CODE)
        out = Emitter(asm)
        if not self.in_handler:
            asm.raw(_PUSHFQ)
            for register in self.pushed:
                out.push(register)
        said = Label86("said") if prepared.decides else None
        emit(asm, prepared, regions, said=said)
        if said is not None:
            end = Label86("end")
            self._restore(out)
            asm.jmp_rel32(end)
            asm.bind(said)
            self._restore(out)
            asm.jmp_rel32(SAID)
            asm.bind(end)
        else:
            self._restore(out)
        return asm.finish()

    def _restore(self, out: Emitter) -> None:
        if not self.in_handler:
            for register in reversed(self.pushed):
                out.pop(register)
            out.asm.raw(_POPFQ)


SURROUNDINGS: Final = (
    Surroundings("detour"),
    Surroundings("detour that saves some", pushed=(Gp.RAX, Gp.R11, Gp.RCX)),
    Surroundings("handler", in_handler=True),
)


@dataclass
class Trial:
    """One program, one state, one frame. *differences* is what is not as the interpreter has it."""

    code: bytes
    regions: dict[int, bytes]
    differences: list[str] = field(default_factory=list)


def context_of(state: State) -> dict[str, int]:
    """The fields of the ``struct pt_regs`` that a detour at :data:`IP` would have made of *state*."""
    values = {name: state.registers.get(name, 0) for name in pt_regs.OFFSETS}
    return values | {"rip": IP, "cs": 0x10, "ss": 0x18, "orig_rax": (1 << 64) - 1}


def packed(context: Mapping[str, int]) -> bytes:
    """*context* as the bytes of a ``struct pt_regs``."""
    data = bytearray(pt_regs.SIZE)
    for name, offset in pt_regs.OFFSETS.items():
        data[offset : offset + 8] = context[name].to_bytes(8, "little")
    return bytes(data)


def interpret(
    program: Program, context: Mapping[str, int], regions: Mapping[int, bytes]
) -> tuple[int, dict[int, bytes]]:
    """What *program* returns, and the regions after it."""
    memory = {number: bytearray(data) for number, data in regions.items()}
    returned = Interpreter(packed(context), memory).run(program)
    return returned, {number: bytes(data) for number, data in memory.items()}


def compare(
    checked: CheckedProgram,
    surroundings: Surroundings,
    emulator: Emulator,
    interrupted: State,
    regions: Mapping[int, bytes],
) -> Trial:
    """Run *checked* both ways, for a hit at :data:`IP` in the state *interrupted*."""
    state = interrupted.copy()
    context = context_of(state)
    returned, expected = interpret(checked.program, context, regions)
    addresses = {number: VirtAddr(_REGIONS + 0x1000 * number) for number in regions}
    decides = _returns_a_number(checked)
    code = surroundings.code(prepare(checked, surroundings.frame(), decides), addresses)
    for number, data in regions.items():
        state.write(addresses[number], data)
    if surroundings.in_handler:
        state.registers = random_state(random.Random(state.seed)).registers | {"rdi": _PT_REGS}
        state.write(_PT_REGS, packed(context | {"rip": IP + 1}))  # as the int3 has left it
    after = emulator.run(state, {CODE: code}, CODE, _MOST)
    trial = Trial(code, {number: after.read(addresses[number], len(data)) for number, data in regions.items()})
    found = trial.differences
    if after.fault:
        found.append(after.fault)
    end = SAID if decides and returned else CODE + len(code)
    if after.registers["rip"] != end:
        found.append(f"ends at {after.registers['rip']:#x} instead of {end:#x}")
    kept = _CALLEE_SAVED if surroundings.in_handler else [name for name in state.registers if name != "rip"]
    for name in kept:
        old, new = state.registers[name], after.registers[name]
        if old != new:
            found.append(f"{name} {new:#x} instead of {old:#x}")
    for number, data in expected.items():
        if trial.regions[number] != data:
            found.append(f"region {number} {trial.regions[number].hex()} instead of {data.hex()}")
    found += _strays(state, after, addresses, regions)
    return trial


def _returns_a_number(checked: CheckedProgram) -> bool:
    """Whether r0 has been written at each exit."""
    exits = [step for insn, step in zip(checked.program, checked.steps, strict=True) if step and is_exit(insn)]
    return all(is_number(step.before.registers[0]) for step in exits)


def _strays(before: State, after: State, addresses: Mapping[int, VirtAddr], regions: Mapping[int, bytes]) -> list[str]:
    """Writes to where nothing is to be written."""
    allowed = [range(addresses[number], addresses[number] + len(data)) for number, data in regions.items()]
    top = before.registers["rsp"]
    allowed.append(range(top - _STACK_BELOW, top))
    told = []
    for base, page in after.pages.items():
        old = before.page(base)
        if old == page or CODE <= base < CODE + 0x10000:
            continue
        changed = [base + at for at, (a, b) in enumerate(zip(old, page, strict=True)) if a != b]
        told += [f"{at:#x} was written" for at in changed if not any(at in piece for piece in allowed)]
    return told


# Random programs

OUTPUT, WORK = 0, 1
OUTPUT_SIZE: Final = 88
WORK_SIZE: Final = 64
_SIZES: Final = tuple(Size)
_EDGES: Final = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, -1, -2, -0x80, -0x8000_0000)
_CONDITIONS: Final = tuple(op for op in JmpOp if op not in (JmpOp.JA, JmpOp.CALL, JmpOp.EXIT))
_FETCHABLE: Final = (AluOp.ADD, AluOp.OR, AluOp.AND, AluOp.XOR)
_FRAME: Final = 32


def random_program(rng: random.Random, length: int) -> Program:
    """A program that the checker takes, of some *length* instructions; ends by storing all numbers to ``OUTPUT``."""
    return _Random(rng).program(length)


class _Random:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.out = Builder()
        self.context = rng.choice((R1, R6))
        self.work = rng.choice((R9, R2, R4))
        registers: Sequence[Reg] = (R0, R1, R2, R3, R4, R5, R6, R7, R8, R9)
        self.numbers = [r for r in registers if r not in (self.context, self.work)]

    def program(self, length: int) -> Program:
        out, rng = self.out, self.rng
        if self.context is not R1:
            out.mov(self.context, R1)
        out.load_region(self.work, WORK)
        for register in self.numbers:
            self.fill(register)
        for slot in range(_FRAME // 8):
            out.store(R10, -8 * (slot + 1), rng.choice(self.numbers), Size.DW)
        kinds: Sequence[Callable[[], None]] = (
            self.arithmetic, self.arithmetic, self.arithmetic, self.extend, self.swap, self.load, self.load, self.store,
            self.atomic, self.jump, self.jump, self.refill,
        )  # fmt: skip
        pending: list[tuple[int, Label]] = []
        for position in range(length):
            for due, label in [p for p in pending if p[0] <= position]:
                out.bind(label)
                pending.remove((due, label))
            kind = rng.choice(kinds)
            if kind == self.jump:
                label = Label()
                pending.append((position + rng.randrange(1, 6), label))
                self.jump_to(label)
            else:
                kind()
        for _, label in pending:
            out.bind(label)
        out.load_region(self.work, OUTPUT)
        for at, register in enumerate(self.numbers):
            out.store(self.work, 8 * at, register, Size.DW)
        out.exit()
        return out.finish()

    def register(self) -> Reg:
        return self.rng.choice(self.numbers)

    def operand(self) -> Reg | int:
        return self.register() if self.rng.random() < 0.6 else self.immediate()

    def immediate(self) -> int:
        return self.rng.choice(_EDGES) if self.rng.random() < 0.7 else self.rng.randrange(-0x8000_0000, 0x8000_0000)

    def refill(self) -> None:
        self.fill(self.register())

    def fill(self, register: Reg) -> None:
        if self.rng.random() < 0.4:
            value = self.rng.getrandbits(64) if self.rng.random() < 0.3 else self.immediate()
            self.out.load_number(register, value)
        else:
            self.field(register)

    def field(self, register: Reg) -> None:
        size = self.rng.choice(_SIZES)
        signed = size is not Size.DW and self.rng.random() < 0.4
        offset = self.rng.choice(tuple(pt_regs.OFFSETS.values()))
        self.out.load(register, self.context, offset, size, signed=signed)

    def arithmetic(self) -> None:
        op = self.rng.choice([op for op in AluOp if op is not AluOp.END])
        bits = self.rng.choice((32, 64))
        if op is AluOp.NEG:
            self.out.neg(self.register(), bits=bits)
            return
        signed = op in (AluOp.DIV, AluOp.MOD) and self.rng.random() < 0.5
        self.out.alu(op, self.register(), self.operand(), bits=bits, signed=signed)

    def extend(self) -> None:
        bits = self.rng.choice((32, 64))
        width = self.rng.choice((8, 16, 32) if bits == 64 else (8, 16))
        self.out.sign_extend(self.register(), self.register(), width, bits=bits)

    def swap(self) -> None:
        swap = self.rng.choice((self.out.to_little, self.out.to_big, self.out.bswap))
        swap(self.register(), self.rng.choice((16, 32, 64)))

    def place(self, size: Size, *, aligned: bool) -> tuple[Reg, int]:
        step = size.width if aligned else 1
        if self.rng.random() < 0.5:
            return R10, -_FRAME + self.rng.randrange((_FRAME - size.width) // step + 1) * step
        return self.work, self.rng.randrange((WORK_SIZE - size.width) // step + 1) * step

    def load(self) -> None:
        size = self.rng.choice(_SIZES)
        base, offset = self.place(size, aligned=False)
        signed = size is not Size.DW and self.rng.random() < 0.4
        self.out.load(self.register(), base, offset, size, signed=signed)

    def store(self) -> None:
        size = self.rng.choice(_SIZES)
        base, offset = self.place(size, aligned=False)
        self.out.store(base, offset, self.operand(), size)

    def atomic(self) -> None:
        size = self.rng.choice((Size.W, Size.DW))
        base, offset = self.place(size, aligned=True)
        register = self.register()
        match self.rng.randrange(4):
            case 0:
                self.out.xchg(base, offset, register, size)
            case 1 if R0 in self.numbers:
                self.out.cmpxchg(base, offset, register, size)
            case _:
                op = self.rng.choice(_FETCHABLE)
                self.out.atomic(op, base, offset, register, size, fetch=self.rng.random() < 0.5)

    def jump(self) -> None:
        raise AssertionError("a jump needs a label")

    def jump_to(self, label: Label) -> None:
        if self.rng.random() < 0.15:
            self.out.jump(label)
        else:
            bits = self.rng.choice((32, 64))
            self.out.jump_if(self.rng.choice(_CONDITIONS), self.register(), self.operand(), label, bits=bits)
