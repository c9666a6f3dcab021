"""Which family an instruction belongs to; decided once, when a probe is prepared.

A family is a way to be moved and to be stepped: :mod:`gdb_kprobe.x86.relocate` and :mod:`gdb_kprobe.x86.step` have one
rule for each. The tables are laid out as the opcode maps are (Intel SDM vol. 2, appendix A), so that they can be
proof-read against them. An instruction that no table hands to a family is :class:`Unhandled`; nothing is copied on the
guess that it will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gdb_kprobe.model import Reason
from gdb_kprobe.x86.decode import Insn


class Family(StrEnum):
    NOP = "nop"
    """Does nothing: nops of any length, endbr64, pause."""
    PLAIN = "plain"
    """Does the same at any address."""
    RIP_RELATIVE = "rip-relative"
    """Plain, but for the displacement of its memory operand."""
    JCC = "jcc"
    JMP = "jmp"
    CALL_REL = "call"
    CALL_INDIRECT = "indirect call"
    JMP_INDIRECT = "indirect jmp"
    RET = "ret"
    LOOP = "loop"
    """``loop``, ``loope``, ``loopne``, ``jrcxz``: rel8 only, flags untouched."""


@dataclass(frozen=True, slots=True)
class Unhandled:
    """No family takes the instruction; *detail* names its kind and shows it."""

    reason: Reason
    detail: str


# Legend of the grids. Small letters are families, capitals are kinds that no family takes (_KINDS).
#
#   p  plain (or RIP-relative)     n  nop             j  jcc              J  jmp rel
#   c  call rel                    i  call indirect   k  jmp indirect     r  ret     l  loop, jrcxz
#   g  depends on ModRM (_GROUPS)                     .  a prefix, an escape, or no instruction
_ONE_BYTE: Final = (
    # 123456789abcdef
    "pppppp..pppppp.."  # 00  add, or
    "pppppp..pppppp.."  # 10  adc, sbb
    "pppppp..pppppp.."  # 20  and, sub
    "pppppp..pppppp.."  # 30  xor, cmp
    "................"  # 40  rex
    "pppppppppppppppp"  # 50  push, pop
    "...p....ppppIIII"  # 60  movsxd, push imm, imul, ins, outs
    "jjjjjjjjjjjjjjjj"  # 70  jcc rel8
    "pp.pppppppppppDg"  # 80  group 1, test, xchg, mov, mov from sreg, lea, mov to sreg, pop
    "nppppppppp.XFFpp"  # 90  nop, xchg, cdqe, cqo, fwait, pushf, popf, sahf, lahf
    "ppppSSSSppSSSSSS"  # a0  mov moffs, movs, cmps, test, stos, lods, scas
    "pppppppppppppppp"  # b0  mov imm
    "pprr..ggppTTBN.T"  # c0  shifts, ret, mov imm, enter, leave, retf, int3, int, iret
    "pppp...pXXXXXXXX"  # d0  shifts, xlat, x87
    "llllIIIIcJ.JIIII"  # e0  loop, jrcxz, in, out, call, jmp
    ".N..HpggppFFppgg"  # f0  int1, hlt, cmc, group 3, clc, stc, cli, sti, cld, std, groups 4 and 5
)
_TWO_BYTE: Final = (
    # 123456789abcdef
    "gYpp.TYTYY.U.pXX"  # 00  group 6, group 7, lar, lsl, syscall, clts, sysret, invd, wbinvd, ud2, prefetchw, 3dnow
    "VVVVVVVVpRRRRRgn"  # 10  sse moves, prefetch, reserved nops, endbr64, nop
    "YYYY....VVVVVVVV"  # 20  mov cr, mov dr, sse
    "YYYYTT.Y........"  # 30  wrmsr, rdtsc, rdmsr, rdpmc, sysenter, sysexit, getsec
    "pppppppppppppppp"  # 40  cmovcc
    "VVVVVVVVVVVVVVVV"  # 50  sse
    "VVVVVVVVVVVVVVVV"  # 60  mmx, sse
    "VVVVVVVVYY..VVVV"  # 70  mmx, sse, vmread, vmwrite
    "jjjjjjjjjjjjjjjj"  # 80  jcc rel32
    "pppppppppppppppp"  # 90  setcc
    "pDYpppYYpDYpppgp"  # a0  push fs, pop fs, cpuid, bt, shld, padlock, push gs, pop gs, rsm, bts, shrd, group 15, imul
    "ppDpDDppgUgppppp"  # b0  cmpxchg, lss, btr, lfs, lgs, movzx, popcnt, ud1, group 8, btc, bsf, bsr, movsx
    "ppVpVVVgpppppppp"  # c0  xadd, cmpps, movnti, pinsrw, shufps, group 9, bswap
    "VVVVVVVVVVVVVVVV"  # d0  mmx, sse
    "VVVVVVVVVVVVVVVV"  # e0  mmx, sse
    "VVVVVVVVVVVVVVVU"  # f0  mmx, sse, ud0
)
# By ModRM.reg /0 ... /7: with a memory operand, with a register operand.
_GROUPS: Final = {
    #           01234567    01234567
    (0, 0x8F): ("p.......", "p......."),  # group 1a: pop
    (0, 0xC6): ("p.......", "p......Y"),  # group 11: mov imm8, xabort
    (0, 0xC7): ("p.......", "p......Y"),  # group 11: mov imm, xbegin
    (0, 0xF6): ("p.pppppp", "p.pppppp"),  # group 3: test, not, neg, mul, imul, div, idiv
    (0, 0xF7): ("p.pppppp", "p.pppppp"),
    (0, 0xFE): ("pp......", "pp......"),  # group 4: inc, dec
    (0, 0xFF): ("ppiTkTp.", "ppi.k.p."),  # group 5: inc, dec, call, callf, jmp, jmpf, push
    (1, 0x00): ("YYYYpp..", "YYYYpp.."),  # group 6: sldt, str, lldt, ltr, verr, verw
    (1, 0x1E): ("nnnnnnnn", "nnnnnnnn"),  # nop; with rep: _WITH_REP
    (1, 0xAE): ("VVVVVVVY", "YYYYYppp"),  # group 15: fxsave, xsave, clflush; lfence, mfence, sfence
    (1, 0xB8): ("........", "........"),  # with rep only: _WITH_REP
    (1, 0xBA): ("....pppp", "....pppp"),  # group 8: bt, bts, btr, btc
    (1, 0xC7): (".p.YYYYY", "......YY"),  # group 9: cmpxchg16b, xsaves, rdrand
}
# F2 and F3 are part of the opcode of these, or are known to be ignored: (prefix, map, opcode).
_WITH_REP: Final = {
    (0xF3, 0, 0x90): "n",  # pause
    (0xF3, 0, 0xC2): "r",  # repz ret, for the branch predictors of old AMD processors
    (0xF3, 0, 0xC3): "r",
    (0xF3, 1, 0x1E): "n",  # endbr64; the others are sorted out in _letter
    (0xF3, 1, 0xB8): "p",  # popcnt
    (0xF3, 1, 0xBC): "p",  # tzcnt
    (0xF3, 1, 0xBD): "p",  # lzcnt
    (0xF2, 2, 0xF0): "p",  # crc32
    (0xF2, 2, 0xF1): "p",
}
_THREE_BYTE_PLAIN: Final = frozenset({(2, 0xF0), (2, 0xF1)})  # movbe, crc32

_FAMILIES: Final = {
    "p": Family.PLAIN,
    "n": Family.NOP,
    "j": Family.JCC,
    "J": Family.JMP,
    "c": Family.CALL_REL,
    "i": Family.CALL_INDIRECT,
    "k": Family.JMP_INDIRECT,
    "r": Family.RET,
    "l": Family.LOOP,
}
_KINDS: Final = {
    "B": (Reason.FOREIGN_INT3, "a breakpoint instruction"),
    "D": (Reason.UNHANDLED_FAMILY, "loads a segment register"),
    "F": (Reason.UNHANDLED_FAMILY, "moves flags or changes the interrupt flag"),
    "H": (Reason.UNHANDLED_FAMILY, "halts the processor"),
    "I": (Reason.UNHANDLED_FAMILY, "port input or output"),
    "N": (Reason.UNHANDLED_FAMILY, "software interrupt"),
    "R": (Reason.UNHANDLED_FAMILY, "reserved hint instruction"),
    "S": (Reason.UNHANDLED_FAMILY, "string instruction"),
    "T": (Reason.FAR_TRANSFER, "loads CS together with RIP"),
    "U": (Reason.UNHANDLED_FAMILY, "raises #UD on purpose"),
    "V": (Reason.UNHANDLED_FAMILY, "MMX, SSE, VEX or EVEX instruction"),
    "X": (Reason.UNHANDLED_FAMILY, "x87 instruction"),
    "Y": (Reason.UNHANDLED_FAMILY, "system instruction"),
    "Z": (Reason.UNHANDLED_FAMILY, "rep prefix on an instruction that is not repeated"),
    ".": (Reason.UNHANDLED_FAMILY, "reserved opcode"),
}
_NEAR_BRANCHES: Final = frozenset(
    (Family.JCC, Family.JMP, Family.CALL_REL, Family.CALL_INDIRECT, Family.JMP_INDIRECT, Family.RET, Family.LOOP)
)


def classify(insn: Insn) -> Family | Unhandled:
    """The family that *insn* belongs to, or what kind it is that none takes."""
    prefixes = insn.prefixes
    if 0xF0 in prefixes:
        return _unhandled(insn, Reason.UNHANDLED_FAMILY, "lock-prefixed instruction")
    letter = _letter(insn)
    family = _FAMILIES.get(letter)
    if family is None:
        return _unhandled(insn, *_KINDS[letter])
    if family in _NEAR_BRANCHES and 0x66 in prefixes:
        # Intel ignores the prefix, AMD and QEMU cut the instruction pointer to 16 bits.
        return _unhandled(insn, Reason.UNHANDLED_FAMILY, "66-prefixed branch, which processors understand differently")
    if family is Family.NOP:
        return family
    if insn.is_rip_relative and 0x67 in prefixes:
        return _unhandled(insn, Reason.UNHANDLED_FAMILY, "EIP-relative operand (67 prefix)")
    if family is Family.PLAIN and insn.is_rip_relative:
        return Family.RIP_RELATIVE
    return family


def _unhandled(insn: Insn, reason: Reason, kind: str) -> Unhandled:
    return Unhandled(reason, f"{kind}: {insn} [{insn.raw.hex(' ')}]")


def _letter(insn: Insn) -> str:
    encoding = insn.encoding
    opcode_map, opcode, modrm = encoding.map, encoding.opcode, encoding.modrm
    if encoding.space:
        return "V"
    if opcode_map == 0:
        letter = _ONE_BYTE[opcode]
    elif opcode_map == 1:
        letter = _TWO_BYTE[opcode]
    else:
        letter = "p" if (opcode_map, opcode) in _THREE_BYTE_PLAIN else "V"
    if letter == "g":
        assert modrm is not None
        letter = _GROUPS[opcode_map, opcode][modrm >= 0xC0][modrm >> 3 & 7]
    if (opcode_map, opcode) == (0, 0x90) and encoding.rex & 1:
        letter = "p"  # xchg r8, rax
    if (opcode_map, opcode) == (1, 0x01) and modrm in (0xCA, 0xCB):
        letter = "p"  # clac, stac: the kernel's fixups begin with clac

    repeats = {b for b in encoding.prefixes if b in (0xF2, 0xF3)}
    if repeats and (letter in _FAMILIES or letter == "."):
        letter = _WITH_REP.get((repeats.pop(), opcode_map, opcode), "Z") if len(repeats) == 1 else "Z"
        if (opcode_map, opcode) == (1, 0x1E) and modrm not in (0xFA, 0xFB):
            letter = "Y"  # shadow stack instructions; only endbr64 and endbr32 are nops
    return letter
