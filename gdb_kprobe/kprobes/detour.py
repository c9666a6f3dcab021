"""The code that the jump of an optimized probe leads to: handle the hit, do what was displaced, go back. Pure: bytes.

::

    save the flags, if a program changes them and they are alive
    the programs
    restore the flags
    the displaced instructions, relocated; jmp behind the window

and, where the host may be asked (:mod:`gdb_kprobe.kprobes.action`)::

    the rest of the programs
    restore the flags
    ask; jmp to the displaced instructions

It runs as the probed code does: on the same stack, with interrupts as they are, on whatever CPU. So it holds nothing
that belongs to a CPU, and what it counts is changed by one ``lock`` instruction. The kernel is compiled without a red
zone: below RSP is free. Flags that no code reads are dead for the guest, but not for the host: where it may be asked,
they are saved, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from gdb_kprobe.bpf.frame import InDetour
from gdb_kprobe.bpf.jit import Prepared
from gdb_kprobe.kprobes.action import Action, emit_ask, emit_programs, emit_rest
from gdb_kprobe.kprobes.patch import CodePatch, over
from gdb_kprobe.kprobes.window import JUMP_SIZE, Window
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.assemble import Assembler, rel32
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.detour import Displaced, displaced
from gdb_kprobe.x86.emit import Gp


class Flags(Enum):
    """How the arithmetic flags are saved around programs that change them."""

    LAHF = auto()
    """``lahf`` and ``seto``, back by ``add`` and ``sahf``: much cheaper than the other under TCG."""
    PUSHF = auto()
    """``pushfq`` and ``popfq``: for a CPU without ``lahf`` in 64-bit mode."""


@dataclass(frozen=True, slots=True)
class _Wrap:
    """What goes around the programs, and how they find the registers in between.

    *drop* restores all but the flags.
    """

    save: bytes
    restore: bytes
    drop: bytes
    pushed: int
    saved: tuple[tuple[str, int], ...]

    def frame(self, ip: VirtAddr) -> InDetour:
        return InDetour(ip, self.pushed, dict(self.saved))


_NONE = _Wrap(b"", b"", b"", 0, ())
_UP = b"\x48\x8d\x64\x24\x08"  # lea rsp, [rsp+8]
_PUSHF = _Wrap(b"\x9c", b"\x9d", _UP, 8, (("eflags", 0),))  # pushfq; popfq
# push rax; lahf; seto al; and back: add al, 127 (OF again); sahf; pop rax
_LAHF = _Wrap(b"\x50\x9f\x0f\x90\xc0", b"\x04\x7f\x9e\x58", b"\x58", 8, (("rax", 0),))
# The same, with the flags on the stack as well: for a program that uses rax.
_LAHF_PUSHED = _Wrap(_LAHF.save + b"\x50", b"\x58" + _LAHF.restore, _UP + b"\x58", 16, (("rax", 8),))


@dataclass(frozen=True, slots=True)
class DetourCode:
    """A detour for one address.

    :ivar answer: what the guest goes on with when the host does not answer; ``None``: the host is never asked.
    :ivar displaced: what it displaces, with where each instruction is.
    """

    code: bytes
    answer: VirtAddr | None
    displaced: Displaced


@dataclass(frozen=True, slots=True)
class Detour:
    """What goes out of line for *window*. *insns* are those that are executed, *text* the window's bytes.

    *flags_dead*: no code reads the flags before they are written again.
    """

    window: Window
    insns: Sequence[Insn]
    text: bytes
    action: Action
    flags: Flags
    flags_dead: bool = False

    @property
    def size(self) -> int:
        """Bytes of :meth:`emit`; they do not depend on the address.

        :raises RelocateError: as :meth:`emit`.
        """
        return len(self.emit(self.window.end))

    def emit(self, at: VirtAddr) -> bytes:
        """The code for the address *at*.

        :raises RelocateError: something that an instruction refers to is out of reach.
        :raises DisplacementError: what a program refers to is out of reach.
        """
        return self.code(at).code

    def code(self, at: VirtAddr) -> DetourCode:
        """The same, with what it is made of."""
        asm = Assembler(at)
        handlers, ask = self.action.handlers, self.action.ask
        wrap = self._wrap()
        frame = wrap.frame(self.window.start)
        asm.raw(wrap.save)
        said = emit_programs(asm, frame, handlers)
        asm.raw(wrap.drop if self.flags_dead else wrap.restore)
        copy = displaced(self.insns, asm.pc, self.window.end, self.window.jump_end)
        asm.raw(copy.code)
        answer = None
        if ask is not None:
            emit_rest(asm, frame, handlers, said)
            asm.raw(wrap.restore)
            answer = emit_ask(asm, ask)
            asm.jmp_rel32(copy.start)
        return DetourCode(asm.finish(), answer, copy)

    def patch(self, at: VirtAddr) -> CodePatch:
        """The jump to the code at *at*.

        :raises DisplacementError: it is out of reach.
        """
        start = self.window.start
        jump = b"\xe9" + rel32("jmp", start, offset(start, JUMP_SIZE), at)
        return over(start, self.text, jump)

    def _wrap(self) -> _Wrap:
        def prepared(wrap: _Wrap) -> list[Prepared]:
            frame = wrap.frame(self.window.start)
            programs = dict.fromkeys(handler.program for handler in self.action.handlers)
            return [program.prepared(frame) for program in programs]

        plain = prepared(_NONE)
        if any(program.reads_flags for program in plain):
            return _PUSHF
        unread = self.flags_dead and self.action.ask is None
        if unread or not any(program.clobbers_flags for program in plain):
            return _NONE
        if self.flags is Flags.PUSHF:
            return _PUSHF
        return _LAHF_PUSHED if any(Gp.RAX in program.clobbers for program in prepared(_LAHF)) else _LAHF
