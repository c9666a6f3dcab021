"""Whether a program may run in a guest: it ends, it reads what was written, it stays within what it was given.

The rules, in the order in which they are looked at:

- jumps go forward, to an instruction; no path leaves at the end without ``exit``;
- a register is written before it is read, r10 never; a call leaves r1-r5 unreadable;
- r1 points to the context, ``struct pt_regs``, r10 to the end of the stack, and 64-bit loads make pointers into the
  regions that are declared with the program. To pointers constants may be added, nothing else; they are not compared,
  not stored, and not returned in r0;
- the context is only read, a register's 8, 4, 2 or 1 low bytes at once; stack bytes are written before they are read;
  accesses are within bounds, atomic ones aligned and not in the context.

As no jump goes back, one walk in program order sees every path. A jump whose outcome is a constant has one successor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.bpf.insn import (
    CMPXCHG,
    FETCH,
    LD_IMM64,
    R10,
    SRC_X,
    AluOp,
    BpfInsn,
    InsnClass,
    JmpOp,
    LoadKind,
    Mode,
    Program,
    Size,
    invalid,
    text,
)
from gdb_kprobe.bpf.value import (
    MASK32,
    MASK64,
    ContextPointer,
    Field,
    Number,
    RegionPointer,
    Scalar,
    StackPointer,
    Unreadable,
    Value,
    arithmetic,
    holds,
    is_number,
    merge,
    to_signed,
)
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.linux import pt_regs

STACK_SIZE: Final = 512
MOST_INSNS: Final = 1 << 16
"""A bound on programs, and thus on the time that a hit takes."""

_FIELD_AT: Final = {at: name for name, at in pt_regs.OFFSETS.items()}


class BpfRefusedError(KprobeError):
    """A program that must not run; *index* is that of the instruction, from 0."""

    def __init__(self, index: int, program: Program, reason: str) -> None:
        insn = program[index] if index < len(program) else None
        shown = f" ({text(insn)})" if insn is not None and invalid(insn) is None else ""
        super().__init__(f"eBPF instruction {index}{shown}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Helper:
    """What a program can call: *arguments* numbers in r1 and up; the result, a number, is in r0."""

    name: str
    arguments: int


@dataclass(frozen=True, slots=True)
class State:
    """What is known between two instructions: of r0-r10, and which bytes of the stack are written (bit 0: lowest)."""

    registers: tuple[Value, ...]
    stack: int

    def with_register(self, number: int, value: Value) -> State:
        return State((*self.registers[:number], value, *self.registers[number + 1 :]), self.stack)

    def merged(self, other: State) -> State:
        registers = tuple(merge(a, b) for a, b in zip(self.registers, other.registers, strict=True))
        return State(registers, self.stack & other.stack)


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction that can be reached: what is known before it and after it, and the indices that can follow."""

    before: State
    after: State
    successors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckedProgram:
    """A program that may run. *steps* has None where an instruction cannot be reached."""

    program: Program
    steps: tuple[Step | None, ...]
    regions: Mapping[int, int]
    """Sizes in bytes of the regions it was checked with."""
    helpers: Mapping[int, Helper]
    stack_used: int
    """How many bytes of the stack it touches, counted from its end."""


def check(
    program: Program, regions: Mapping[int, int] | None = None, helpers: Mapping[int, Helper] | None = None
) -> CheckedProgram:
    """Prove *program* harmless.

    :param regions: sizes in bytes of the regions that it may use, by number; each begins at a multiple of 8.
    :param helpers: what it may call, by number.
    :raises BpfRefusedError: with the first instruction, in program order, that breaks a rule.
    """
    return _Checker(program, dict(regions or {}), dict(helpers or {})).run()


class _Checker:
    def __init__(self, program: Program, regions: dict[int, int], helpers: dict[int, Helper]) -> None:
        self.program = program
        self.regions = regions
        self.helpers = helpers
        self.index = 0
        self.lowest = 0
        slots = [0]
        for insn in program:
            slots.append(slots[-1] + insn.slots)
        self.slot_of = slots
        self.index_at = {slot: index for index, slot in enumerate(slots[:-1])}

    def refuse(self, reason: str) -> BpfRefusedError:
        return BpfRefusedError(self.index, self.program, reason)

    def run(self) -> CheckedProgram:
        if not self.program:
            raise self.refuse("the program is empty")
        if len(self.program) > MOST_INSNS:
            raise self.refuse(f"the program has more than {MOST_INSNS} instructions")
        unwritten = Unreadable("was never written")
        entry = State((unwritten, ContextPointer(0), *(unwritten,) * 8, StackPointer(0)), 0)
        states: list[State | None] = [entry, *(None,) * (len(self.program) - 1)]
        steps: list[Step | None] = []
        for index, insn in enumerate(self.program):
            self.index = index
            if (reason := invalid(insn)) is not None:
                raise self.refuse(reason)
            targets = self.targets(insn)
            before = states[index]
            if before is None:
                steps.append(None)
                continue
            after = self.execute(insn, before)
            successors = self.taken(insn, before, targets)
            for successor in successors:
                other = states[successor]
                states[successor] = after if other is None else other.merged(after)
            steps.append(Step(before, after, successors))
        return CheckedProgram(self.program, tuple(steps), self.regions, self.helpers, -self.lowest)

    # Control

    def targets(self, insn: BpfInsn) -> tuple[int, ...]:
        """The indices that can follow as the encoding has it: fall-through first, then the target of a jump."""
        op = insn.op & 0xF0
        is_jump = insn.cls in (InsnClass.JMP, InsnClass.JMP32)
        if is_jump and op == JmpOp.EXIT:
            return ()
        following = (self.following(),) if not (is_jump and op == JmpOp.JA) else ()
        if not is_jump or op == JmpOp.CALL:
            return following
        distance = insn.imm if insn.cls is InsnClass.JMP32 and op == JmpOp.JA else insn.off
        slot = self.slot_of[self.index] + 1 + distance
        if distance < 0:
            raise self.refuse("jumps go forward only, so that the program ends")
        if slot not in self.index_at:
            inside = slot < self.slot_of[-1]
            raise self.refuse("jumps into the second half of an instruction" if inside else "jumps out of the program")
        return (*following, self.index_at[slot])

    def following(self) -> int:
        if self.index + 1 == len(self.program):
            raise self.refuse("the program goes on after its last instruction: exit is missing")
        return self.index + 1

    def taken(self, insn: BpfInsn, before: State, targets: tuple[int, ...]) -> tuple[int, ...]:
        """Those of *targets* that a jump can really go to."""
        if len(targets) < 2:
            return targets
        left, right = before.registers[insn.dst], self.operand(insn, before)
        if not (isinstance(left, Number) and isinstance(right, Number)):
            return targets if targets[0] != targets[1] else targets[:1]
        bits = 64 if insn.cls is InsnClass.JMP else 32
        return (targets[int(holds(JmpOp(insn.op & 0xF0), left.value, right.value, bits))],)

    # Registers

    def execute(self, insn: BpfInsn, before: State) -> State:
        """The state after *insn*, or a refusal."""
        if insn.op == LD_IMM64:
            return self.write(insn.dst, before, self.wide_load(insn))
        match insn.cls:
            case InsnClass.ALU | InsnClass.ALU64:
                return self.write(insn.dst, before, self.alu(insn, before))
            case InsnClass.JMP | InsnClass.JMP32:
                return self.jump(insn, before)
            case InsnClass.LDX:
                self.read(insn.src, before)
                return self.write(insn.dst, before, self.load(insn, before))
            case _:
                return self.store(insn, before)

    def read(self, number: int, state: State) -> Value:
        value = state.registers[number]
        if isinstance(value, Unreadable):
            raise self.refuse(f"r{number} {value.why}")
        return value

    def number(self, number: int, state: State, what: str) -> Value:
        value = self.read(number, state)
        if not is_number(value):
            raise self.refuse(f"r{number} is a pointer: {what}")
        return value

    def write(self, number: int, state: State, value: Value) -> State:
        if number == R10:
            raise self.refuse("r10 cannot be written")
        return state.with_register(number, value)

    def operand(self, insn: BpfInsn, state: State) -> Value:
        """The second operand of an arithmetic instruction or a jump."""
        return state.registers[insn.src] if insn.op & SRC_X else Number(insn.imm & MASK64)

    def wide_load(self, insn: BpfInsn) -> Value:
        if insn.src == LoadKind.NUMBER:
            return Number(insn.imm)
        region = insn.imm & MASK32
        if region not in self.regions:
            raise self.refuse(f"there is no region {region}")
        return RegionPointer(region, insn.imm >> 32)

    def alu(self, insn: BpfInsn, state: State) -> Value:
        op = AluOp(insn.op & 0xF0)
        by_register = bool(insn.op & SRC_X) and op is not AluOp.END
        source = self.read(insn.src, state) if by_register else Number(insn.imm & MASK64)
        whole = insn.cls is InsnClass.ALU64
        if op is AluOp.MOV:
            if is_number(source):
                return arithmetic(insn, source, source)
            if not whole or insn.off:
                raise self.refuse(f"r{insn.src} is a pointer: only all of it can be moved")
            return source
        target = self.read(insn.dst, state)
        if not is_number(source):
            raise self.refuse(f"r{insn.src} is a pointer: there is no arithmetic with it on this side")
        if is_number(target):
            return arithmetic(insn, target, source)
        if not (whole and op in (AluOp.ADD, AluOp.SUB) and isinstance(source, Number)):
            raise self.refuse(f"r{insn.dst} is a pointer: only constants can be added to it")
        count = to_signed(source.value if op is AluOp.ADD else -source.value, 64)
        return self.moved(target, count)

    def moved(self, pointer: Value, count: int) -> Value:
        match pointer:
            case ContextPointer(offset):
                return ContextPointer(offset + count)
            case StackPointer(offset):
                return StackPointer(offset + count)
            case RegionPointer(region, offset):
                return RegionPointer(region, offset + count)
            case _:
                raise AssertionError(f"{pointer} is no pointer")

    def jump(self, insn: BpfInsn, state: State) -> State:
        op = JmpOp(insn.op & 0xF0)
        match op:
            case JmpOp.JA:
                return state
            case JmpOp.EXIT:
                if isinstance(state.registers[0], ContextPointer | StackPointer | RegionPointer):
                    raise self.refuse("r0 is a pointer: it cannot be returned")
                return state
            case JmpOp.CALL:
                return self.call(insn, state)
            case _:
                self.number(insn.dst, state, "it cannot be compared")
                if insn.op & SRC_X:
                    self.number(insn.src, state, "it cannot be compared")
                return state

    def call(self, insn: BpfInsn, state: State) -> State:
        helper = self.helpers.get(insn.imm)
        if helper is None:
            raise self.refuse(f"there is no helper {insn.imm}")
        for number in range(1, helper.arguments + 1):
            self.number(number, state, f"{helper.name} takes numbers")
        gone = Unreadable(f"was given up to the call of {helper.name}")
        for number in range(1, 6):
            state = state.with_register(number, gone)
        return state.with_register(0, Scalar())

    # Memory

    def load(self, insn: BpfInsn, state: State) -> Value:
        width, signed = Size(insn.op & 0x18).width, insn.op & 0xE0 == Mode.MEMSX
        match self.place(insn.src, insn.off, state):
            case ContextPointer(offset):
                name = _FIELD_AT.get(offset)
                if name is None:
                    raise self.refuse(f"no register is at offset {offset} of the context")
                return Field(name, width, signed)
            case StackPointer(offset):
                self.require_stack(offset, width)
                if ~state.stack & _stack_bits(offset, width):
                    raise self.refuse(f"reads stack bytes at {offset:+d} that were never written")
            case place:
                self.require_region(place, width)
        return Scalar()

    def store(self, insn: BpfInsn, state: State) -> State:
        width = Size(insn.op & 0x18).width
        self.read(insn.dst, state)
        if insn.cls is InsnClass.STX:
            self.number(insn.src, state, "it must not leave the program")
        atomic = insn.cls is InsnClass.STX and insn.op & 0xE0 == Mode.ATOMIC
        if atomic and insn.imm == CMPXCHG:
            self.number(0, state, "it is compared with memory")
        match self.place(insn.dst, insn.off, state):
            case ContextPointer():
                raise self.refuse("the context can only be read")
            case StackPointer(offset):
                self.require_stack(offset, width)
                bits = _stack_bits(offset, width)
                if atomic and ~state.stack & bits:
                    raise self.refuse(f"reads stack bytes at {offset:+d} that were never written")
                state = State(state.registers, state.stack | bits)
                aligned = offset % width == 0
            case place:
                self.require_region(place, width)
                aligned = place.offset % width == 0
        if not atomic:
            return state
        if not aligned:
            raise self.refuse(f"an atomic access of {width} bytes must be aligned")
        if insn.imm == CMPXCHG:
            return self.write(0, state, Scalar())
        return self.write(insn.src, state, Scalar()) if insn.imm & FETCH else state

    def place(self, number: int, displacement: int, state: State) -> ContextPointer | StackPointer | RegionPointer:
        """What ``(rN + displacement)`` points to."""
        pointer = self.read(number, state)
        if is_number(pointer):
            raise self.refuse(f"r{number} is a number, not a pointer")
        moved = self.moved(pointer, displacement)
        assert isinstance(moved, ContextPointer | StackPointer | RegionPointer)
        return moved

    def require_stack(self, offset: int, width: int) -> None:
        if not -STACK_SIZE <= offset <= -width:
            raise self.refuse(f"{width} bytes at {offset:+d} are not within the stack of {STACK_SIZE} bytes")
        self.lowest = min(self.lowest, offset)

    def require_region(self, place: RegionPointer, width: int) -> None:
        size = self.regions[place.region]
        if not 0 <= place.offset <= size - width:
            raise self.refuse(
                f"{width} bytes at {place.offset:+d} are not within region {place.region} of {size} bytes"
            )


def _stack_bits(offset: int, width: int) -> int:
    return ((1 << width) - 1) << (STACK_SIZE + offset)
