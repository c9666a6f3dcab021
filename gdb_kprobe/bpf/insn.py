"""eBPF instructions: their fields, their bytes and their text (RFC 9669, "BPF Instruction Set Architecture").

An instruction that is wide in the encoding (section 5.4, 16 bytes) is one value here; offsets of jumps still count in
units of 8 bytes, as they do in the encoding. Only encodings that the RFC gives a meaning to are accepted: fields that
it does not use must be zero. The legacy packet access instructions (section 5.5) are not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gdb_kprobe.errors import KprobeError

SLOT_SIZE: Final = 8
R10: Final = 10


class InsnClass(IntEnum):
    """The low 3 bits of an opcode (section 3.1)."""

    LD = 0
    LDX = 1
    ST = 2
    STX = 3
    ALU = 4
    JMP = 5
    JMP32 = 6
    ALU64 = 7


class AluOp(IntEnum):
    """Bits 4-7 of an arithmetic opcode (section 4.1)."""

    ADD = 0x00
    SUB = 0x10
    MUL = 0x20
    DIV = 0x30
    OR = 0x40
    AND = 0x50
    LSH = 0x60
    RSH = 0x70
    NEG = 0x80
    MOD = 0x90
    XOR = 0xA0
    MOV = 0xB0
    ARSH = 0xC0
    END = 0xD0


class JmpOp(IntEnum):
    """Bits 4-7 of a jump opcode (section 4.3)."""

    JA = 0x00
    JEQ = 0x10
    JGT = 0x20
    JGE = 0x30
    JSET = 0x40
    JNE = 0x50
    JSGT = 0x60
    JSGE = 0x70
    CALL = 0x80
    EXIT = 0x90
    JLT = 0xA0
    JLE = 0xB0
    JSLT = 0xC0
    JSLE = 0xD0


class Mode(IntEnum):
    """Bits 5-7 of a load or store opcode (section 5)."""

    IMM = 0x00
    MEM = 0x60
    MEMSX = 0x80
    ATOMIC = 0xC0


class Size(IntEnum):
    """Bits 3-4 of a load or store opcode (section 5)."""

    W = 0x00
    H = 0x08
    B = 0x10
    DW = 0x18

    @property
    def width(self) -> int:
        """In bytes."""
        return _WIDTHS[self]


_WIDTHS: Final = {Size.B: 1, Size.H: 2, Size.W: 4, Size.DW: 8}

SRC_X: Final = 0x08
"""The second operand is a register, not the immediate; of a byte swap: to big endian."""

LD_IMM64: Final = InsnClass.LD | Mode.IMM | Size.DW

FETCH: Final = 0x01
XCHG: Final = 0xE1
CMPXCHG: Final = 0xF1

_ATOMIC_ARITHMETIC: Final = {AluOp.ADD: ("+=", "add"), AluOp.OR: ("|=", "or"), AluOp.AND: ("&=", "and"),
                             AluOp.XOR: ("^=", "xor")}  # fmt: skip


class LoadKind(IntEnum):
    """What the immediate of a 64-bit load means: its source field (section 5.4). The other kinds are not known here."""

    NUMBER = 0
    REGION = 2
    """The low half names a region of data that is declared with the program, the high half is an offset in it."""


class BpfEncodingError(KprobeError):
    """Bytes or fields that are no instruction; *index* counts instructions from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"eBPF instruction {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BpfInsn:
    """One instruction. *off* is signed, 16 bits; *imm* is signed, 32 bits, and unsigned, 64 bits, of a wide load."""

    op: int
    dst: int = 0
    src: int = 0
    off: int = 0
    imm: int = 0

    @property
    def cls(self) -> InsnClass:
        return InsnClass(self.op & 0x07)

    @property
    def slots(self) -> int:
        """How many units of 8 bytes it takes."""
        return 2 if self.op == LD_IMM64 else 1


Program = tuple[BpfInsn, ...]


def encode(program: Iterable[BpfInsn]) -> bytes:
    """The program as little-endian bytes.

    :raises BpfEncodingError: an instruction has fields that the RFC gives no meaning to.
    """
    code = bytearray()
    for index, insn in enumerate(program):
        _require_valid(index, insn)
        low = insn.imm & 0xFFFF_FFFF
        code += struct.pack("<BBhI", insn.op, insn.src << 4 | insn.dst, insn.off, low)
        if insn.slots == 2:
            code += struct.pack("<II", 0, insn.imm >> 32)
    return bytes(code)


def decode(code: bytes) -> Program:
    """The instructions in little-endian *code*.

    :raises BpfEncodingError: cut short, or not an instruction.
    """
    program: list[BpfInsn] = []
    at = 0
    while at < len(code):
        index = len(program)
        if at + SLOT_SIZE > len(code):
            raise BpfEncodingError(index, "is cut short")
        op, registers, off, imm = struct.unpack_from("<BBhi", code, at)
        at += SLOT_SIZE
        if op == LD_IMM64:
            if at + SLOT_SIZE > len(code):
                raise BpfEncodingError(index, "is cut short")
            unused, high = struct.unpack_from("<II", code, at)
            if unused:
                raise BpfEncodingError(index, "reserved fields of its second half are not zero")
            imm = high << 32 | imm & 0xFFFF_FFFF
            at += SLOT_SIZE
        insn = BpfInsn(op, registers & 0x0F, registers >> 4, off, imm)
        _require_valid(index, insn)
        program.append(insn)
    return tuple(program)


def _require_valid(index: int, insn: BpfInsn) -> None:
    reason = invalid(insn)
    if reason is not None:
        raise BpfEncodingError(index, reason)


def invalid(insn: BpfInsn) -> str | None:
    """Why *insn* is no instruction of RFC 9669, or None if it is one."""
    if not 0 <= insn.op <= 0xFF:
        return f"opcode {insn.op:#x} is not a byte"
    if not (0 <= insn.dst <= R10 and 0 <= insn.src <= R10):
        return "there are only the registers r0 to r10"
    if not -0x8000 <= insn.off <= 0x7FFF:
        return f"offset {insn.off} does not fit 16 bits"
    if insn.op == LD_IMM64:
        return _invalid_wide_load(insn)
    if not -0x8000_0000 <= insn.imm <= 0x7FFF_FFFF:
        return f"immediate {insn.imm} does not fit 32 bits"
    match insn.cls:
        case InsnClass.ALU | InsnClass.ALU64:
            return _invalid_alu(insn)
        case InsnClass.JMP | InsnClass.JMP32:
            return _invalid_jump(insn)
        case _:
            return _invalid_memory(insn)


def _unused(**fields: int) -> str | None:
    wrong = [name for name, value in fields.items() if value]
    return f"the {wrong[0]} field must be zero here" if wrong else None


def _invalid_wide_load(insn: BpfInsn) -> str | None:
    if not 0 <= insn.imm < 1 << 64:
        return f"immediate {insn.imm} does not fit 64 bits"
    if insn.src not in (LoadKind.NUMBER, LoadKind.REGION):
        return f"a 64-bit load of kind {insn.src} is not known here"
    return _unused(offset=insn.off)


def _unknown(insn: BpfInsn) -> str:
    return f"opcode {insn.op:#04x} is not known"


def _invalid_alu(insn: BpfInsn) -> str | None:
    op, by_register = insn.op & 0xF0, bool(insn.op & SRC_X)
    if op > AluOp.END:
        return _unknown(insn)
    if op == AluOp.END:
        if insn.cls is InsnClass.ALU64 and by_register:
            return _unknown(insn)  # the bit is reserved for an unconditional swap
        if insn.imm not in (16, 32, 64):
            return f"there is no byte swap of {insn.imm} bits"
        return _unused(source=insn.src, offset=insn.off)
    if op == AluOp.NEG:
        return _unknown(insn) if by_register else _unused(source=insn.src, offset=insn.off, immediate=insn.imm)
    operand = _unused(immediate=insn.imm) if by_register else _unused(source=insn.src)
    if op in (AluOp.DIV, AluOp.MOD) and insn.off == 1:
        return operand  # signed
    if op == AluOp.MOV and by_register and insn.off:
        widths = (8, 16) if insn.cls is InsnClass.ALU else (8, 16, 32)
        return operand if insn.off in widths else f"there is no sign extension of {insn.off} bits here"
    return operand or _unused(offset=insn.off)


def _invalid_jump(insn: BpfInsn) -> str | None:
    op, by_register = insn.op & 0xF0, bool(insn.op & SRC_X)
    if op > JmpOp.JSLE:
        return _unknown(insn)
    if op == JmpOp.JA:
        if by_register:
            return _unknown(insn)
        if insn.cls is InsnClass.JMP32:  # gotol: the distance is the immediate
            return _unused(destination=insn.dst, source=insn.src, offset=insn.off)
        return _unused(destination=insn.dst, source=insn.src, immediate=insn.imm)
    if op in (JmpOp.CALL, JmpOp.EXIT):
        if insn.cls is InsnClass.JMP32 or by_register:
            return _unknown(insn)
        if op == JmpOp.EXIT:
            return _unused(destination=insn.dst, source=insn.src, offset=insn.off, immediate=insn.imm)
        if insn.src:
            return "only helpers can be called, by their number"
        return _unused(destination=insn.dst, offset=insn.off)
    return _unused(immediate=insn.imm) if by_register else _unused(source=insn.src)


def _invalid_memory(insn: BpfInsn) -> str | None:
    mode, size = insn.op & 0xE0, Size(insn.op & 0x18)
    match (insn.cls, mode):
        case (InsnClass.LDX | InsnClass.STX, Mode.MEM):
            return _unused(immediate=insn.imm)
        case (InsnClass.LDX, Mode.MEMSX):
            return _unknown(insn) if size is Size.DW else _unused(immediate=insn.imm)
        case (InsnClass.ST, Mode.MEM):
            return _unused(source=insn.src)
        case (InsnClass.STX, Mode.ATOMIC):
            if size not in (Size.W, Size.DW):
                return "an atomic operation has 32 or 64 bits"
            known = insn.imm in (XCHG, CMPXCHG) or insn.imm & ~FETCH in _ATOMIC_ARITHMETIC
            return None if known else f"atomic operation {insn.imm:#x} is not known"
        case _:
            return _unknown(insn)


_ALU_SIGNS: Final = {
    AluOp.ADD: "+=", AluOp.SUB: "-=", AluOp.MUL: "*=", AluOp.DIV: "/=", AluOp.OR: "|=", AluOp.AND: "&=",
    AluOp.LSH: "<<=", AluOp.RSH: ">>=", AluOp.MOD: "%=", AluOp.XOR: "^=", AluOp.MOV: "=", AluOp.ARSH: "s>>=",
}  # fmt: skip

_JMP_SIGNS: Final = {
    JmpOp.JEQ: "==", JmpOp.JGT: ">", JmpOp.JGE: ">=", JmpOp.JSET: "&", JmpOp.JNE: "!=", JmpOp.JSGT: "s>",
    JmpOp.JSGE: "s>=", JmpOp.JLT: "<", JmpOp.JLE: "<=", JmpOp.JSLT: "s<", JmpOp.JSLE: "s<=",
}  # fmt: skip


def text(insn: BpfInsn) -> str:
    """A valid *insn* in the notation of the kernel's ``print_bpf_insn`` (kernel/bpf/disasm.c)."""
    assert invalid(insn) is None, f"{insn}: {invalid(insn)}"
    match insn.cls:
        case InsnClass.LD:
            if insn.src == LoadKind.REGION:
                return f"r{insn.dst} = region[{insn.imm & 0xFFFF_FFFF}]+{insn.imm >> 32}"
            return f"r{insn.dst} = {insn.imm:#x}"
        case InsnClass.ALU | InsnClass.ALU64:
            return _alu_text(insn)
        case InsnClass.JMP | InsnClass.JMP32:
            return _jump_text(insn)
        case _:
            return _memory_text(insn)


def _alu_text(insn: BpfInsn) -> str:
    op = AluOp(insn.op & 0xF0)
    name = "r" if insn.cls is InsnClass.ALU64 else "w"
    dst = f"{name}{insn.dst}"
    if op is AluOp.NEG:
        return f"{dst} = -{dst}"
    if op is AluOp.END:
        kind = "bswap" if insn.cls is InsnClass.ALU64 else "be" if insn.op & SRC_X else "le"
        return f"r{insn.dst} = {kind}{insn.imm} r{insn.dst}"
    operand = f"{name}{insn.src}" if insn.op & SRC_X else str(insn.imm)
    if op is AluOp.MOV and insn.off:
        return f"{dst} = (s{insn.off}){operand}"
    signed = "s" if insn.off else ""
    return f"{dst} {signed}{_ALU_SIGNS[op]} {operand}"


def _jump_text(insn: BpfInsn) -> str:
    op = JmpOp(insn.op & 0xF0)
    if op is JmpOp.EXIT:
        return "exit"
    if op is JmpOp.CALL:
        return f"call #{insn.imm}"
    if op is JmpOp.JA:
        return f"gotol pc{insn.imm:+d}" if insn.cls is InsnClass.JMP32 else f"goto pc{insn.off:+d}"
    name = "r" if insn.cls is InsnClass.JMP else "w"
    operand = f"{name}{insn.src}" if insn.op & SRC_X else f"{insn.imm & 0xFFFF_FFFF:#x}"
    return f"if {name}{insn.dst} {_JMP_SIGNS[op]} {operand} goto pc{insn.off:+d}"


def _memory_text(insn: BpfInsn) -> str:
    mode, bits = Mode(insn.op & 0xE0), Size(insn.op & 0x18).width * 8
    if insn.cls is InsnClass.LDX:
        sign = "s" if mode is Mode.MEMSX else "u"
        return f"r{insn.dst} = *({sign}{bits} *)(r{insn.src} {insn.off:+d})"
    place = f"(u{bits} *)(r{insn.dst} {insn.off:+d})"
    if insn.cls is InsnClass.ST:
        return f"*{place} = {insn.imm}"
    if mode is Mode.MEM:
        return f"*{place} = r{insn.src}"
    prefix = "atomic64" if bits == 64 else "atomic"
    if insn.imm == CMPXCHG:
        return f"r0 = {prefix}_cmpxchg({place}, r0, r{insn.src})"
    if insn.imm == XCHG:
        return f"r{insn.src} = {prefix}_xchg({place}, r{insn.src})"
    sign, name = _ATOMIC_ARITHMETIC[AluOp(insn.imm & ~FETCH)]
    if insn.imm & FETCH:
        return f"r{insn.src} = {prefix}_fetch_{name}({place}, r{insn.src})"
    return f"lock *{place} {sign} r{insn.src}"
