"""Checked eBPF to x86-64, to be put in line: into a detour, or into a handler of the int3.

Registers are mapped as in the kernel's JIT (arch/x86/net/bpf_jit_comp.c), but most values never get into one.
Constants, fields of the context and pointers are operands where they are used, and the instructions that only make them
are left out; a load from memory becomes an operand of the one instruction that uses it. So a counter is one ``lock
inc``, and a filter is a ``cmp`` and a jump.

Passes: what is known where (:mod:`gdb_kprobe.bpf.verifier`) → which instructions are needed (``Needed``) → emission
(``_Compiler``). Which x86 registers must be saved is found by emitting until the set no longer grows: a register that
is saved is read from its place on the stack from then on.

A program may *decide*: what it has in r0 at its exit is a verdict then. It becomes no value but a way: an exit with 0
leads to behind the code, any other to a label of the surroundings.

Layout of the stack while the code runs, from low to high::

    rsp -> the program's stack
           registers that the code changes and its surroundings need
           what the surroundings have pushed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gdb_kprobe.bpf.compile_alu import alu
from gdb_kprobe.bpf.compile_atomic import atomic
from gdb_kprobe.bpf.compile_compare import compare
from gdb_kprobe.bpf.frame import ARGUMENTS, CALLEE_SAVED, Frame, InHandler, free
from gdb_kprobe.bpf.insn import BpfInsn, InsnClass, JmpOp, Size
from gdb_kprobe.bpf.liveness import Needed, is_atomic, is_exit, is_jump, is_pure
from gdb_kprobe.bpf.operands import Operands, RmOperand, stack_size
from gdb_kprobe.bpf.value import MASK64, Number, Scalar
from gdb_kprobe.bpf.verifier import CheckedProgram, Step
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, Label, fits_s32
from gdb_kprobe.x86.emit import Cc, Emitter, Gp, Mem, Op


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
    """The program looks at the probed address, so that its code may depend on it."""
    decides: bool
    """What the program has in r0 at its exit is where the code leads."""
    needed: Needed = field(repr=False, compare=False)
    """What follows from *checked* and *decides*."""

    def moved(self, ip: VirtAddr) -> Prepared:
        """The same program for a probe at *ip*; mostly without the work of :func:`prepare`."""
        frame = replace(self.frame, ip=ip)
        return prepare(self.checked, frame, self.decides) if self.reads_ip else replace(self, frame=frame)

    @property
    def stack(self) -> int:
        """Bytes below rsp that the code uses, without those of the functions it calls."""
        return 8 * len(self.saves) + stack_size(self.checked)


def prepare(checked: CheckedProgram, frame: Frame, decides: bool = False) -> Prepared:
    """Find out what *checked* needs in *frame*.

    :param decides: its r0 is a verdict.
    """
    needed = Needed(checked, decides)
    anywhere = VirtAddr(0)
    saves: tuple[Gp, ...] = ()
    while True:
        out = Emitter(Assembler(anywhere))
        operands = Operands(out, checked, frame, saves, dict.fromkeys(checked.regions, anywhere))
        said = Label("said") if decides else None
        _Compiler(out, checked, needed, operands, dict.fromkeys(checked.helpers, anywhere), said).emit()
        written = frozenset(out.written)
        must = written - free(frame) - set(saves)
        if not must:
            return Prepared(
                checked=checked,
                frame=frame,
                saves=saves,
                clobbers=written - set(saves),
                clobbers_flags=out.writes_flags,
                reads_flags=operands.reads_flags,
                reads_ip=operands.reads_ip,
                decides=decides,
                needed=needed,
            )
        saves += tuple(sorted(must))


def emit(
    asm: Assembler,
    prepared: Prepared,
    regions: Mapping[int, VirtAddr],
    helpers: Mapping[int, VirtAddr] | None = None,
    said: Label | None = None,
) -> None:
    """Emit the program; what follows it in *asm* is where its ``exit`` leads.

    :param regions: where the regions are, by number, within reach of a rel32; each at a multiple of 8.
    :param helpers: where the functions are that it calls.
    :param said: where an ``exit`` leads with another verdict than 0; of a program that decides.
    :raises DisplacementError: one of them is too far away.
    """
    frame = prepared.frame
    saved = isinstance(frame, InHandler) or "eflags" in frame.saved
    assert saved or not prepared.reads_flags, "the program reads the flags: the detour must save them"
    assert prepared.decides is (said is not None), "a verdict leads somewhere"
    out = Emitter(asm)
    operands = Operands(out, prepared.checked, frame, prepared.saves, regions)
    _Compiler(out, prepared.checked, prepared.needed, operands, helpers or {}, said).emit()


class _Compiler:
    """One emission of a program."""

    def __init__(
        self,
        out: Emitter,
        checked: CheckedProgram,
        needed: Needed,
        operands: Operands,
        helpers: Mapping[int, VirtAddr],
        said: Label | None,
    ) -> None:
        self.out = out
        self.said = said
        self.checked = checked
        self.needed = needed
        self.operands = operands
        self.helpers = helpers
        self.labels: dict[int, Label] = {}
        self.end = Label("end")
        self.jumped = False
        """The instruction that was emitted last goes on elsewhere, always."""
        self.leave = said
        """Where another verdict than 0 leads: through the restoring of registers, if there is any."""
        if said is not None and (operands.saves or operands.stack):
            self.leave = Label("leave")

    def emit(self) -> None:
        out, stack = self.out, self.operands.stack
        for register in self.operands.saves:
            out.push(register)
        if stack:
            out.lea(Gp.RSP, Mem(Gp.RSP, -stack))
        inverted = self._inversions()
        left_out = set(inverted.values())
        falls = True
        for index, step in enumerate(self.checked.steps):
            if (label := self.labels.get(index)) is not None:
                out.asm.bind(label)
                falls = True
            if step is None or not self.needed.emitted[index] or index in left_out:
                continue
            begin, self.jumped = out.asm.pc, False
            self._insn(index, step, inverted.get(index))
            if out.asm.pc != begin:
                falls = not self.jumped
        if self.leave is not self.said:
            # In front of the end, so that the way of the rejected hits has no jump more.
            assert self.leave is not None
            assert self.said is not None
            if falls:
                out.jmp(self.end)
            out.asm.bind(self.leave)
            self._restore()
            out.jmp(self.said)
        out.asm.bind(self.end)
        self._restore()

    def _restore(self) -> None:
        if stack := self.operands.stack:
            self.out.lea(Gp.RSP, Mem(Gp.RSP, stack))
        for register in reversed(self.operands.saves):
            self.out.pop(register)

    def _way_out(self, index: int) -> Label | None:
        """Where the exit at *index* leads; ``None``: the code at the exit looks."""
        if self.leave is None:
            return self.end
        step = self.checked.steps[index]
        assert step is not None
        verdict = step.before.registers[0]
        if not isinstance(verdict, Number):
            return None
        return self.leave if verdict.value else self.end

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
            if not is_jump(insn) or len(step.successors) > 1 or insn.op & 0xF0 == JmpOp.CALL:
                break
            if not step.successors:
                return len(self.checked.program) if self._way_out(index) is self.end else index
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
            is_plain = is_jump(insn) and len(plain.successors) < 2 and insn.op & 0xF0 != JmpOp.CALL
            is_plain = is_plain and not (is_exit(insn) and self._way_out(over) is None)
            if is_plain and self._next_emitted(over + 1) == self._next_emitted(step.successors[1]):
                found[index] = over
        return found

    def _label(self, index: int) -> Label:
        destination = self._destination(index)
        if destination == len(self.checked.program):
            return self.end
        if is_exit(self.checked.program[destination]) and (way := self._way_out(destination)) is not None:
            return way
        return self.labels.setdefault(destination, Label(f"instruction {destination}"))

    def _jump_to(self, index: int, target: int | None) -> None:
        """A plain jump, unless the code goes on there anyway; None is the end."""
        destination = len(self.checked.program) if target is None else self._destination(target)
        if self._destination(index + 1) != destination:
            self.out.jmp(self.end if target is None else self._label(target))
            self.jumped = True

    def _insn(self, index: int, step: Step, plain: int | None) -> None:
        """*plain* is the jump that this conditional one jumps over."""
        insn = self.checked.program[index]
        self.operands.begin(self.needed.live_after[index], self._fused(index))
        if is_pure(insn):
            dst = self.operands.mapping[insn.dst]
            value = step.after.registers[insn.dst]
            if not isinstance(value, Scalar):
                self.operands.into(dst, self.operands.known(value, insn.dst))
            elif insn.cls is InsnClass.LDX:
                self.operands.into(dst, self.operands.loaded(insn, step))
            else:
                alu(self.operands, insn, step, dst)
        elif is_jump(insn):
            self._jump(index, insn, step, plain)
        elif is_atomic(insn):
            atomic(self.operands, insn, step)
        else:
            self._store(insn, step)

    def _fused(self, index: int) -> tuple[BpfInsn, Step] | None:
        load = self.needed.fused.get(index)
        if load is None:
            return None
        step = self.checked.steps[load]
        assert step is not None
        return self.checked.program[load], step

    def _store(self, insn: BpfInsn, step: Step) -> None:
        width = Size(insn.op & 0x18).width
        memory = self.operands.memory(step.before.registers[insn.dst], insn.off)
        value = self.operands.operand(insn.src, step) if insn.cls is InsnClass.STX else insn.imm & MASK64
        if isinstance(value, int) and (width < 8 or fits_s32(value)):
            self.out.store_imm(memory, value, width)
        elif isinstance(value, RmOperand) and value.width >= width and isinstance(value.rm, Gp):
            self.out.store(memory, value.rm, width)
        else:
            self.out.store(memory, self.operands.as_register(value, 8), width)

    def _jump(self, index: int, insn: BpfInsn, step: Step, plain: int | None) -> None:
        if insn.op & 0xF0 == JmpOp.CALL:
            self._call(insn, step)
            return
        if is_exit(insn) and self.leave is not None:
            self._decide(index, step)
            return
        if len(step.successors) < 2:
            self._jump_to(index, step.successors[0] if step.successors else None)
            return
        if plain is not None:
            jump = self.checked.steps[plain]
            assert jump is not None
            way_out = None if jump.successors else self._way_out(plain)
            label = self._label(jump.successors[0]) if way_out is None else way_out
        else:
            label = self._label(step.successors[1])
        condition = compare(self.operands, insn, step)
        if isinstance(condition, bool):
            if condition is (plain is None):
                self.out.jmp(label)
        else:
            self.out.jcc(condition if plain is None else condition.inverse, label)

    def _decide(self, index: int, step: Step) -> None:
        """An exit of a program that decides."""
        assert self.leave is not None
        way = self._way_out(index)
        if way is None:
            verdict = self.operands.operand(0, step)
            if isinstance(verdict, int):
                way = self.leave if verdict else self.end
            else:
                self.out.alu_imm(Op.CMP, self.operands.as_rm(verdict, 8), 0, 8)
                self.out.jcc(Cc.NE, self.leave)
                way = self.end
        if way is self.end:
            self._jump_to(index, None)
        else:
            self.out.jmp(way)
            self.jumped = True

    def _call(self, insn: BpfInsn, step: Step) -> None:
        """What a C function may change counts as changed. The stack is as deep as it is: the kernel aligns to 8."""
        arguments = self.checked.helpers[insn.imm].arguments
        in_handler = isinstance(self.operands.frame, InHandler)
        if in_handler:
            self.out.push(Gp.RDI)  # no argument is read from the stack there
        # The first argument last: the fields of the context are read through rdi.
        for number in reversed(range(1, arguments + 1)):
            self.operands.begin(self.operands.live, None)
            self.operands.into(ARGUMENTS[number - 1], self.operands.operand(number, step))
        self.out.asm.call_rel32(self.helpers[insn.imm])
        self.out.written |= set(Gp) - CALLEE_SAVED - {Gp.RSP}
        self.out.writes_flags = True
        if in_handler:
            self.out.pop(Gp.RDI)
            self.out.written.discard(Gp.RDI)
