"""The instructions that a jump has displaced, elsewhere: code that does what they do and goes on behind them.

As :mod:`gdb_kprobe.x86.relocate` does it with one: no register and no flag is used but those of the instructions, and
what a call pushes is an address of the original text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gdb_kprobe.model import AddressRange, Reason, VirtAddr, offset
from gdb_kprobe.x86.assemble import JMP_REL32_SIZE, Assembler, DisplacementError
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.relocate import RelocateError, emit


@dataclass(frozen=True, slots=True)
class Displaced:
    """The copy of displaced instructions at *start*: *ways* are pairs of an instruction's address and its copy's."""

    start: VirtAddr
    code: bytes
    ways: tuple[tuple[VirtAddr, VirtAddr], ...]

    def original(self, addr: VirtAddr) -> VirtAddr | None:
        """The instruction whose copy *addr* is in; ``None``: it is in front of the first."""
        return next((original for original, copy in reversed(self.ways) if copy <= addr), None)

    @property
    def first(self) -> AddressRange:
        """The copy of the first instruction."""
        behind = self.ways[1][1] if len(self.ways) > 1 else offset(self.start, len(self.code))
        return AddressRange(self.start, behind)

    def at(self, addr: int) -> VirtAddr | None:
        """The instruction whose copy begins at *addr*; ``None``: none does."""
        return next((original for original, copy in self.ways if copy == addr), None)

    def way(self, addr: VirtAddr) -> VirtAddr | None:
        """Where the copy of the instruction at *addr* is; ``None`` if there is none."""
        return next((copy for original, copy in self.ways if original == addr), None)


def displaced(insns: Sequence[Insn], slot: VirtAddr, end: VirtAddr, jump_end: VirtAddr) -> Displaced:
    """The code at *slot* that stands in for *insns*, which follow one another.

    A call is the last that is executed here. Where its return address is below *jump_end*, only nops may follow it, and
    it pushes *end* in its place. Behind an unconditional jump or a return nothing is emitted.

    :param end: where the window ends.
    :param jump_end: the first byte behind the jump that is put over the window.
    :raises RelocateError: an instruction is not handled, or something that it refers to is out of reach of *slot*.
    """
    asm = Assembler(slot)
    ways = []
    for insn in insns:
        behind = end if insn.is_call and insn.end < jump_end else insn.end
        ways.append((insn.addr, asm.pc))
        emit(asm, insn, return_to=behind)
        if insn.is_call or not insn.falls_through:
            return Displaced(slot, asm.finish(), tuple(ways))
    try:
        asm.jmp_rel32(end)
    except DisplacementError as error:
        raise RelocateError(Reason.OUT_OF_REACH, f"the window's end {end:#x}: {error.message}") from None
    return Displaced(slot, asm.finish(), tuple(ways))


def displaced_size(insns: Sequence[Insn]) -> int:
    """How many bytes :func:`displaced` gives at most, wherever the slot is.

    :raises RelocateError: an instruction's family is not handled.
    """
    return sum(len(_alone(insn, insns[0].addr)) for insn in insns) + JMP_REL32_SIZE


def _alone(insn: Insn, slot: VirtAddr) -> bytes:
    asm = Assembler(slot)
    emit(asm, insn, return_to=insn.end)
    return asm.finish()
