"""What an instruction reads and what it overwrites of the status flags and of the general registers.

The rules are those of the Intel SDM vol. 2, "Flags Affected" and "Operation" of each instruction, for the integer
instructions that compilers emit. Whatever is not in the table reads everything. A flag or a register is *overwritten*
only when nothing of its old value is left, whatever the operands hold: not by a shift by ``cl``, which may be zero, not
by a repeated ``cmps``, not by a conditional move, and of a register not by 8 or 16 bits. A flag that the manual calls
undefined is neither read nor overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag
from functools import lru_cache
from typing import Final, NamedTuple

from gdb_kprobe.x86.encoding import Encoding, parse


class Flag(IntFlag):
    """A status flag, at its place in RFLAGS."""

    CF = 1 << 0
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    OF = 1 << 11


STATUS_FLAGS: Final = Flag.CF | Flag.PF | Flag.AF | Flag.ZF | Flag.SF | Flag.OF

REGISTERS: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""In the order of their numbers in an instruction."""

_FIRST_REGISTER: Final = 16
EVERYTHING: Final = int(STATUS_FLAGS) | 0xFFFF << _FIRST_REGISTER


def register_bit(number: int) -> int:
    """The bit of the register *number* in the masks of an :class:`Effect`; a flag's bit is the flag."""
    return 1 << _FIRST_REGISTER + number


class Effect(NamedTuple):
    """Masks of flags and registers, the same wherever the instruction stands.

    *overwrites_in_fact* adds the flag that the manual calls undefined and that every processor sets anew: AF of
    ``and``, ``or``, ``xor`` and ``test``. Execution goes on with what follows (*falls_through*), or at the distance
    *reach* from its first byte, or at either; where neither is so, it is not known where it goes on.
    """

    reads: int
    overwrites: int
    overwrites_in_fact: int
    falls_through: bool
    reach: int | None


_UNKNOWN: Final = Effect(EVERYTHING, 0, 0, False, None)


class _Rule(NamedTuple):
    """*operands* are words of an access, a place and, where it has 8 bits, an ``8``.

    Accesses: R read, W written, X both. Places: m the ModRM operand, r the ModRM register, o the register in the
    opcode; a c d b S D are rax rcx rdx rbx rsi rdi. The registers of an address are read besides.
    """

    operands: str = ""
    writes: int = 0
    reads: int = 0
    writes_in_fact: int = 0


_SIX: Final = int(STATUS_FLAGS)
_RESULT: Final = Flag.SF | Flag.ZF | Flag.PF
_LOGIC: Final = (_RESULT | Flag.CF | Flag.OF, 0, int(Flag.AF))
_CONDITIONS: Final = (
    *(Flag.OF, Flag.CF, Flag.ZF, Flag.CF | Flag.ZF),  # o, b, e, be
    *(Flag.SF, Flag.PF, Flag.SF | Flag.OF, Flag.ZF | Flag.SF | Flag.OF),  # s, p, l, le
)
"""What the condition codes 0, 2, ... 14 test; the odd ones are their contraries."""

# By bits 3-5 of the opcode, or of ModRM in group 1: the access to the first operand, and the flags.
_ARITHMETIC: Final = (
    ("X", (_SIX,)),  # add
    ("X", _LOGIC),  # or
    ("X", (_SIX, Flag.CF)),  # adc
    ("X", (_SIX, Flag.CF)),  # sbb
    ("X", _LOGIC),  # and
    ("X", (_SIX,)),  # sub
    ("X", _LOGIC),  # xor
    ("R", (_SIX,)),  # cmp
)
_ARITHMETIC_OPERANDS: Final = ("{}m8 Rr8", "{}m Rr", "{}r8 Rm8", "{}r Rm", "{}a8", "{}a")

_ROTATES_WITH_CARRY: Final = (2, 3)  # rcl, rcr: by ModRM.reg
_SAR: Final = 7


def _table() -> Iterator[tuple[tuple[int, int, int | None], _Rule]]:
    """Rules by opcode map, opcode, and ModRM.reg, or the whole of ModRM from c0 on, where it is a part of the opcode.

    The maps 0xf3 and 0xf2 are map 1 with that prefix.
    """
    for number, (access, flags) in enumerate(_ARITHMETIC):
        for column, operands in enumerate(_ARITHMETIC_OPERANDS):
            yield (0, number << 3 | column, None), _Rule(operands.format(access), *flags)
        for opcode in (0x80, 0x81, 0x83):
            yield (0, opcode, number), _Rule(f"{access}m{'8' * (opcode == 0x80)}", *flags)
    for code in range(16):
        tested = int(_CONDITIONS[code >> 1])
        for opcode_map, opcode in ((0, 0x70), (1, 0x80), (0xF2, 0x80), (0xF3, 0x80)):
            yield (opcode_map, opcode | code, None), _Rule(reads=tested)  # jcc
        yield (1, 0x40 | code, None), _Rule("Xr Rm", reads=tested)  # cmovcc
        yield (1, 0x90 | code, None), _Rule("Wm8", reads=tested)  # setcc
    for low in range(8):
        yield (0, 0x50 | low, None), _Rule("Ro")  # push
        yield (0, 0x58 | low, None), _Rule("Wo")  # pop
        yield (0, 0x90 | low, None), _Rule("Xa Xo")  # xchg; a plain nop is told apart
        yield (0, 0xB0 | low, None), _Rule("Wo8")  # mov imm8
        yield (0, 0xB8 | low, None), _Rule("Wo")  # mov imm
        yield (1, 0xC8 | low, None), _Rule("Xo")  # bswap
    for last, size in ((0, "8"), (1, "")):  # opcodes whose last bit says that the operand is wider than a byte
        yield (0, 0x84 | last, None), _Rule(f"Rm{size} Rr{size}", *_LOGIC)  # test
        yield (0, 0x86 | last, None), _Rule(f"Xm{size} Xr{size}")  # xchg
        yield (0, 0x88 | last, None), _Rule(f"Wm{size} Rr{size}")  # mov
        yield (0, 0x8A | last, None), _Rule(f"Wr{size} Rm{size}")  # mov
        yield (0, 0xA4 | last, None), _Rule("RS RD")  # movs
        yield (0, 0xA6 | last, None), _Rule("RS RD", _SIX)  # cmps
        yield (0, 0xA8 | last, None), _Rule(f"Ra{size}", *_LOGIC)  # test al/eax, imm
        yield (0, 0xAA | last, None), _Rule("Ra RD")  # stos
        yield (0, 0xAC | last, None), _Rule("RS")  # lods
        yield (0, 0xAE | last, None), _Rule("Ra RD", _SIX)  # scas
        yield (0, 0xC6 | last, 0), _Rule(f"Wm{size}")  # mov imm
        for reg in (0, 1):
            yield (0, 0xF6 | last, reg), _Rule(f"Rm{size}", *_LOGIC)  # test imm
            yield (0, 0xFE | last, reg), _Rule(f"Xm{size}", STATUS_FLAGS & ~Flag.CF)  # inc, dec
        yield (0, 0xF6 | last, 2), _Rule(f"Xm{size}")  # not
        yield (0, 0xF6 | last, 3), _Rule(f"Xm{size}", _SIX)  # neg
        for reg in (4, 5):
            yield (0, 0xF6 | last, reg), _Rule(f"Rm{size} Xa Wd{size}", Flag.CF | Flag.OF)  # mul, imul
        for reg in (6, 7):
            yield (0, 0xF6 | last, reg), _Rule(f"Rm{size} Xa Xd")  # div, idiv
        yield (1, 0xB0 | last, None), _Rule(f"Xm{size} Rr{size} Xa", _SIX)  # cmpxchg
        yield (1, 0xB6 | last, None), _Rule(f"Wr Rm{size}")  # movzx
        yield (1, 0xBE | last, None), _Rule(f"Wr Rm{size}")  # movsx
        yield (1, 0xC0 | last, None), _Rule(f"Xm{size} Xr{size}", _SIX)  # xadd
    for opcode, access in ((0xA3, "R"), (0xAB, "X"), (0xB3, "X"), (0xBB, "X")):
        yield (1, opcode, None), _Rule(f"{access}m Rr", Flag.CF)  # bt, bts, btr, btc
    for reg, access in ((4, "R"), (5, "X"), (6, "X"), (7, "X")):
        yield (1, 0xBA, reg), _Rule(f"{access}m", Flag.CF)  # the same with imm8
    for scan in (0xBC, 0xBD):
        # Zero leaves the destination as it is. A processor without tzcnt and lzcnt executes these for them.
        for opcode_map in (1, 0xF3):
            yield (opcode_map, scan, None), _Rule("Xr Rm", Flag.ZF)  # bsf, bsr
    yield from (
        ((0, 0x63, None), _Rule("Wr Rm")),  # movsxd
        ((0, 0x68, None), _Rule()),  # push imm
        ((0, 0x69, None), _Rule("Wr Rm", Flag.CF | Flag.OF)),  # imul imm
        ((0, 0x6A, None), _Rule()),  # push imm8
        ((0, 0x6B, None), _Rule("Wr Rm", Flag.CF | Flag.OF)),  # imul imm8
        ((0, 0x8D, None), _Rule("Wr Rm")),  # lea
        ((0, 0x8F, 0), _Rule("Wm")),  # pop
        ((0, 0x98, None), _Rule("Xa")),  # cdqe
        ((0, 0x99, None), _Rule("Ra Wd")),  # cqo
        ((0, 0x9D, None), _Rule("", _SIX)),  # popf
        ((0, 0x9E, None), _Rule("Ra", STATUS_FLAGS & ~Flag.OF)),  # sahf
        ((0, 0xE0, None), _Rule("Xc", 0, Flag.ZF)),  # loopne
        ((0, 0xE1, None), _Rule("Xc", 0, Flag.ZF)),  # loope
        ((0, 0xE2, None), _Rule("Xc")),  # loop
        ((0, 0xE3, None), _Rule("Rc")),  # jrcxz
        ((0, 0xE9, None), _Rule()),  # jmp rel32
        ((0, 0xEB, None), _Rule()),  # jmp rel8
        ((0, 0xF5, None), _Rule("", Flag.CF, Flag.CF)),  # cmc
        ((0, 0xF8, None), _Rule("", Flag.CF)),  # clc
        ((0, 0xF9, None), _Rule("", Flag.CF)),  # stc
        ((0, 0xFA, None), _Rule()),  # cli
        ((0, 0xFB, None), _Rule()),  # sti
        ((0, 0xFC, None), _Rule()),  # cld
        ((0, 0xFD, None), _Rule()),  # std
        ((0, 0xFF, 6), _Rule("Rm")),  # push
        ((1, 0x01, 0xCA), _Rule()),  # clac
        ((1, 0x01, 0xCB), _Rule()),  # stac
        ((1, 0x0D, None), _Rule("Rm")),  # prefetchw
        ((1, 0x18, None), _Rule("Rm")),  # prefetch
        ((1, 0x1F, None), _Rule()),  # nop
        ((1, 0x31, None), _Rule("Wa Wd")),  # rdtsc
        ((1, 0xAE, 0xE8), _Rule()),  # lfence
        ((1, 0xAE, 0xF0), _Rule()),  # mfence
        ((1, 0xAE, 0xF8), _Rule()),  # sfence
        ((1, 0xAF, None), _Rule("Xr Rm", Flag.CF | Flag.OF)),  # imul
        ((1, 0xC3, None), _Rule("Wm Rr")),  # movnti
        ((0xF3, 0x1E, 0xFA), _Rule()),  # endbr64
        ((0xF3, 0xB8, None), _Rule("Wr Rm", _SIX)),  # popcnt
    )


_RULES: Final = dict(_table())
_STRINGS: Final = range(0xA4, 0xB0)  # with the two tests between them, which a rep prefix does not change
_TESTS: Final = (0xA8, 0xA9)
_OTHER_WITH_66: Final = (0x01, 0xAE, 0xC3, 0xC7)  # opcodes of map 1 to which the prefix gives another meaning, or none
_ZEROING: Final = (0x29, 0x2B, 0x31, 0x33)  # sub, xor: nothing is left of a register that is both operands
_FIXED: Final = {"a": 0, "c": 1, "d": 2, "b": 3, "S": 6, "D": 7}


@lru_cache(maxsize=1 << 16)
def effect_of(raw: bytes) -> Effect:
    """The effect of the instruction *raw*.

    :raises EncodingError: not an instruction.
    """
    encoding = parse(raw)
    rule = _rule(encoding, raw)
    if rule is None:
        return _UNKNOWN
    operand16 = 0x66 in encoding.prefixes and not encoding.rex & 8
    reads, writes = _operands(rule.operands, encoding, operand16)
    if encoding.opcode in _ZEROING and not encoding.map and not operand16:
        assert encoding.modrm is not None
        if encoding.modrm >= 0xC0 and encoding.modrm >> 3 & 7 == encoding.modrm & 7 and encoding.rex & 5 in (0, 5):
            reads = 0
    reach = None
    if encoding.relative:
        if operand16:
            return _UNKNOWN  # AMD and QEMU cut the instruction pointer
        field = raw[encoding.imm_offset : encoding.imm_offset + encoding.imm_size]
        reach = encoding.length + int.from_bytes(field, "little", signed=True)
    overwrites = int(rule.writes) | writes
    is_jmp = encoding.map == 0 and encoding.opcode in (0xE9, 0xEB)
    return Effect(reads | int(rule.reads), overwrites, overwrites | int(rule.writes_in_fact), not is_jmp, reach)


def _rule(encoding: Encoding, raw: bytes) -> _Rule | None:
    prefixes, opcode, modrm = encoding.prefixes, encoding.opcode, encoding.modrm
    if encoding.space or encoding.map > 1:
        return None
    opcode_map, repeats = encoding.map, [byte for byte in prefixes if byte in (0xF2, 0xF3)]
    if opcode_map == 1:
        if repeats:
            opcode_map = repeats[-1]
        if 0x66 in prefixes and opcode in _OTHER_WITH_66:
            return None
        if opcode in (0xA4, 0xA5, 0xAC, 0xAD) and not repeats:
            return _double_shift(encoding, raw)
    elif opcode in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3):
        return _shift(encoding, raw)
    elif opcode == 0x90 and not encoding.rex & 1:
        return _Rule()  # nop, pause
    elif repeats and opcode in _STRINGS and opcode not in _TESTS:
        return _Rule(f"{_RULES[0, opcode, None].operands} Xc")  # the count may be zero
    rule = _RULES.get((opcode_map, opcode, None))
    if rule is None and modrm is not None:
        rule = _RULES.get((opcode_map, opcode, modrm >> 3 & 7)) or _RULES.get((opcode_map, opcode, modrm))
    return rule


def _shift(encoding: Encoding, raw: bytes) -> _Rule:
    """Group 2: shifts and rotates by imm8, by one and by cl."""
    assert encoding.modrm is not None
    opcode, reg = encoding.opcode, encoding.modrm >> 3 & 7
    operands = "Xm" if opcode & 1 else "Xm8"
    if opcode >= 0xD2:
        return _Rule(f"{operands} Rc", 0, Flag.CF if reg in _ROTATES_WITH_CARRY else 0)
    count = 1 if opcode >= 0xD0 else _count(encoding, raw)
    if reg in _ROTATES_WITH_CARRY:
        return _Rule(operands, Flag.OF if count == 1 else 0, Flag.CF)
    if not count or (encoding.rex & 8 and not opcode & 1):
        return _Rule(operands)  # how a REX.W masks the count for a byte is told differently
    writes = 0 if reg < 2 else int(_RESULT)  # rol and ror leave these
    if reg < 2 or reg == _SAR or count < _size(encoding):
        writes |= Flag.CF
    return _Rule(operands, writes | (Flag.OF if count == 1 else 0))


def _double_shift(encoding: Encoding, raw: bytes) -> _Rule:
    """``shld`` and ``shrd`` by imm8 and by cl."""
    if encoding.opcode & 1:
        return _Rule("Xm Rr Rc")
    count = _count(encoding, raw)
    if not 0 < count < _size(encoding):
        return _Rule("Xm Rr")
    return _Rule("Xm Rr", _RESULT | Flag.CF | (Flag.OF if count == 1 else 0))


def _count(encoding: Encoding, raw: bytes) -> int:
    """The immediate of a shift, as the processor masks it."""
    return raw[encoding.imm_offset] & (0x3F if encoding.rex & 8 else 0x1F)


def _size(encoding: Encoding) -> int:
    """The size in bits of the ModRM operand of a shift."""
    if encoding.map == 0 and not encoding.opcode & 1:
        return 8
    return 64 if encoding.rex & 8 else 16 if 0x66 in encoding.prefixes else 32


def _operands(text: str, encoding: Encoding, operand16: bool) -> tuple[int, int]:
    """The registers that are read, and those of which nothing is left."""
    modrm, rex = encoding.modrm, encoding.rex
    reads = writes = 0
    for word in text.split():
        access, place, is_byte = word[0], word[1], word.endswith("8")
        if place == "m":
            assert modrm is not None
            if modrm < 0xC0:
                reads |= _address_registers(modrm, encoding.sib, rex)
                continue
            number = modrm & 7 | (rex & 1) << 3
        elif place == "r":
            assert modrm is not None
            number = modrm >> 3 & 7 | (rex & 4) << 1
        elif place == "o":
            number = encoding.opcode & 7 | (rex & 1) << 3
        else:
            number = _FIXED[place]
        if is_byte and not rex and 4 <= number <= 7:
            number -= 4  # ah, ch, dh, bh
        if access != "W":
            reads |= register_bit(number)
        if access != "R" and not is_byte and not operand16:
            writes |= register_bit(number)
    return reads, writes


def _address_registers(modrm: int, sib: int | None, rex: int) -> int:
    mod, rm = modrm >> 6, modrm & 7
    if sib is None:
        return 0 if (mod, rm) == (0, 5) else register_bit(rm | (rex & 1) << 3)
    base, index = sib & 7, sib >> 3 & 7 | (rex & 2) << 2
    found = 0 if index == 4 else register_bit(index)
    return found if (mod, base) == (0, 5) else found | register_bit(base | (rex & 1) << 3)
