"""The anatomy of one x86-64 instruction: where its prefixes, opcode, ModRM, displacement and immediate lie.

An instruction is moved by changing bytes at known offsets, so the offsets must be right for every padding prefix a
compiler or the kernel's alternatives may put in front. They are computed here from the opcode maps (Intel SDM vol. 2,
appendix A; AMD APM vol. 3, appendix A), apart from the disassembler that gives the text:
:func:`gdb_kprobe.x86.decode.decode` lets each check the other.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_LENGTH: Final = 15
"""No x86 instruction is longer; the processor raises #GP."""


class EncodingError(ValueError):
    """The bytes are no 64-bit mode instruction, or one whose length depends on the processor."""


class Encoding(NamedTuple):
    """Offsets count from the first byte of the instruction; a size of 0 means that the part is absent.

    *space* is ``""`` for the legacy encoding, ``"vex"`` or ``"evex"``. *map* is 0 for one-byte opcodes, 1 for ``0f``,
    2 for ``0f 38``, 3 for ``0f 3a`` (EVEX has 5 and 6 besides). *rex* is 0 when there is none, or when a legacy prefix
    follows it and makes it void. *relative* says that the immediate is the displacement of a branch.
    """

    length: int
    prefixes: bytes
    rex: int
    space: str
    map: int
    opcode: int
    opcode_offset: int
    modrm: int | None
    sib: int | None
    disp_offset: int
    disp_size: int
    imm_offset: int
    imm_size: int
    relative: bool

    @property
    def head_size(self) -> int:
        """How many bytes decide the length: all up to ModRM and SIB."""
        return self.opcode_offset + 1 + (self.modrm is not None) + (self.sib is not None)


LEGACY_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")

# One letter an opcode, laid out as the opcode map, rows by the high digit.
#
#   .  nothing follows             M  ModRM                      x  not an instruction in 64-bit mode
#   b  imm8                        B  ModRM + imm8               p  legacy prefix    R  REX
#   w  imm16                       Z  ModRM + imm16/32           E  escape to another map
#   z  imm16/32                    G  ModRM + imm only for /0, /1 (group 3)
#   v  imm16/32/64                 C  ModRM that names registers whatever its mod says (mov cr, mov dr)
#   o  address of 4 or 8 bytes     e  imm16 + imm8 (enter)
#   j  rel8                        J  rel32
_ONE_BYTE: Final = (
    # 123456789abcdef
    "MMMMbzxxMMMMbzxE"  # 00  add .. or, escape
    "MMMMbzxxMMMMbzxx"  # 10  adc .. sbb
    "MMMMbzpxMMMMbzpx"  # 20  and .. sub, es, cs
    "MMMMbzpxMMMMbzpx"  # 30  xor .. cmp, ss, ds
    "RRRRRRRRRRRRRRRR"  # 40  rex
    "................"  # 50  push, pop
    "xxEMppppzZbB...."  # 60  evex, movsxd, fs gs 66 67, push, imul, ins, outs
    "jjjjjjjjjjjjjjjj"  # 70  jcc rel8
    "BZxBMMMMMMMMMMMM"  # 80  group 1, test, xchg, mov, lea, mov sreg, pop
    "..........x....."  # 90  nop, xchg, cdqe, cqo, fwait, pushf, popf, sahf, lahf
    "oooo....bz......"  # a0  mov moffs, movs, cmps, test, stos, lods, scas
    "bbbbbbbbvvvvvvvv"  # b0  mov imm
    "BBw.EEBZe.w..bx."  # c0  shifts, ret, vex, mov imm, enter, leave, retf, int3, int, iret
    "MMMMxxx.MMMMMMMM"  # d0  shifts, xlat, x87
    "jjjjbbbbJJxj...."  # e0  loop, jrcxz, in, out, call, jmp
    "p.pp..GG......MM"  # f0  lock, int1, repne, rep, hlt, cmc, group 3, flags, groups 4 and 5
)
_TWO_BYTE: Final = (
    # 123456789abcdef
    "MMMMx.....x.xM.B"  # 00  groups 6 and 7, lar, lsl, syscall, clts, sysret, invd, ud2, prefetchw, 3dnow
    "MMMMMMMMMMMMMMMM"  # 10  sse moves, prefetch, hint nops
    "CCCCxxxxMMMMMMMM"  # 20  mov cr, mov dr, sse
    "......x.ExExxxxx"  # 30  wrmsr, rdtsc, rdmsr, rdpmc, sysenter, sysexit, getsec, escapes
    "MMMMMMMMMMMMMMMM"  # 40  cmovcc
    "MMMMMMMMMMMMMMMM"  # 50  sse
    "MMMMMMMMMMMMMMMM"  # 60  mmx, sse
    "BBBBMMM.MMxxMMMM"  # 70  mmx, sse, emms, vmread, vmwrite
    "JJJJJJJJJJJJJJJJ"  # 80  jcc rel32
    "MMMMMMMMMMMMMMMM"  # 90  setcc
    "...MBMMM...MBMMM"  # a0  push fs, cpuid, bt, shld, padlock, push gs, rsm, bts, shrd, group 15, imul
    "MMMMMMMMMMBMMMMM"  # b0  cmpxchg, lss, btr, movzx, popcnt, ud1, group 8, btc, bsf, bsr, movsx
    "MMBMBBBM........"  # c0  xadd, cmpps, movnti, pinsrw, shufps, group 9, bswap
    "MMMMMMMMMMMMMMMM"  # d0  mmx, sse
    "MMMMMMMMMMMMMMMM"  # e0  mmx, sse
    "MMMMMMMMMMMMMMMM"  # f0  mmx, sse, ud0
)


def parse(code: bytes, start: int = 0) -> Encoding:
    """Find the parts of the instruction that begins at *start* in *code*.

    :raises EncodingError: no such instruction, or *code* ends within it.
    """
    try:
        encoding = _parse(code, start)
    except IndexError:
        raise EncodingError("the instruction does not end within the bytes given") from None
    if encoding.length > len(code) - start:
        raise EncodingError("the instruction does not end within the bytes given")
    if encoding.length > MAX_LENGTH:
        raise EncodingError(f"longer than {MAX_LENGTH} bytes")
    return encoding


def _parse(code: bytes, start: int) -> Encoding:
    at = start
    byte = code[at]
    rex = 0
    operand16 = address32 = False
    while True:
        kind = _ONE_BYTE[byte]
        if kind == "p":
            rex = 0  # only a REX right before the opcode counts
            operand16 = operand16 or byte == 0x66
            address32 = address32 or byte == 0x67
        elif kind == "R":
            rex = byte
        else:
            break
        at += 1
        byte = code[at]
    prefixes = bytes(b for b in code[start:at] if b in LEGACY_PREFIXES) if at > start else b""

    space, opcode_map = "", 0
    if kind == "E":
        if byte == 0x0F:
            at += 1
            byte = code[at]
            opcode_map, kind = 1, _TWO_BYTE[byte]
            if kind == "E":
                opcode_map, kind = (2, "M") if byte == 0x38 else (3, "B")
                at += 1
                byte = code[at]
        else:
            if rex or set(prefixes) & {0x66, 0xF0, 0xF2, 0xF3}:
                raise EncodingError("REX, 66, lock or rep in front of a VEX or EVEX prefix")
            space, opcode_map, at = _vector_prefix(code, at, byte)
            byte = code[at]
            kind = _vector_kind(opcode_map, byte)
    opcode, opcode_offset = byte, at - start
    at += 1
    if kind == "x":
        raise EncodingError(f"opcode {opcode:02x} of map {opcode_map} is not an instruction in 64-bit mode")

    modrm = sib = None
    disp_offset = disp_size = 0
    if kind in "MBZGC":
        modrm = code[at]
        at += 1
        mod, rm = modrm >> 6, modrm & 7
        if opcode_map == 0 and opcode == 0x8F and modrm & 0x38:
            raise EncodingError("XOP instruction")
        if mod != 3 and kind != "C":
            if rm == 4:
                sib = code[at]
                at += 1
            if mod == 1:
                disp_size = 1
            elif mod == 2 or rm == 5 or (sib is not None and sib & 7 == 5):
                disp_size = 4
            if disp_size:
                disp_offset = at - start
                at += disp_size

    imm_size = _immediate_size(kind, opcode, modrm, bool(rex & 8), operand16, address32)
    imm_offset = at - start if imm_size else 0
    return Encoding(
        at + imm_size - start,
        prefixes,
        rex,
        space,
        opcode_map,
        opcode,
        opcode_offset,
        modrm,
        sib,
        disp_offset,
        disp_size,
        imm_offset,
        imm_size,
        kind in "jJ",
    )


def _immediate_size(kind: str, opcode: int, modrm: int | None, wide: bool, operand16: bool, address32: bool) -> int:
    if kind in "M.C":
        return 0
    if kind in "bBj":
        return 1
    if kind == "J":
        if operand16 and not wide:
            # Intel ignores the prefix; AMD and QEMU take a rel16 and cut the instruction pointer.
            raise EncodingError("66-prefixed near branch: its length depends on the processor")
        return 4
    if kind == "G":
        assert modrm is not None
        if modrm & 0x30:  # not, neg, mul, imul, div, idiv
            return 0
        kind = "b" if opcode == 0xF6 else "z"
    if kind in "zZ":
        return 2 if operand16 and not wide else 4
    if kind == "v":
        return 8 if wide else 2 if operand16 else 4
    if kind == "o":
        return 4 if address32 else 8
    return {"b": 1, "w": 2, "e": 3}[kind]


def _vector_prefix(code: bytes, at: int, byte: int) -> tuple[str, int, int]:
    """Return the encoding space, the opcode map and where the opcode is."""
    if byte == 0xC5:
        return "vex", 1, at + 2
    opcode_map = code[at + 1] & 0x1F
    if byte == 0xC4:
        if opcode_map not in (1, 2, 3):
            raise EncodingError(f"VEX map {opcode_map}")
        return "vex", opcode_map, at + 3
    opcode_map = code[at + 1] & 7
    if opcode_map not in (1, 2, 3, 5, 6):
        raise EncodingError(f"EVEX map {opcode_map}")
    return "evex", opcode_map, at + 4


def _vector_kind(opcode_map: int, opcode: int) -> str:
    if opcode_map == 3:
        return "B"
    if opcode_map == 1:
        if opcode == 0x77:  # vzeroupper
            return "."
        if opcode in (0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6):
            return "B"
    return "M"
