"""The code that the jump of an optimized probe leads to: handle the hit, do what was displaced, go back. Pure: bytes.

::

    save the flags, if a handler changes them and they are alive
    the handlers
    restore the flags
    the displaced instructions, relocated; jmp behind the window

It runs as the probed code does: on the same stack, with interrupts as they are, on whatever CPU. So it holds nothing
that belongs to a CPU, and what it counts is changed by one ``lock`` instruction. The kernel is compiled without a red
zone: below RSP is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from gdb_kprobe.bpf.frame import InDetour
from gdb_kprobe.bpf.jit import Prepared
from gdb_kprobe.kprobes.handler import Handler
from gdb_kprobe.kprobes.patch import CodePatch, over
from gdb_kprobe.kprobes.window import JUMP_SIZE, Window
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.assemble import Assembler, rel32
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.detour import displaced
from gdb_kprobe.x86.emit import Gp


class Flags(Enum):
    """What must be done about the arithmetic flags where a handler changes them."""

    DEAD = auto()
    """Nothing: nobody reads them before they are written again."""
    LAHF = auto()
    """``lahf`` and ``seto``, back by ``add`` and ``sahf``: much cheaper than the other under TCG."""
    PUSHF = auto()
    """``pushfq`` and ``popfq``: for a CPU without ``lahf`` in 64-bit mode."""


@dataclass(frozen=True, slots=True)
class Action:
    """What a hit does in the guest."""

    handlers: tuple[Handler, ...] = ()


@dataclass(frozen=True, slots=True)
class _Wrap:
    """What goes around the handlers, and how they find the registers in between."""

    save: bytes
    restore: bytes
    pushed: int
    saved: tuple[tuple[str, int], ...]

    def frame(self, ip: VirtAddr) -> InDetour:
        return InDetour(ip, self.pushed, dict(self.saved))


_NONE = _Wrap(b"", b"", 0, ())
_PUSHF = _Wrap(b"\x9c", b"\x9d", 8, (("eflags", 0),))  # pushfq; popfq
# push rax; lahf; seto al; and back: add al, 127 (OF again); sahf; pop rax
_LAHF = _Wrap(b"\x50\x9f\x0f\x90\xc0", b"\x04\x7f\x9e\x58", 8, (("rax", 0),))
# The same, with the flags on the stack as well: for a handler that uses rax.
_LAHF_PUSHED = _Wrap(_LAHF.save + b"\x50", b"\x58" + _LAHF.restore, 16, (("rax", 8),))


@dataclass(frozen=True, slots=True)
class Detour:
    """What goes out of line for *window*. *insns* are those that are executed, *text* the window's bytes."""

    window: Window
    insns: Sequence[Insn]
    text: bytes
    action: Action
    flags: Flags

    @property
    def size(self) -> int:
        """Bytes of :meth:`emit`; they do not depend on the address.

        :raises RelocateError: as :meth:`emit`.
        """
        return len(self.emit(self.window.end))

    def emit(self, at: VirtAddr) -> bytes:
        """The code for the address *at*.

        :raises RelocateError: something that an instruction refers to is out of reach.
        :raises DisplacementError: what a handler refers to is out of reach.
        """
        asm = Assembler(at)
        wrap = self._wrap()
        frame = wrap.frame(self.window.start)
        asm.raw(wrap.save)
        for handler in self.action.handlers:
            handler.emit(asm, frame)
        asm.raw(wrap.restore)
        return asm.finish() + displaced(self.insns, asm.pc, self.window.end, self.window.jump_end)

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
            return [handler.program.prepared(frame) for handler in self.action.handlers]

        plain = prepared(_NONE)
        if any(program.reads_flags for program in plain):
            return _PUSHF
        if self.flags is Flags.DEAD or not any(program.clobbers_flags for program in plain):
            return _NONE
        if self.flags is Flags.PUSHF:
            return _PUSHF
        return _LAHF_PUSHED if any(Gp.RAX in program.clobbers for program in prepared(_LAHF)) else _LAHF
