"""Which family an instruction belongs to; decided once, when a probe is prepared.

A family is a way to be moved and to be stepped: :mod:`gdb_kprobe.x86.relocate` and :mod:`gdb_kprobe.x86.step` have one
rule for each. The tables are laid out as the opcode maps are (Intel SDM vol. 2, appendix A; AMD APM vol. 3, appendix
A), so that they can be proof-read against them. Refused is only what hands on its own address (a far transfer
or a software interrupt pushes or keeps it), what cannot do anything but fail, and what processors disagree about.
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
    REPEATED = "repeated string"
    """A string instruction with a rep prefix: plain, but a step executes one iteration and stays."""
    PUSH_FLAGS = "pushf"
    """Plain, but it shows the flags, also those that a debugger steps with."""
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
#   s  string, with rep repeated   f  pushf
#   g  depends on ModRM (_GROUPS)                     .  a prefix, an escape, or no instruction
_ONE_BYTE: Final = (
    # 123456789abcdef
    "pppppp..pppppp.."  # 00  add, or
    "pppppp..pppppp.."  # 10  adc, sbb
    "pppppp..pppppp.."  # 20  and, sub
    "pppppp..pppppp.."  # 30  xor, cmp
    "................"  # 40  rex
    "pppppppppppppppp"  # 50  push, pop
    "...p....ppppssss"  # 60  movsxd, push imm, imul, ins, outs
    "jjjjjjjjjjjjjjjj"  # 70  jcc rel8
    "pp.pppppppppppgg"  # 80  group 1, test, xchg, mov, mov from sreg, lea, mov to sreg, pop
    "nppppppppp.pfppp"  # 90  nop, xchg, cdqe, cqo, fwait, pushf, popf, sahf, lahf
    "ppppssssppssssss"  # a0  mov moffs, movs, cmps, test, stos, lods, scas
    "pppppppppppppppp"  # b0  mov imm
    "pprr..ggppTTBN.T"  # c0  shifts, ret, mov imm, enter, leave, retf, int3, int, iret
    "pppp...ppppppppp"  # d0  shifts, xlat, x87
    "llllppppcJ.Jpppp"  # e0  loop, jrcxz, in, out, call, jmp
    ".N..ppggppppppgg"  # f0  int1, hlt, cmc, group 3, clc, stc, cli, sti, cld, std, groups 4 and 5
)
_TWO_BYTE: Final = (
    # 123456789abcdef
    "ggpp.TpTpp.U.ppp"  # 00  group 6, group 7, lar, lsl, syscall, clts, sysret, invd, wbinvd, ud2, prefetchw, 3dnow
    "ppppppppppppppnn"  # 10  sse moves, prefetch, reserved hints, endbr64 (see _letter), nop
    "pppp....pppppppp"  # 20  mov cr, mov dr, sse
    "ppppTT.T........"  # 30  wrmsr, rdtsc, rdmsr, rdpmc, sysenter, sysexit, getsec
    "pppppppppppppppp"  # 40  cmovcc
    "pppppppppppppppp"  # 50  sse
    "pppppppppppppppp"  # 60  mmx, sse
    "pgggpppppp..pppp"  # 70  mmx, sse, groups 12-14, emms, vmread, vmwrite
    "jjjjjjjjjjjjjjjj"  # 80  jcc rel32
    "pppppppppppppppp"  # 90  setcc
    "ppppppssppTpppgp"  # a0  push fs, pop fs, cpuid, bt, shld, padlock, push gs, pop gs, rsm, bts, shrd, group 15, imul
    "ppppppppgUgppppp"  # b0  cmpxchg, lss, btr, lfs, lgs, movzx, popcnt, ud1, group 8, btc, bsf, bsr, movsx
    "pppppppgpppppppp"  # c0  xadd, cmpps, movnti, pinsrw, shufps, group 9, bswap
    "pppppppppppppppp"  # d0  mmx, sse
    "pppppppppppppppp"  # e0  mmx, sse
    "pppppppppppppppU"  # f0  mmx, sse, ud0
)
# By ModRM.reg /0 ... /7: with a memory operand, with a register operand.
_GROUPS: Final = {
    #           01234567    01234567
    (0, 0x8E): ("p.pppp..", "p.pppp.."),  # mov to es, (cs), ss, ds, fs, gs
    (0, 0x8F): ("p.......", "p......."),  # group 1a: pop
    (0, 0xC6): ("p.......", "p......p"),  # group 11: mov imm8, xabort
    (0, 0xC7): ("p.......", "p......A"),  # group 11: mov imm, xbegin
    (0, 0xF6): ("p.pppppp", "p.pppppp"),  # group 3: test, not, neg, mul, imul, div, idiv
    (0, 0xF7): ("p.pppppp", "p.pppppp"),
    (0, 0xFE): ("pp......", "pp......"),  # group 4: inc, dec
    (0, 0xFF): ("ppiTkTp.", "ppi.k.p."),  # group 5: inc, dec, call, callf, jmp, jmpf, push
    (1, 0x00): ("pppppp..", "ppppppp."),  # group 6: sldt, str, lldt, ltr, verr, verw, lkgs
    (1, 0x01): ("pppppppp", "gggggggg"),  # group 7: sgdt, sidt, lgdt, lidt, smsw, rstorssp, lmsw, invlpg; _GROUP_7
    (1, 0x71): ("........", "..p.p.p."),  # groups 12-14: mmx and sse shifts
    (1, 0x72): ("........", "..p.p.p."),
    (1, 0x73): ("........", "..pp..pp"),
    (1, 0xAE): ("pppppppp", "pppppppp"),  # group 15: fxsave, xsave, clflush; rdfsbase, lfence, mfence, sfence
    (1, 0xB8): ("........", "........"),  # with rep only: popcnt
    (1, 0xBA): ("....pppp", "....pppp"),  # group 8: bt, bts, btr, btc
    (1, 0xC7): (".p.ppppp", "......pp"),  # group 9: cmpxchg16b, xsaves, vmptrld; rdrand, rdseed
}
# Group 7 with a register operand: by ModRM c0 ... ff.
_GROUP_7: Final = (
    # 1234567
    "ppTTppp."  # c0  enclv, vmcall, vmlaunch, vmresume, vmxoff, pconfig, wrmsrns
    "pppppT.p"  # c8  monitor, mwait, clac, stac, tdcall, seamret, seamops, encls
    "pp..pppT"  # d0  xgetbv, xsetbv, vmfunc, xend, xtest, enclu
    "TpppppTp"  # d8  vmrun, vmmcall, vmload, vmsave, stgi, clgi, skinit, invlpga
    "pppppppp"  # e0  smsw
    "ppp.Tppp"  # e8  serialize, xresldtrk, saveprevssp, uiret, testui, rdpkru, wrpkru
    "pppppppp"  # f0  lmsw
    "pppppppp"  # f8  swapgs, rdtscp, monitorx, mwaitx, clzero, rdpru, invlpgb, tlbsync
)

_FAMILIES: Final = {
    "p": Family.PLAIN,
    "s": Family.PLAIN,
    "n": Family.NOP,
    "f": Family.PUSH_FLAGS,
    "j": Family.JCC,
    "J": Family.JMP,
    "c": Family.CALL_REL,
    "i": Family.CALL_INDIRECT,
    "k": Family.JMP_INDIRECT,
    "r": Family.RET,
    "l": Family.LOOP,
}
_KINDS: Final = {
    "A": (Reason.TRANSACTION, "an int3 and a jump into a slot would abort it"),
    "B": (Reason.FOREIGN_INT3, "a breakpoint instruction"),
    "N": (Reason.SOFTWARE_INTERRUPT, "its exception frame would name the slot"),
    "T": (Reason.FAR_TRANSFER, "loads CS together with RIP, or enters another mode"),
    "U": (Reason.RAISES_UD, "the kernel tells by its address what it means"),
    ".": (Reason.RESERVED_OPCODE, "no instruction of any processor"),
}
_NEAR_BRANCHES: Final = frozenset(
    (Family.JCC, Family.JMP, Family.CALL_REL, Family.CALL_INDIRECT, Family.JMP_INDIRECT, Family.RET, Family.LOOP)
)
_OPERAND_SIZE = 0x66
_REX_W = 8


def classify(insn: Insn) -> Family | Unhandled:
    """The family that *insn* belongs to, or what kind it is that none takes."""
    prefixes = insn.prefixes
    letter = _letter(insn)
    family = _FAMILIES.get(letter)
    if family is None:
        return _unhandled(insn, *_KINDS[letter])
    if not prefixes:
        return Family.RIP_RELATIVE if family is Family.PLAIN and insn.is_rip_relative else family
    if family in _NEAR_BRANCHES and _OPERAND_SIZE in prefixes and not insn.rex & _REX_W:
        detail = "Intel ignores the prefix, AMD and QEMU cut the instruction pointer to 16 bits"
        return _unhandled(insn, Reason.OPERAND_SIZE_BRANCH, detail)
    if letter == "s" and insn.has_repeat_prefix:
        return Family.REPEATED
    return Family.RIP_RELATIVE if family is Family.PLAIN and insn.is_rip_relative else family


def _unhandled(insn: Insn, reason: Reason, kind: str) -> Unhandled:
    return Unhandled(reason, f"{kind}: {insn} [{insn.raw.hex(' ')}]")


def _letter(insn: Insn) -> str:
    encoding = insn.encoding
    opcode_map, opcode, modrm = encoding.map, encoding.opcode, encoding.modrm
    if encoding.space or opcode_map > 1:
        return "p"  # neither vector instructions nor the three-byte maps have a transfer
    if opcode_map == 0:
        letter = _ONE_BYTE[opcode]
        if opcode == 0x90 and encoding.rex & 1 and 0xF3 not in encoding.prefixes:
            return "p"  # xchg r8, rax
    else:
        letter = _TWO_BYTE[opcode]
        if encoding.prefixes and insn.has_repeat_prefix:
            if (opcode, modrm) == (0x01, 0xCA):
                return "T"  # erets, eretu
            if opcode == 0xB8:
                return "p" if 0xF3 in encoding.prefixes else "."  # popcnt
            if opcode == 0x1E and modrm not in (0xFA, 0xFB):
                return "p"  # shadow stack instructions; only endbr64 and endbr32 are nops
    if letter == "g":
        assert modrm is not None
        letter = _GROUPS[opcode_map, opcode][modrm >= 0xC0][modrm >> 3 & 7]
        if letter == "g":
            letter = _GROUP_7[modrm - 0xC0]
    return letter
