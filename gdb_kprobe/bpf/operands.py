"""Where the values of a program are while its compiled code runs, and the moves between those places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gdb_kprobe.bpf.frame import KERNEL_CONSTANTS, SCRATCH, Frame, InHandler, mapping
from gdb_kprobe.bpf.insn import SRC_X, BpfInsn, Mode, Size
from gdb_kprobe.bpf.value import (
    MASK32,
    MASK64,
    Field,
    Number,
    RegionPointer,
    Scalar,
    StackPointer,
    Value,
    to_signed,
)
from gdb_kprobe.bpf.verifier import CheckedProgram, Step
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.emit import At, Emitter, Gp, Mem, Rm


@dataclass(frozen=True, slots=True)
class RmOperand:
    """The low *width* bytes of *rm*, extended to 64 bits by sign or zeros."""

    rm: Rm
    width: int
    signed: bool


Operand = int | RmOperand
"""A constant of 64 bits, unsigned, or a place."""


def stack_size(checked: CheckedProgram) -> int:
    """Bytes that the stack of *checked* takes, a multiple of 8."""
    return -(-checked.stack_used // 8) * 8


def _part(whole: int, field: Field) -> int:
    """What *field* is when its register holds *whole*."""
    low = whole & (1 << 8 * field.width) - 1
    return to_signed(low, 8 * field.width) & MASK64 if field.signed else low


class Operands:
    """The places as the instruction that is being compiled sees them; :meth:`begin` comes before each."""

    def __init__(
        self,
        out: Emitter,
        checked: CheckedProgram,
        frame: Frame,
        saves: tuple[Gp, ...],
        regions: Mapping[int, VirtAddr],
    ) -> None:
        self.out = out
        self.frame = frame
        self.saves = saves
        self.regions = regions
        self.mapping = mapping(frame)
        self.stack = stack_size(checked)
        self.reads_flags = False
        self.reads_ip = False
        self.live: frozenset[int] = frozenset()
        """The eBPF registers that are read after the instruction."""
        self._scratch_used = 0
        self._fused: tuple[BpfInsn, Step] | None = None

    def begin(self, live: frozenset[int], fused: tuple[BpfInsn, Step] | None) -> None:
        """*fused* is a load that is an operand of the instruction."""
        self.live = live
        self._fused = fused
        self._scratch_used = 0

    def scratch(self) -> Gp:
        """A register that holds nothing between instructions; one instruction has at most three."""
        self._scratch_used += 1
        return SCRATCH[self._scratch_used - 1]

    def _field(self, value: Field) -> Operand:
        if value.name == "rip":
            self.reads_ip = True
            return _part(self.frame.ip, value)
        if isinstance(self.frame, InHandler):
            return RmOperand(Mem(Gp.RDI, pt_regs.OFFSETS[value.name]), value.width, value.signed)
        if value.name in KERNEL_CONSTANTS:
            return _part(KERNEL_CONSTANTS[value.name], value)
        below = self.stack + 8 * len(self.saves)
        if value.name in self.frame.saved:
            self.reads_flags |= value.name == "eflags"
            return RmOperand(Mem(Gp.RSP, below + self.frame.saved[value.name]), value.width, value.signed)
        if value.name == "rsp":
            register = self.scratch()
            self.out.lea(register, Mem(Gp.RSP, below + self.frame.pushed))
            self.into(register, RmOperand(register, value.width, value.signed))
            return RmOperand(register, 8, False)
        if value.name == "eflags":
            # Only said so far; the code that prepares the frame puts them in its *saved*.
            self.reads_flags = True
            return 0
        register = Gp[value.name.upper()]
        if register in self.saves:
            depth = len(self.saves) - 1 - self.saves.index(register)
            return RmOperand(Mem(Gp.RSP, self.stack + 8 * depth), value.width, value.signed)
        return RmOperand(register, value.width, value.signed)

    def operand(self, number: int, step: Step) -> Operand:
        """What register *number* holds before the instruction of *step*."""
        if self._fused is not None and self._fused[0].dst == number:
            return self.loaded(*self._fused)
        return self.known(step.before.registers[number], number)

    def known(self, value: Value, number: int) -> Operand:
        match value:
            case Number():
                return value.value
            case Field():
                return self._field(value)
            case Scalar():
                return RmOperand(self.mapping[number], 8, False)
            case _:
                raise AssertionError(f"r{number} is not a number: {value}")

    def second(self, insn: BpfInsn, step: Step) -> Operand:
        return self.operand(insn.src, step) if insn.op & SRC_X else insn.imm & MASK64

    def memory(self, pointer: Value, displacement: int) -> Mem | At:
        match pointer:
            case StackPointer(offset):
                return Mem(Gp.RSP, self.stack + offset + displacement)
            case RegionPointer(region, offset):
                return At(VirtAddr((self.regions[region] + offset + displacement) & MASK64))
            case _:
                raise AssertionError(f"nothing is stored at {pointer}")

    def loaded(self, insn: BpfInsn, step: Step) -> RmOperand:
        memory = self.memory(step.before.registers[insn.src], insn.off)
        return RmOperand(memory, Size(insn.op & 0x18).width, insn.op & 0xE0 == Mode.MEMSX)

    def into(self, register: Gp, operand: Operand, width: int = 8) -> None:
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

    def start(self, register: Gp, operand: Operand, width: int) -> None:
        """The same for an operation of *width* that follows and clears the upper half itself."""
        if not (isinstance(operand, RmOperand) and operand.rm is register):
            self.into(register, operand, width)

    def as_rm(self, operand: Operand, width: int) -> Rm:
        """A place whose *width* bytes, 8 or 4, are those of *operand*."""
        if isinstance(operand, RmOperand) and operand.width >= width:
            return operand.rm
        register = self.scratch()
        self.into(register, operand, width)
        return register

    def as_register(self, operand: Operand, width: int) -> Gp:
        rm = self.as_rm(operand, width)
        if isinstance(rm, Gp):
            return rm
        register = self.scratch()
        self.out.mov(register, rm, width)
        return register
