"""Bytes to :class:`Insn`; the only module that knows capstone.

capstone gives the text and a second opinion on the length. All positions come from :mod:`gdb_kprobe.x86.encoding`.
Where the two disagree the instruction is refused, but for those few that :mod:`gdb_kprobe.x86.capstone_gaps` lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import capstone

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.capstone_gaps import name_of
from gdb_kprobe.x86.encoding import MAX_LENGTH, Encoding, EncodingError, parse


class DecodeError(KprobeError):
    """The bytes at *addr* are not one instruction that this project understands."""

    def __init__(self, addr: VirtAddr, raw: bytes, detail: str) -> None:
        super().__init__(
            f"cannot decode the instruction at {addr:#x} ({raw[:MAX_LENGTH].hex(' ') or 'no bytes'}): {detail}",
            "the address must be the first byte of an instruction; decode from the start of the function",
        )
        self.addr = addr
        self.raw = raw
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Insn:
    """One instruction as it stands at *addr* in the guest.

    *op_str* is empty where the disassembler does not know the instruction.
    """

    addr: VirtAddr
    raw: bytes
    mnemonic: str
    op_str: str
    encoding: Encoding

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.op_str}".rstrip()

    @property
    def length(self) -> int:
        return len(self.raw)

    @property
    def end(self) -> VirtAddr:
        """Address of the instruction that follows: the return address of a call."""
        return offset(self.addr, len(self.raw))

    # Opcode and operands

    @property
    def prefixes(self) -> bytes:
        """The legacy prefixes in their order, without REX."""
        return self.encoding.prefixes

    @property
    def has_repeat_prefix(self) -> bool:
        """F2 or F3 stands in front: ``rep``, or a part of the opcode, or ignored."""
        return 0xF3 in self.encoding.prefixes or 0xF2 in self.encoding.prefixes

    @property
    def rex(self) -> int:
        return self.encoding.rex

    @property
    def opcode(self) -> int:
        return self.encoding.opcode

    @property
    def opcode_map(self) -> int:
        return self.encoding.map

    @property
    def modrm(self) -> int | None:
        return self.encoding.modrm

    @property
    def reg(self) -> int | None:
        """Bits 3-5 of ModRM: the register operand or, in a group, the rest of the opcode."""
        return None if self.encoding.modrm is None else self.encoding.modrm >> 3 & 7

    @property
    def has_memory_operand(self) -> bool:
        """The ModRM operand is in memory (``lea`` and nops included, implied operands such as the stack not)."""
        return self.encoding.modrm is not None and self.encoding.modrm < 0xC0 and not self._is_legacy(1, 0x20, 0x23)

    @property
    def displacement(self) -> int | None:
        """The signed displacement of the memory operand."""
        start, size = self.encoding.disp_offset, self.encoding.disp_size
        return int.from_bytes(self.raw[start : start + size], "little", signed=True) if size else None

    @property
    def immediate(self) -> int | None:
        """The signed immediate; of a relative branch the signed displacement."""
        start, size = self.encoding.imm_offset, self.encoding.imm_size
        return int.from_bytes(self.raw[start : start + size], "little", signed=True) if size else None

    @property
    def is_rip_relative(self) -> bool:
        """The memory operand's address counts from the end of the instruction (ModRM mod 0, rm 5)."""
        return self.has_memory_operand and self.encoding.modrm is not None and self.encoding.modrm & 0xC7 == 0x05

    @property
    def rip_target(self) -> VirtAddr | None:
        """Address of the RIP-relative operand, without the base of a segment prefix."""
        displacement = self.displacement
        if not self.is_rip_relative or displacement is None:
            return None
        target = offset(self.end, displacement)
        return VirtAddr(target & 0xFFFF_FFFF) if 0x67 in self.prefixes else target

    # Control flow

    def _is_legacy(self, opcode_map: int, first: int, last: int) -> bool:
        encoding = self.encoding
        return not encoding.space and encoding.map == opcode_map and first <= encoding.opcode <= last

    @property
    def is_jcc(self) -> bool:
        return self._is_legacy(0, 0x70, 0x7F) or self._is_legacy(1, 0x80, 0x8F)

    @property
    def condition(self) -> int | None:
        """The condition code 0-15 of a jcc (0 ``o``, 1 ``no``, 2 ``b``, ... as in its opcode)."""
        return self.encoding.opcode & 0xF if self.is_jcc else None

    @property
    def is_loop(self) -> bool:
        """``loopne``, ``loope``, ``loop`` or ``jrcxz``."""
        return self._is_legacy(0, 0xE0, 0xE3)

    @property
    def is_relative_jmp(self) -> bool:
        return self._is_legacy(0, 0xE9, 0xE9) or self._is_legacy(0, 0xEB, 0xEB)

    @property
    def is_relative_call(self) -> bool:
        return self._is_legacy(0, 0xE8, 0xE8)

    @property
    def is_indirect_call(self) -> bool:
        return self._is_legacy(0, 0xFF, 0xFF) and self.reg == 2

    @property
    def is_indirect_jmp(self) -> bool:
        return self._is_legacy(0, 0xFF, 0xFF) and self.reg == 4

    @property
    def is_call(self) -> bool:
        """A near call: pushes the address of the next instruction."""
        return self.is_relative_call or self.is_indirect_call

    @property
    def is_jmp(self) -> bool:
        """An unconditional near jump."""
        return self.is_relative_jmp or self.is_indirect_jmp

    @property
    def is_ret(self) -> bool:
        """A near return."""
        return self._is_legacy(0, 0xC2, 0xC3)

    @property
    def is_halt(self) -> bool:
        """``hlt``, ``mwait`` or ``mwaitx``: waits for an interrupt."""
        return self._is_legacy(0, 0xF4, 0xF4) or (
            self._is_legacy(1, 0x01, 0x01) and self.encoding.modrm in (0xC9, 0xFB)
        )

    @property
    def is_pause(self) -> bool:
        return self._is_legacy(0, 0x90, 0x90) and 0xF3 in self.encoding.prefixes and not self.encoding.rex & 1

    @property
    def is_branch(self) -> bool:
        """Any near transfer: the next instruction may be another than the one that follows."""
        return self.encoding.relative or self.is_indirect_call or self.is_indirect_jmp or self.is_ret

    @property
    def falls_through(self) -> bool:
        """Execution can go on with the instruction that follows (a call is expected to return)."""
        return not (self.is_jmp or self.is_ret)

    @property
    def branch_target(self) -> VirtAddr | None:
        """Target of a relative branch or call."""
        immediate = self.immediate
        return offset(self.end, immediate) if self.encoding.relative and immediate is not None else None


@cache
def _capstone() -> Any:
    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def decode(code: bytes, addr: VirtAddr) -> Insn:
    """Decode the instruction that begins with the first byte of *code* and stands at *addr*.

    :raises DecodeError: not an instruction, cut off, or the two decoders disagree about it.
    """
    return _decode(code, 0, addr)


def _decode(code: bytes, start: int, addr: VirtAddr) -> Insn:
    window = bytes(code[start : start + MAX_LENGTH + 1])  # one more, to tell too long from cut off
    try:
        encoding = parse(window)
    except EncodingError as error:
        raise DecodeError(addr, window, str(error)) from None
    raw = window[: encoding.length]
    text = next(_capstone().disasm_lite(raw, addr, 1), None)
    if text is not None and text[1] == encoding.length:
        return Insn(addr, raw, text[2], text[3], encoding)
    name = name_of(encoding, raw)
    if name is not None:
        return Insn(addr, raw, name, "", encoding)
    if text is None:
        raise DecodeError(addr, raw, "the disassembler does not know it")
    raise DecodeError(addr, raw, f"the disassembler takes {text[1]} bytes of it, the opcode maps {encoding.length}")


def iter_insns(code: bytes, addr: VirtAddr) -> Iterator[Insn]:
    """Decode *code*, which stands at *addr*, one instruction after another to its end.

    :raises DecodeError: at the first place that cannot be decoded.
    """
    at = 0
    while at < len(code):
        insn = _decode(code, at, offset(addr, at))
        yield insn
        at += insn.length


def boundaries(code: bytes, addr: VirtAddr) -> Iterator[VirtAddr]:
    """Yield the address of every instruction of *code*; fast, for finding out whether an address is a boundary.

    :raises DecodeError: at the first place that is no instruction.
    """
    at = 0
    while at < len(code):
        yield offset(addr, at)
        try:
            at += parse(code, at).length
        except EncodingError as error:
            raise DecodeError(offset(addr, at), bytes(code[at : at + MAX_LENGTH]), str(error)) from None
