"""Checked eBPF to x86-64, to be put in line: into a detour, or into a handler of the int3.

Registers are mapped as in the kernel's JIT (arch/x86/net/bpf_jit_comp.c), but most values never get into one.
Constants, fields of the context and pointers are operands where they are used, and the instructions that only make them
are left out; a load from memory becomes an operand of the one instruction that uses it. So a counter is one ``lock
inc``, and a filter is a ``cmp`` and a jump.

Passes: what is known where (:mod:`gdb_kprobe.bpf.check`) → which instructions are needed (``_Needed``) → emission
(``_Compiler``). Which x86 registers must be saved is found by emitting until the set no longer grows: a register that
is saved is read from its place on the stack from then on.

Layout of the stack while the code runs, from low to high::

    rsp -> the program's stack
           registers that the code changes and its surroundings need
           what the surroundings have pushed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from gdb_kprobe.bpf.check import CheckedProgram, Step
from gdb_kprobe.bpf.insn import (
    CMPXCHG,
    FETCH,
    SRC_X,
    XCHG,
    AluOp,
    BpfInsn,
    InsnClass,
    JmpOp,
    Mode,
    Size,
)
from gdb_kprobe.bpf.value import (
    MASK32,
    MASK64,
    Field,
    Number,
    RegionPointer,
    Scalar,
    StackPointer,
    Value,
    holds,
    to_signed,
)
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, Label, fits_s32
from gdb_kprobe.x86.emit import At, Cc, Emitter, Gp, Mem, Op, Rm, Shift


@dataclass(frozen=True, slots=True)
class InDetour:
    """The code runs with the interrupted registers in the registers.

    :ivar ip: the probed address.
    :ivar pushed: bytes between the interrupted stack pointer and rsp where the code begins.
    :ivar saved: where, from rsp at the beginning, the surroundings keep what they restore themselves: hardware names to
        displacements. These registers are free. ``eflags`` must be here if the program reads it.
    """

    ip: VirtAddr
    pushed: int = 0
    saved: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InHandler:
    """The code runs in a C function: rdi is its ``struct pt_regs *`` and stays so, what a callee may change is free."""


Frame = InDetour | InHandler


@dataclass(frozen=True, slots=True)
class Prepared:
    """A program that is ready to be emitted in one kind of frame."""

    checked: CheckedProgram
    frame: Frame
    saves: tuple[Gp, ...]
    """The registers that the code pushes and pops."""
    clobbers: frozenset[Gp]
    """The registers that do not hold afterwards what they held before."""
    clobbers_flags: bool
    reads_flags: bool
    """The program looks at the interrupted flags."""
    reads_ip: bool
    needed: _Needed = field(repr=False, compare=False)

    def moved(self, ip: VirtAddr) -> Prepared:
        """The same program in the detour of a probe at *ip*; mostly without the work of :func:`prepare`."""
        assert isinstance(self.frame, InDetour)
        frame = replace(self.frame, ip=ip)
        return prepare(self.checked, frame) if self.reads_ip else replace(self, frame=frame)

    @property
    def stack(self) -> int:
        """Bytes below rsp that the code uses, without those of the functions it calls."""
        return 8 * len(self.saves) + _stack_size(self.checked)


_PLAIN: Final = (
    Gp.RAX, Gp.RDI, Gp.RSI, Gp.RDX, Gp.RCX, Gp.R8, Gp.RBX, Gp.R13, Gp.R14, Gp.R15,
)  # fmt: skip
_HANDLER: Final = (Gp.RAX, Gp.R12, *_PLAIN[2:])  # rdi is taken
_SCRATCH: Final = (Gp.R11, Gp.R10, Gp.R9)
_CALLEE_SAVED: Final = frozenset({Gp.RBX, Gp.RBP, Gp.R12, Gp.R13, Gp.R14, Gp.R15})
_ARGUMENTS: Final = (Gp.RDI, Gp.RSI, Gp.RDX, Gp.RCX, Gp.R8)

_KERNEL_CONSTANTS: Final = {"cs": 0x10, "ss": 0x18, "orig_rax": MASK64}
"""What a struct pt_regs that is made in a detour holds (arch/x86/kernel/kprobes/opt.c)."""

_CONDITIONS: Final = {
    JmpOp.JEQ: Cc.E, JmpOp.JNE: Cc.NE, JmpOp.JGT: Cc.A, JmpOp.JGE: Cc.AE, JmpOp.JLT: Cc.B, JmpOp.JLE: Cc.BE,
    JmpOp.JSGT: Cc.G, JmpOp.JSGE: Cc.GE, JmpOp.JSLT: Cc.L, JmpOp.JSLE: Cc.LE, JmpOp.JSET: Cc.NE,
}  # fmt: skip
_UNSIGNED: Final = {Cc.G: Cc.A, Cc.GE: Cc.AE, Cc.L: Cc.B, Cc.LE: Cc.BE}
_MIRRORED: Final = {
    Cc.A: Cc.B, Cc.B: Cc.A, Cc.AE: Cc.BE, Cc.BE: Cc.AE, Cc.G: Cc.L, Cc.L: Cc.G, Cc.GE: Cc.LE, Cc.LE: Cc.GE,
}  # fmt: skip
_GROUP: Final = {AluOp.ADD: Op.ADD, AluOp.SUB: Op.SUB, AluOp.AND: Op.AND, AluOp.OR: Op.OR, AluOp.XOR: Op.XOR}
_SHIFTS: Final = {AluOp.LSH: Shift.SHL, AluOp.RSH: Shift.SHR, AluOp.ARSH: Shift.SAR}


def prepare(checked: CheckedProgram, frame: Frame) -> Prepared:
    """Find out what *checked* needs in *frame*."""
    needed = _Needed(checked)
    anywhere = VirtAddr(0)
    saves: tuple[Gp, ...] = ()
    while True:
        compiler = _Compiler(Assembler(anywhere), checked, needed, frame, saves)
        compiler.emit(dict.fromkeys(checked.regions, anywhere), dict.fromkeys(checked.helpers, anywhere))
        written = frozenset(compiler.out.written)
        must = written - _free(frame) - set(saves)
        if not must:
            return Prepared(
                checked=checked,
                frame=frame,
                saves=saves,
                clobbers=written - set(saves),
                clobbers_flags=compiler.out.writes_flags,
                reads_flags=compiler.reads_flags,
                reads_ip=compiler.reads_ip,
                needed=needed,
            )
        saves += tuple(sorted(must))


def emit(
    asm: Assembler, prepared: Prepared, regions: Mapping[int, VirtAddr], helpers: Mapping[int, VirtAddr] | None = None
) -> None:
    """Emit the program; what follows it in *asm* is where its ``exit`` leads.

    :param regions: where the regions are, by number, within reach of a rel32; each at a multiple of 8.
    :param helpers: where the functions are that it calls.
    :raises DisplacementError: one of them is too far away.
    """
    frame = prepared.frame
    saved = isinstance(frame, InHandler) or "eflags" in frame.saved
    assert saved or not prepared.reads_flags, "the program reads the flags: the detour must save them"
    compiler = _Compiler(asm, prepared.checked, prepared.needed, prepared.frame, prepared.saves)
    compiler.emit(regions, helpers or {})


def _free(frame: Frame) -> frozenset[Gp]:
    """The registers that need not be saved."""
    if isinstance(frame, InHandler):
        return frozenset(Gp) - _CALLEE_SAVED - {Gp.RDI}
    return frozenset(Gp[name.upper()] for name in frame.saved if name.upper() in Gp.__members__)


def _stack_size(checked: CheckedProgram) -> int:
    return -(-checked.stack_used // 8) * 8


def _is_jump(insn: BpfInsn) -> bool:
    return insn.cls in (InsnClass.JMP, InsnClass.JMP32)


def _is_conditional(insn: BpfInsn) -> bool:
    return _is_jump(insn) and insn.op & 0xF0 not in (JmpOp.JA, JmpOp.CALL, JmpOp.EXIT)


def _is_atomic(insn: BpfInsn) -> bool:
    return insn.cls is InsnClass.STX and insn.op & 0xE0 == Mode.ATOMIC


def _is_pure(insn: BpfInsn) -> bool:
    """Whether it does nothing but write a register."""
    return insn.cls in (InsnClass.ALU, InsnClass.ALU64, InsnClass.LD, InsnClass.LDX)


class _Needed:
    """Which instructions are emitted, and which registers hold something that is read later.

    Only the registers are counted that are read *as* x86 registers: those whose value is not known
    (:class:`~gdb_kprobe.bpf.value.Scalar`) where they are read.
    """

    def __init__(self, checked: CheckedProgram) -> None:
        count = len(checked.program)
        self.emitted = [False] * count
        self.live_after: list[frozenset[int]] = [frozenset()] * count
        self.fused: dict[int, int] = {}
        """Instructions that take a load, which is not emitted itself, as their operand: index to index."""
        live_before: list[frozenset[int]] = [frozenset()] * count
        for index in reversed(range(count)):
            step, insn = checked.steps[index], checked.program[index]
            if step is None:
                continue
            after = frozenset().union(*(live_before[successor] for successor in step.successors))
            self.live_after[index] = after
            if _is_pure(insn) and insn.dst not in after:
                live_before[index] = after
                continue
            self.emitted[index] = True
            reads, writes = _reads_writes(checked, insn, step)
            live_before[index] = after - writes | reads
        self._fuse(checked)

    def _fuse(self, checked: CheckedProgram) -> None:
        targets = _join_points(checked)
        for index, insn in enumerate(checked.program):
            if not (self.emitted[index] and insn.cls is InsnClass.LDX and _is_unknown(checked, index, insn.dst)):
                continue
            for user in range(index + 1, len(checked.program)):
                if user in targets:
                    break
                if self.emitted[user]:
                    if self._can_fuse(checked.program[user], insn.dst, self.live_after[user]):
                        self.fused[user] = index
                        self.emitted[index] = False
                    break

    def _can_fuse(self, user: BpfInsn, register: int, live: frozenset[int]) -> bool:
        by_register = bool(user.op & SRC_X)
        if _is_conditional(user) and register not in live:
            return (user.dst == register) != (by_register and user.src == register)
        if user.cls in (InsnClass.ALU, InsnClass.ALU64) and by_register and AluOp(user.op & 0xF0) in _GROUP:
            return user.src == register and user.dst != register and register not in live
        return False


def _is_unknown(checked: CheckedProgram, index: int, register: int) -> bool:
    """Whether *register*, after the instruction at *index*, is in its x86 register or nowhere."""
    step = checked.steps[index]
    return step is not None and isinstance(step.after.registers[register], Scalar)


def _join_points(checked: CheckedProgram) -> frozenset[int]:
    """Where a jump leads."""
    return frozenset(
        successor
        for index, step in enumerate(checked.steps)
        if step is not None and _is_jump(checked.program[index])
        for successor in step.successors
        if successor != index + 1 or len(step.successors) == 1
    )


def _reads_writes(checked: CheckedProgram, insn: BpfInsn, step: Step) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that the emitted *insn* reads as such, and those it writes."""
    reads: set[int] = set()
    writes: set[int] = set()
    if _is_pure(insn):
        writes = {insn.dst}
        if isinstance(step.after.registers[insn.dst], Scalar) and insn.cls in (InsnClass.ALU, InsnClass.ALU64):
            op = AluOp(insn.op & 0xF0)
            reads = {insn.dst} if op is not AluOp.MOV else set()
            if insn.op & SRC_X and op is not AluOp.END:
                reads.add(insn.src)
    elif _is_conditional(insn):
        if len(step.successors) > 1:
            reads = {insn.dst} | ({insn.src} if insn.op & SRC_X else set())
    elif _is_jump(insn):
        if insn.op & 0xF0 == JmpOp.CALL:
            writes = {0, 1, 2, 3, 4, 5}
            reads = set(range(1, checked.helpers[insn.imm].arguments + 1))
    elif insn.cls is InsnClass.STX:
        reads = {insn.src}
        if _is_atomic(insn) and insn.imm == CMPXCHG:
            reads.add(0)
            writes = {0}
        elif _is_atomic(insn) and insn.imm & FETCH:
            writes = {insn.src}
    unknown = {r for r in reads if isinstance(step.before.registers[r], Scalar)}
    return frozenset(unknown), frozenset(writes)


@dataclass(frozen=True, slots=True)
class _Place:
    """The low *width* bytes of *rm*, extended to 64 bits by sign or zeros."""

    rm: Rm
    width: int
    signed: bool


_Operand = int | _Place
"""A constant of 64 bits, unsigned, or a place."""


class _Compiler:
    def __init__(
        self, asm: Assembler, checked: CheckedProgram, needed: _Needed, frame: Frame, saves: tuple[Gp, ...]
    ) -> None:
        self.out = Emitter(asm)
        self.checked = checked
        self.needed = needed
        self.frame = frame
        self.saves = saves
        self.mapping = _HANDLER if isinstance(frame, InHandler) else _PLAIN
        self.reads_flags = False
        self.reads_ip = False
        self.stack = _stack_size(checked)
        self.regions: Mapping[int, VirtAddr] = {}
        self.helpers: Mapping[int, VirtAddr] = {}
        self.labels: dict[int, Label] = {}
        self.end = Label("end")
        self.scratch_used = 0
        self.live: frozenset[int] = frozenset()
        self.fused: BpfInsn | None = None
        self.fused_step: Step | None = None

    def emit(self, regions: Mapping[int, VirtAddr], helpers: Mapping[int, VirtAddr]) -> None:
        self.regions, self.helpers = regions, helpers
        out = self.out
        for register in self.saves:
            out.push(register)
        if self.stack:
            out.lea(Gp.RSP, Mem(Gp.RSP, -self.stack))
        inverted = self._inversions()
        for index, step in enumerate(self.checked.steps):
            if (label := self.labels.get(index)) is not None:
                out.asm.bind(label)
            if step is None or not self.needed.emitted[index] or index in inverted.values():
                continue
            self._insn(index, step, inverted.get(index))
        out.asm.bind(self.end)
        if self.stack:
            out.lea(Gp.RSP, Mem(Gp.RSP, self.stack))
        for register in reversed(self.saves):
            out.pop(register)

    # Order of the code

    def _next_emitted(self, index: int) -> int:
        """The first emitted instruction from *index* on; the number of instructions if there is none."""
        while index < len(self.checked.program) and not self.needed.emitted[index]:
            index += 1
        return index

    def _destination(self, index: int) -> int:
        """Where a jump to *index* really leads: through further jumps; the number of instructions is the end."""
        while (index := self._next_emitted(index)) < len(self.checked.program):
            insn, step = self.checked.program[index], self.checked.steps[index]
            assert step is not None
            if not _is_jump(insn) or len(step.successors) > 1 or insn.op & 0xF0 == JmpOp.CALL:
                break
            if not step.successors:
                return len(self.checked.program)
            index = step.successors[0]
        return index

    def _inversions(self) -> dict[int, int]:
        """Conditional jumps over one plain jump, and that jump: they become one jump on the opposite condition.

        Other jumps to the plain one do not matter: they lead to where it leads.
        """
        found = {}
        for index, step in enumerate(self.checked.steps):
            if step is None or len(step.successors) < 2:
                continue
            over = self._next_emitted(index + 1)
            if over == len(self.checked.program):
                continue
            insn, plain = self.checked.program[over], self.checked.steps[over]
            assert plain is not None
            is_plain = _is_jump(insn) and len(plain.successors) < 2 and insn.op & 0xF0 != JmpOp.CALL
            if is_plain and self._next_emitted(over + 1) == self._next_emitted(step.successors[1]):
                found[index] = over
        return found

    def _label(self, index: int) -> Label:
        destination = self._destination(index)
        if destination == len(self.checked.program):
            return self.end
        return self.labels.setdefault(destination, Label(f"instruction {destination}"))

    def _jump_to(self, index: int, target: int | None) -> None:
        """A plain jump, unless the code goes on there anyway; None is the end."""
        destination = len(self.checked.program) if target is None else self._destination(target)
        if self._destination(index + 1) != destination:
            self.out.jmp(self.end if target is None else self._label(target))

    # Operands

    def _scratch(self) -> Gp:
        """A register that holds nothing between instructions; one instruction has at most three."""
        self.scratch_used += 1
        return _SCRATCH[self.scratch_used - 1]

    def _field_place(self, value: Field) -> _Operand:
        if isinstance(self.frame, InHandler):
            return _Place(Mem(Gp.RDI, pt_regs.OFFSETS[value.name]), value.width, value.signed)
        if value.name == "rip" or value.name in _KERNEL_CONSTANTS:
            self.reads_ip |= value.name == "rip"
            whole = self.frame.ip if value.name == "rip" else _KERNEL_CONSTANTS[value.name]
            low = whole & (1 << 8 * value.width) - 1
            return to_signed(low, 8 * value.width) & MASK64 if value.signed else low
        below = self.stack + 8 * len(self.saves)
        if value.name in self.frame.saved:
            self.reads_flags |= value.name == "eflags"
            return _Place(Mem(Gp.RSP, below + self.frame.saved[value.name]), value.width, value.signed)
        if value.name == "rsp":
            register = self._scratch()
            self.out.lea(register, Mem(Gp.RSP, below + self.frame.pushed))
            self._into(register, _Place(register, value.width, value.signed))
            return _Place(register, 8, False)
        if value.name == "eflags":
            # Only said so far; whoever prepares the frame puts them in its *saved*.
            self.reads_flags = True
            return 0
        register = Gp[value.name.upper()]
        if register in self.saves:
            depth = len(self.saves) - 1 - self.saves.index(register)
            return _Place(Mem(Gp.RSP, self.stack + 8 * depth), value.width, value.signed)
        return _Place(register, value.width, value.signed)

    def _operand(self, number: int, step: Step) -> _Operand:
        """What register *number* holds before the instruction of *step*."""
        if self.fused is not None and self.fused.dst == number:
            assert self.fused_step is not None
            return self._loaded(self.fused, self.fused_step)
        return self._known(step.before.registers[number], number)

    def _known(self, value: Value, number: int) -> _Operand:
        match value:
            case Number():
                return value.value
            case Field():
                return self._field_place(value)
            case Scalar():
                return _Place(self.mapping[number], 8, False)
            case _:
                raise AssertionError(f"r{number} is not a number: {value}")

    def _second(self, insn: BpfInsn, step: Step) -> _Operand:
        return self._operand(insn.src, step) if insn.op & SRC_X else insn.imm & MASK64

    def _memory(self, pointer: Value, displacement: int) -> Mem | At:
        match pointer:
            case StackPointer(offset):
                return Mem(Gp.RSP, self.stack + offset + displacement)
            case RegionPointer(region, offset):
                return At(VirtAddr((self.regions[region] + offset + displacement) & MASK64))
            case _:
                raise AssertionError(f"nothing is stored at {pointer}")

    def _loaded(self, insn: BpfInsn, step: Step) -> _Place:
        memory = self._memory(step.before.registers[insn.src], insn.off)
        return _Place(memory, Size(insn.op & 0x18).width, insn.op & 0xE0 == Mode.MEMSX)

    def _into(self, register: Gp, operand: _Operand, width: int = 8) -> None:
        """All of *operand*, or its low 32 bits zero-extended, into *register*."""
        if isinstance(operand, int):
            self.out.mov_imm(register, operand & (MASK64 if width == 8 else MASK32))
            return
        rm = operand.rm
        if operand.width >= width:
            if rm is not register or width == 4:
                self.out.mov(register, rm, width)
        elif operand.signed:
            self.out.movsx(register, rm, operand.width, width)
        elif operand.width == 4:
            self.out.mov(register, rm, 4)
        else:
            self.out.movzx(register, rm, operand.width)

    def _start(self, register: Gp, operand: _Operand, width: int) -> None:
        """The same for an operation of *width* that follows and clears the upper half itself."""
        if not (isinstance(operand, _Place) and operand.rm is register):
            self._into(register, operand, width)

    def _as_rm(self, operand: _Operand, width: int) -> Rm:
        """A place whose *width* bytes, 8 or 4, are those of *operand*."""
        if isinstance(operand, _Place) and operand.width >= width:
            return operand.rm
        register = self._scratch()
        self._into(register, operand, width)
        return register

    def _as_register(self, operand: _Operand, width: int) -> Gp:
        rm = self._as_rm(operand, width)
        if isinstance(rm, Gp):
            return rm
        register = self._scratch()
        self.out.mov(register, rm, width)
        return register

    # Instructions

    def _insn(self, index: int, step: Step, plain: int | None) -> None:
        """*plain* is the jump that this conditional one jumps over."""
        insn = self.checked.program[index]
        self.scratch_used = 0
        self.live = self.needed.live_after[index]
        load = self.needed.fused.get(index)
        self.fused = None if load is None else self.checked.program[load]
        self.fused_step = None if load is None else self.checked.steps[load]
        if _is_pure(insn):
            dst = self.mapping[insn.dst]
            value = step.after.registers[insn.dst]
            if not isinstance(value, Scalar):
                self._into(dst, self._known(value, insn.dst))
            elif insn.cls is InsnClass.LDX:
                self._into(dst, self._loaded(insn, step))
            else:
                self._alu(insn, step, dst)
        elif _is_jump(insn):
            self._jump(index, insn, step, plain)
        elif _is_atomic(insn):
            self._atomic(insn, step)
        else:
            self._store(insn, step)

    def _store(self, insn: BpfInsn, step: Step) -> None:
        width = Size(insn.op & 0x18).width
        memory = self._memory(step.before.registers[insn.dst], insn.off)
        value = self._operand(insn.src, step) if insn.cls is InsnClass.STX else insn.imm & MASK64
        if isinstance(value, int) and (width < 8 or fits_s32(value)):
            self.out.store_imm(memory, value, width)
        elif isinstance(value, _Place) and value.width >= width and isinstance(value.rm, Gp):
            self.out.store(memory, value.rm, width)
        else:
            self.out.store(memory, self._as_register(value, 8), width)

    # Jumps

    def _jump(self, index: int, insn: BpfInsn, step: Step, plain: int | None) -> None:
        if insn.op & 0xF0 == JmpOp.CALL:
            self._call(insn, step)
            return
        if len(step.successors) < 2:
            self._jump_to(index, step.successors[0] if step.successors else None)
            return
        target = step.successors[1]
        if plain is not None:
            jump = self.checked.steps[plain]
            assert jump is not None
            label = self._label(jump.successors[0]) if jump.successors else self.end
        else:
            label = self._label(target)
        condition = self._compare(insn, step)
        if isinstance(condition, bool):
            if condition is (plain is None):
                self.out.jmp(label)
        else:
            self.out.jcc(condition if plain is None else condition.inverse, label)

    def _compare(self, insn: BpfInsn, step: Step) -> Cc | bool:
        """Set the flags, and return the condition on which to jump; a bool if that is certain in this frame."""
        op = JmpOp(insn.op & 0xF0)
        width = 8 if insn.cls is InsnClass.JMP else 4
        condition = _CONDITIONS[op]
        left, right = self._operand(insn.dst, step), self._second(insn, step)
        if isinstance(left, int):
            if isinstance(right, int):
                return holds(op, left, right, 8 * width)
            left, right = right, left
            condition = _MIRRORED.get(condition, condition)
        if isinstance(right, int):
            if op is JmpOp.JSET:
                return self._test_constant(left, right, width)
            return self._compare_constant(left, right, width, condition)
        first, second = self._as_rm(left, width), self._as_rm(right, width)
        if op is JmpOp.JSET:
            if isinstance(second, Gp):
                self.out.test(first, second, width)
            else:
                self.out.test(second, self._as_register(_Place(first, width, False), width), width)
        elif isinstance(first, Gp):
            self.out.alu(Op.CMP, first, second, width)
        else:
            other = self._as_register(_Place(second, width, False), width)
            self.out.alu_store(Op.CMP, first, other, width)
        return condition

    def _compare_constant(self, left: _Place, constant: int, width: int, condition: Cc) -> Cc:
        constant &= (1 << 8 * width) - 1
        if left.width < width:
            low = constant & (1 << 8 * left.width) - 1
            extended = to_signed(low, 8 * left.width) & (1 << 8 * width) - 1 if left.signed else low
            if extended == constant:  # then the narrow values compare as the extended ones do
                condition = condition if left.signed else _UNSIGNED.get(condition, condition)
                width, constant = left.width, low
        rm = left.rm if left.width >= width else self._as_rm(left, width)
        if constant == 0 and isinstance(rm, Gp):
            self.out.test(rm, rm, width)
        elif width < 8 or fits_s32(constant):
            self.out.alu_imm(Op.CMP, rm, constant, width)
        else:
            register = self._scratch()
            self.out.mov_imm(register, constant)
            self.out.alu_store(Op.CMP, rm, register, width)
        return condition

    def _test_constant(self, left: _Place, mask: int, width: int) -> Cc | bool:
        mask &= (1 << 8 * width) - 1
        if left.width < width:
            low = mask & (1 << 8 * left.width) - 1
            if left.signed and low != mask:
                left = _Place(self._as_rm(left, width), width, False)
            else:
                mask = low
        if mask == 0:
            return False
        widths = (1, 4, 8) if isinstance(left.rm, Gp) else (1, 2, 4, 8)
        narrow = next(w for w in widths if mask < 1 << 8 * w)
        if narrow < 8 or fits_s32(mask):
            self.out.test_imm(left.rm, mask, narrow)
        else:
            register = self._scratch()
            self.out.mov_imm(register, mask)
            self.out.test(left.rm, register, 8)
        return Cc.NE

    def _call(self, insn: BpfInsn, step: Step) -> None:
        """What a C function may change counts as changed. The stack is as deep as it is: the kernel aligns to 8."""
        arguments = self.checked.helpers[insn.imm].arguments
        in_handler = isinstance(self.frame, InHandler)
        # The first argument last: the fields of the context are read through rdi.
        for number in reversed(range(1, arguments + 1)):
            register = _ARGUMENTS[number - 1]
            self.scratch_used = 0
            if number == 1 and in_handler:
                first = self._operand(1, step)
                self.out.push(register)  # before the call the operand is read from, and rsp is not in it
            else:
                first = self._operand(number, step)
            if not (isinstance(first, _Place) and first.rm is register and first.width == 8):
                self._into(register, first)
        if in_handler and not arguments:
            self.out.push(Gp.RDI)
        self.out.asm.call_rel32(self.helpers[insn.imm])
        self.out.written |= set(Gp) - _CALLEE_SAVED - {Gp.RSP}
        self.out.writes_flags = True
        if in_handler:
            self.out.pop(Gp.RDI)
            self.out.written.discard(Gp.RDI)

    # Arithmetic

    def _alu(self, insn: BpfInsn, step: Step, dst: Gp) -> None:
        op = AluOp(insn.op & 0xF0)
        width = 8 if insn.cls is InsnClass.ALU64 else 4
        out = self.out
        if op is AluOp.MOV:
            self._mov(insn, step, dst, width)
            return
        target = self._operand(insn.dst, step)
        if op is AluOp.END:
            self._into(dst, target)
            self._swap(insn, dst)
            return
        if op is AluOp.NEG:
            self._start(dst, target, width)
            out.neg(dst, width)
            return
        source = self._second(insn, step)
        if op in (AluOp.DIV, AluOp.MOD):
            self._divide(insn, target, source, dst, width)
            return
        if op in _SHIFTS:
            self._shift(_SHIFTS[op], target, source, dst, width)
            return
        if isinstance(source, int) and (width == 4 or fits_s32(source)):
            self._start(dst, target, width)
            if op is AluOp.MUL:
                out.imul_imm(dst, dst, source, width)
            else:
                out.alu_imm(_GROUP[op], dst, source, width)
            return
        rm = self._as_rm(source, width)
        self._start(dst, target, width)
        if op is AluOp.MUL:
            out.imul(dst, rm, width)
        else:
            out.alu(_GROUP[op], dst, rm, width)

    def _mov(self, insn: BpfInsn, step: Step, dst: Gp, width: int) -> None:
        source = self._operand(insn.src, step)
        if not insn.off:
            self._into(dst, source, width)
            return
        narrow = insn.off // 8
        if isinstance(source, _Place) and source.width >= narrow:
            self.out.movsx(dst, source.rm, narrow, width)
        else:
            self._into(dst, source)
            self.out.movsx(dst, dst, narrow, width)

    def _swap(self, insn: BpfInsn, register: Gp) -> None:
        out = self.out
        if insn.cls is InsnClass.ALU and not insn.op & SRC_X:  # to little endian: only the width is cut
            if insn.imm == 16:
                out.movzx(register, register, 2)
            elif insn.imm == 32:
                out.mov(register, register, 4)
        elif insn.imm == 16:
            out.shift_imm(Shift.ROL, register, 8, 2)
            out.movzx(register, register, 2)
        else:
            out.bswap(register, insn.imm // 8)

    def _shift(self, kind: Shift, target: _Operand, source: _Operand, dst: Gp, width: int) -> None:
        """The count is taken modulo the width by the CPU as by eBPF. A count that is no constant must be in cl."""
        out = self.out
        if isinstance(source, int):
            if count := source & (8 * width - 1):
                self._start(dst, target, width)
                out.shift_imm(kind, dst, count, width)
            else:
                self._into(dst, target, width)
            return
        if source.rm is Gp.RCX and dst is not Gp.RCX:
            self._start(dst, target, width)
            out.shift_cl(kind, dst, width)
            return
        shifted = self._scratch() if dst is Gp.RCX else dst
        self._start(shifted, target, width)
        keep = self._scratch() if dst is not Gp.RCX and self.mapping.index(Gp.RCX) in self.live else None
        if keep is not None:
            out.mov(keep, Gp.RCX, 8)
        if source.rm is not Gp.RCX:
            if source.width >= 4:
                out.mov(Gp.RCX, source.rm, 4)
            else:
                out.movzx(Gp.RCX, source.rm, source.width)
        out.shift_cl(kind, shifted, width)
        if keep is not None:
            out.mov(Gp.RCX, keep, 8)
        if shifted is not dst:
            out.mov(dst, shifted, 8)

    def _divide(self, insn: BpfInsn, target: _Operand, source: _Operand, dst: Gp, width: int) -> None:
        """Total, as the RFC has it: a quotient by 0 is 0, a remainder by 0 the dividend; by -1 nothing overflows."""
        out = self.out
        modulo, signed = insn.op & 0xF0 == AluOp.MOD, bool(insn.off)
        # The operands may be in the scratch registers: the dividend in the first, the divisor in the first or second.
        high, low, divisor = _SCRATCH
        self._into(divisor, source, width)
        save_low = dst is not Gp.RAX and 0 in self.live
        save_high = dst is not Gp.RDX and 3 in self.live
        if save_low:
            out.mov(low, Gp.RAX, 8)
        self._into(Gp.RAX, target, width)
        if save_high:
            out.mov(high, Gp.RDX, 8)
        zero, done = Label("division by zero"), Label("divided")
        result = Gp.RDX if modulo else Gp.RAX
        out.test(divisor, divisor, width)
        out.jcc(Cc.E, zero)
        if signed:
            plain = Label("no overflow")
            out.alu_imm(Op.CMP, divisor, -1, width)
            out.jcc(Cc.NE, plain)
            if modulo:
                out.mov_imm(Gp.RDX, 0)
            else:
                out.neg(Gp.RAX, width)
            out.jmp(done)
            out.asm.bind(plain)
            out.extend_rax(width)
        else:
            out.mov_imm(Gp.RDX, 0)
        out.div(divisor, width, signed=signed)
        out.jmp(done)
        out.asm.bind(zero)
        if modulo:
            out.mov(Gp.RDX, Gp.RAX, width)
        else:
            out.mov_imm(Gp.RAX, 0)
        out.asm.bind(done)
        out.mov(divisor, result, width)
        if save_low:
            out.mov(Gp.RAX, low, 8)
        if save_high:
            out.mov(Gp.RDX, high, 8)
        out.mov(dst, divisor, 8)

    # Atomic operations

    def _atomic(self, insn: BpfInsn, step: Step) -> None:
        width = Size(insn.op & 0x18).width
        memory = self._memory(step.before.registers[insn.dst], insn.off)
        source = self._operand(insn.src, step)
        if insn.imm == CMPXCHG:
            self._cmpxchg(memory, source, self._operand(0, step), width)
            return
        if insn.imm == XCHG:
            register = self.mapping[insn.src]
            self._into(register, source, width)
            self.out.xchg(memory, register, width)
            return
        op = AluOp(insn.imm & ~FETCH)
        if not (insn.imm & FETCH and insn.src in self.live):
            self._update(op, memory, source, width)
        elif op is AluOp.ADD:
            register = self.mapping[insn.src]
            self._into(register, source, width)
            self.out.lock_xadd(memory, register, width)
        else:
            self._fetch(op, memory, source, self.mapping[insn.src], width)

    def _update(self, op: AluOp, memory: Mem | At, source: _Operand, width: int) -> None:
        if isinstance(source, int) and (width == 4 or fits_s32(source)):
            signed = to_signed(source, 8 * width)
            if op is AluOp.ADD and signed == 1:
                self.out.inc(memory, width, lock=True)
            elif op is AluOp.ADD and signed == -1:
                self.out.dec(memory, width, lock=True)
            else:
                self.out.alu_imm(_GROUP[op], memory, source, width, lock=True)
        else:
            self.out.alu_store(_GROUP[op], memory, self._as_register(source, width), width, lock=True)

    def _cmpxchg(self, memory: Mem | At, source: _Operand, compared: _Operand, width: int) -> None:
        register = self._as_register(source, width)
        if not (isinstance(compared, _Place) and compared.rm is Gp.RAX and compared.width == 8):
            self._into(Gp.RAX, compared, width)
        self.out.lock_cmpxchg(memory, register, width)
        if width == 4:
            self.out.mov(Gp.RAX, Gp.RAX, 4)  # a success leaves the upper half

    def _fetch(self, op: AluOp, memory: Mem | At, source: _Operand, dst: Gp, width: int) -> None:
        """What no x86 instruction does at once: try until nobody came between."""
        out = self.out
        new, keep, operand = _SCRATCH
        self._into(operand, source, width)
        if dst is not Gp.RAX and 0 in self.live:
            out.mov(keep, Gp.RAX, 8)
        out.mov(Gp.RAX, memory, width)
        again = Label("again")
        out.asm.bind(again)
        out.mov(new, Gp.RAX, width)
        out.alu(_GROUP[op], new, operand, width)
        out.lock_cmpxchg(memory, new, width)
        out.jcc(Cc.NE, again)
        if dst is not Gp.RAX:
            out.mov(dst, Gp.RAX, 8)
            if 0 in self.live:
                out.mov(Gp.RAX, keep, 8)
