"""Which instructions of a checked program must be compiled, and which of its registers are really used.

A register is really used where it is read and its value is not known: a constant, a field of the context or a pointer
is an operand of the instruction that uses it, and nothing has to make it. A load whose result one instruction uses at
once is that instruction's operand.
"""

from __future__ import annotations

from typing import Final

from gdb_kprobe.bpf.insn import CMPXCHG, FETCH, SRC_X, AluOp, BpfInsn, InsnClass, JmpOp, Mode
from gdb_kprobe.bpf.value import Scalar
from gdb_kprobe.bpf.verifier import CheckedProgram, Step

_FUSABLE: Final = frozenset({AluOp.ADD, AluOp.SUB, AluOp.AND, AluOp.OR, AluOp.XOR})


def is_jump(insn: BpfInsn) -> bool:
    return insn.cls in (InsnClass.JMP, InsnClass.JMP32)


def is_conditional(insn: BpfInsn) -> bool:
    return is_jump(insn) and insn.op & 0xF0 not in (JmpOp.JA, JmpOp.CALL, JmpOp.EXIT)


def is_exit(insn: BpfInsn) -> bool:
    return insn.cls is InsnClass.JMP and insn.op & 0xF0 == JmpOp.EXIT


def is_atomic(insn: BpfInsn) -> bool:
    return insn.cls is InsnClass.STX and insn.op & 0xE0 == Mode.ATOMIC


def is_pure(insn: BpfInsn) -> bool:
    """Whether it does nothing but write a register."""
    return insn.cls in (InsnClass.ALU, InsnClass.ALU64, InsnClass.LD, InsnClass.LDX)


class Needed:
    """Which instructions are emitted, and which registers hold something that is read later.

    Only the registers are counted that are read *as* x86 registers: those whose value is not known
    (:class:`~gdb_kprobe.bpf.value.Scalar`) where they are read.
    """

    def __init__(self, checked: CheckedProgram, decides: bool) -> None:
        """*decides*: what is in r0 at an exit is read."""
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
            if is_pure(insn) and insn.dst not in after:
                live_before[index] = after
                continue
            self.emitted[index] = True
            reads, writes = _reads_writes(checked, insn, step)
            if decides and is_exit(insn) and isinstance(step.before.registers[0], Scalar):
                reads |= {0}
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
                    if _can_fuse(checked.program[user], insn.dst, self.live_after[user]):
                        self.fused[user] = index
                        self.emitted[index] = False
                    break


def _can_fuse(user: BpfInsn, register: int, live: frozenset[int]) -> bool:
    """Whether *register*, just loaded, can be an operand in memory of *user*, after which *live* is read."""
    by_register = bool(user.op & SRC_X)
    if is_conditional(user) and register not in live:
        return (user.dst == register) != (by_register and user.src == register)
    if user.cls in (InsnClass.ALU, InsnClass.ALU64) and by_register and AluOp(user.op & 0xF0) in _FUSABLE:
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
        if step is not None and is_jump(checked.program[index])
        for successor in step.successors
        if successor != index + 1 or len(step.successors) == 1
    )


def _reads_writes(checked: CheckedProgram, insn: BpfInsn, step: Step) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that the emitted *insn* reads as such, and those it writes."""
    reads: set[int] = set()
    writes: set[int] = set()
    if is_pure(insn):
        writes = {insn.dst}
        if isinstance(step.after.registers[insn.dst], Scalar) and insn.cls in (InsnClass.ALU, InsnClass.ALU64):
            op = AluOp(insn.op & 0xF0)
            reads = {insn.dst} if op is not AluOp.MOV else set()
            if insn.op & SRC_X and op is not AluOp.END:
                reads.add(insn.src)
    elif is_conditional(insn):
        if len(step.successors) > 1:
            reads = {insn.dst} | ({insn.src} if insn.op & SRC_X else set())
    elif is_jump(insn):
        if insn.op & 0xF0 == JmpOp.CALL:
            writes = {0, 1, 2, 3, 4, 5}
            reads = set(range(1, checked.helpers[insn.imm].arguments + 1))
    elif insn.cls is InsnClass.STX:
        reads = {insn.src}
        if is_atomic(insn) and insn.imm == CMPXCHG:
            reads.add(0)
            writes = {0}
        elif is_atomic(insn) and insn.imm & FETCH:
            writes = {insn.src}
    unknown = {r for r in reads if isinstance(step.before.registers[r], Scalar)}
    return frozenset(unknown), frozenset(writes)
