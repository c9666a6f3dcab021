"""General instructions for code of our own: operands to bytes, through an :class:`Assembler`.

Only what every x86-64 has. Opcodes are from the Intel SDM, volume 2. The emitter notes which registers and whether the
flags were written, so that who wraps the code knows what to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.assemble import Assembler, Label, fits_s32, rel32


class Gp(IntEnum):
    """The general registers, numbered as the instructions do."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


@dataclass(frozen=True, slots=True)
class Mem:
    """``[base + displacement]``; the displacement is signed, 32 bits."""

    base: Gp
    displacement: int


@dataclass(frozen=True, slots=True)
class At:
    """``[rip + d]``: memory at a known address, within reach of the code."""

    addr: VirtAddr


Rm = Gp | Mem | At
"""What the r/m field of an instruction can name."""


class Op(IntEnum):
    """The two-operand group that the opcodes 00-3F and 80-83 share."""

    ADD = 0
    OR = 1
    AND = 4
    SUB = 5
    XOR = 6
    CMP = 7


class Shift(IntEnum):
    """The group of C1 and D3."""

    ROL = 0
    SHL = 4
    SHR = 5
    SAR = 7


class Cc(IntEnum):
    """Condition codes; the lowest bit negates."""

    B = 0x2
    AE = 0x3
    E = 0x4
    NE = 0x5
    BE = 0x6
    A = 0x7
    L = 0xC
    GE = 0xD
    LE = 0xE
    G = 0xF

    @property
    def inverse(self) -> Cc:
        return Cc(self ^ 1)


_LOCK: Final = b"\xf0"


class Emitter:
    """Each method emits the one instruction that it is named after; *width* is that of the operation, in bytes."""

    def __init__(self, asm: Assembler) -> None:
        self.asm = asm
        self.written: set[Gp] = set()
        """The registers that an instruction emitted so far changes, but for pushes, pops and the stack pointer."""
        self.writes_flags = False

    def _insn(
        self, opcode: bytes, reg: int, rm: Rm, width: int, imm: bytes = b"", *, rm_width: int = 0, lock: bool = False
    ) -> None:
        """*reg* is a register or the opcode's extension; *rm_width* is given where it is not *width*."""
        rex = (width == 8) << 3 | reg >> 3 << 2 | _high(rm)
        # Without REX, 4-7 name ah, ch, dh, bh.
        byte_rm = isinstance(rm, Gp) and (rm_width or width) == 1 and 4 <= rm <= 7
        byte_reg = width == 1 and 4 <= reg <= 7
        prefix = (_LOCK if lock else b"") + (b"\x66" if width == 2 else b"")
        if rex or byte_rm or byte_reg:
            prefix += bytes((0x40 | rex,))
        code = prefix + opcode + _modrm(reg & 7, rm)
        if isinstance(rm, At):
            at = self.asm.pc
            code += rel32("an access", at, offset(at, len(code) + 4 + len(imm)), rm.addr)
        self.asm.raw(code + imm)

    def _note(self, *changed: Rm, flags: bool = False) -> None:
        self.written.update(rm for rm in changed if isinstance(rm, Gp))
        self.writes_flags |= flags

    # Moves: none of them touches the flags.

    def mov(self, dst: Gp, src: Rm, width: int) -> None:
        """32 bits clear the upper half; of 8 and 16 the rest stays."""
        self._note(dst)
        self._insn(b"\x8a" if width == 1 else b"\x8b", dst, src, width)  # mov r, r/m

    def store(self, dst: Rm, src: Gp, width: int) -> None:
        self._note(dst)
        self._insn(b"\x88" if width == 1 else b"\x89", src, dst, width)  # mov r/m, r

    def store_imm(self, dst: Mem | At, value: int, width: int) -> None:
        """*value* modulo the width; of 8 bytes it must be a sign-extended 32-bit number."""
        self._insn(b"\xc6" if width == 1 else b"\xc7", 0, dst, width, _imm(value, width))  # mov m, imm

    def mov_imm(self, dst: Gp, value: int) -> None:
        """All 64 bits of *dst*, by the shortest move."""
        self._note(dst)
        value &= 0xFFFF_FFFF_FFFF_FFFF
        if value <= 0xFFFF_FFFF:
            rex = b"\x41" if dst >> 3 else b""
            self.asm.raw(rex + bytes((0xB8 | dst & 7,)) + value.to_bytes(4, "little"))  # mov r32, imm32
        elif fits_s32(value):
            self._insn(b"\xc7", 0, dst, 8, _imm(value, 8))  # mov r64, imm32
        else:
            self.asm.raw(bytes((0x48 | dst >> 3, 0xB8 | dst & 7)) + value.to_bytes(8, "little"))  # mov r64, imm64

    def movzx(self, dst: Gp, src: Rm, width: int) -> None:
        """From *width* bytes, 1 or 2, to 64 bits."""
        self._note(dst)
        self._insn(b"\x0f\xb6" if width == 1 else b"\x0f\xb7", dst, src, 4, rm_width=width)  # movzx r32, r/m

    def movsx(self, dst: Gp, src: Rm, width: int, to: int = 8) -> None:
        """From *width* bytes, 1, 2 or 4, to *to* bytes, 8 or 4."""
        self._note(dst)
        opcode = {1: b"\x0f\xbe", 2: b"\x0f\xbf", 4: b"\x63"}[width]
        self._insn(opcode, dst, src, to, rm_width=width)  # movsx(d) r, r/m

    def lea(self, dst: Gp, src: Mem | At) -> None:
        if dst is not Gp.RSP:
            self._note(dst)
        self._insn(b"\x8d", dst, src, 8)  # lea r64, m

    def push(self, register: Gp) -> None:
        self.asm.raw((b"\x41" if register >> 3 else b"") + bytes((0x50 | register & 7,)))  # push r64

    def pop(self, register: Gp) -> None:
        self.asm.raw((b"\x41" if register >> 3 else b"") + bytes((0x58 | register & 7,)))  # pop r64

    def bswap(self, register: Gp, width: int) -> None:
        self._note(register)
        rex = (width == 8) << 3 | register >> 3
        prefix = bytes((0x40 | rex,)) if rex else b""
        self.asm.raw(prefix + bytes((0x0F, 0xC8 | register & 7)))  # bswap r

    # Arithmetic

    def alu(self, op: Op, dst: Gp, src: Rm, width: int) -> None:
        self._note(*(() if op is Op.CMP else (dst,)), flags=True)
        self._insn(bytes((op << 3 | (2 if width == 1 else 3),)), dst, src, width)  # op r, r/m

    def alu_store(self, op: Op, dst: Rm, src: Gp, width: int, *, lock: bool = False) -> None:
        self._note(*(() if op is Op.CMP else (dst,)), flags=True)
        self._insn(bytes((op << 3 | (0 if width == 1 else 1),)), src, dst, width, lock=lock)  # op r/m, r

    def alu_imm(self, op: Op, dst: Rm, value: int, width: int, *, lock: bool = False) -> None:
        """*value* modulo the width; of 8 bytes it must be a sign-extended 32-bit number."""
        self._note(*(() if op is Op.CMP else (dst,)), flags=True)
        if width == 1:
            self._insn(b"\x80", op, dst, 1, _imm(value, 1), lock=lock)  # op r/m8, imm8
        elif -0x80 <= _signed(value, width) <= 0x7F:
            self._insn(b"\x83", op, dst, width, _imm(value, 1), lock=lock)  # op r/m, imm8
        else:
            self._insn(b"\x81", op, dst, width, _imm(value, width), lock=lock)  # op r/m, imm32

    def test(self, left: Rm, right: Gp, width: int) -> None:
        self._note(flags=True)
        self._insn(b"\x84" if width == 1 else b"\x85", right, left, width)  # test r/m, r

    def test_imm(self, left: Rm, value: int, width: int) -> None:
        self._note(flags=True)
        self._insn(b"\xf6" if width == 1 else b"\xf7", 0, left, width, _imm(value, width))  # test r/m, imm

    def neg(self, register: Gp, width: int) -> None:
        self._note(register, flags=True)
        self._insn(b"\xf7", 3, register, width)  # neg r

    def imul(self, dst: Gp, src: Rm, width: int) -> None:
        self._note(dst, flags=True)
        self._insn(b"\x0f\xaf", dst, src, width)  # imul r, r/m

    def imul_imm(self, dst: Gp, src: Rm, value: int, width: int) -> None:
        self._note(dst, flags=True)
        self._insn(b"\x69", dst, src, width, _imm(value, width))  # imul r, r/m, imm32

    def shift_imm(self, kind: Shift, register: Gp, count: int, width: int) -> None:
        self._note(register, flags=True)
        self._insn(b"\xc1", kind, register, width, _imm(count, 1))  # shift r, imm8

    def shift_cl(self, kind: Shift, register: Gp, width: int) -> None:
        self._note(register, flags=True)
        self._insn(b"\xd3", kind, register, width)  # shift r, cl

    def extend_rax(self, width: int) -> None:
        """The sign of rax or eax into rdx or edx."""
        self._note(Gp.RDX)
        self.asm.raw(b"\x48\x99" if width == 8 else b"\x99")  # cqo, cdq

    def div(self, divisor: Gp, width: int, *, signed: bool) -> None:
        """rdx:rax by *divisor*: quotient to rax, remainder to rdx."""
        self._note(Gp.RAX, Gp.RDX, flags=True)
        self._insn(b"\xf7", 7 if signed else 6, divisor, width)  # idiv or div r

    # Atomic with memory

    def xchg(self, memory: Mem | At, register: Gp, width: int) -> None:
        self._note(register)
        self._insn(b"\x87", register, memory, width)  # xchg m, r

    def lock_xadd(self, memory: Mem | At, register: Gp, width: int) -> None:
        self._note(register, flags=True)
        self._insn(b"\x0f\xc1", register, memory, width, lock=True)  # lock xadd m, r

    def lock_cmpxchg(self, memory: Mem | At, register: Gp, width: int) -> None:
        self._note(Gp.RAX, flags=True)
        self._insn(b"\x0f\xb1", register, memory, width, lock=True)  # lock cmpxchg m, r

    # Control

    def jcc(self, condition: Cc, target: Label) -> None:
        self.asm.jcc_rel32(condition, target)

    def jmp(self, target: Label) -> None:
        self.asm.jmp_rel32(target)


def _high(rm: Rm) -> int:
    match rm:
        case Gp():
            return rm >> 3
        case Mem():
            return rm.base >> 3
        case At():
            return 0


def _modrm(reg: int, rm: Rm) -> bytes:
    match rm:
        case Gp():
            return bytes((0xC0 | reg << 3 | rm & 7,))
        case At():
            return bytes((reg << 3 | 5,))
        case Mem(base, displacement):
            sib = b"\x24" if base & 7 == 4 else b""  # rsp and r12 can be a base only there
            low = reg << 3 | base & 7
            if displacement == 0 and base & 7 != 5:  # rbp and r13 always have a displacement
                return bytes((low,)) + sib
            if -0x80 <= displacement <= 0x7F:
                return bytes((0x40 | low,)) + sib + displacement.to_bytes(1, "little", signed=True)
            return bytes((0x80 | low,)) + sib + displacement.to_bytes(4, "little", signed=True)


def _signed(value: int, width: int) -> int:
    value &= (1 << 8 * width) - 1
    return value - (1 << 8 * width) if value >> (8 * width - 1) else value


def _imm(value: int, width: int) -> bytes:
    """The immediate of an operation of *width* bytes; there are none of 8."""
    if width == 8:
        assert fits_s32(value), f"{value:#x} is not a sign-extended 32-bit number"
    size = min(width, 4)
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")
