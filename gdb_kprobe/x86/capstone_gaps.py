"""Names of the instructions that capstone 5 does not know, or not by their right length, and that a kernel may have.

For those the opcode maps alone decide; nothing is taken for an instruction that is not in these tables. Sources: Intel
SDM vol. 2, Intel Architecture Instruction Set Extensions Programming Reference, AMD APM vol. 3.
"""

from __future__ import annotations

from typing import Final

from gdb_kprobe.x86.encoding import Encoding

# Group 7 (0f 01) with a register operand, by the prefix that is part of the opcode (0: none), and ModRM.
_GROUP_7: Final = {
    (0x00, 0xC6): "wrmsrns",
    (0xF2, 0xC6): "rdmsrlist",
    (0xF3, 0xC6): "wrmsrlist",
    (0x66, 0xCC): "tdcall",
    (0x66, 0xCD): "seamret",
    (0x00, 0xE8): "serialize",
    (0xF2, 0xE8): "xsusldtrk",
    (0xF2, 0xE9): "xresldtrk",
    (0xF3, 0xEC): "uiret",
    (0xF3, 0xED): "testui",
    (0x00, 0xFD): "rdpru",
    (0x00, 0xFE): "invlpgb",
    (0xF2, 0xFE): "rmpupdate",
    (0xF3, 0xFE): "rmpadjust",
    (0x00, 0xFF): "tlbsync",
    (0xF2, 0xFF): "pvalidate",
    (0xF3, 0xFF): "psmash",
}
# Others with a register operand: prefix, map, opcode, ModRM.reg.
_REGISTER: Final = {
    (0xF2, 1, 0x00, 6): "lkgs",
    (0xF3, 1, 0xC7, 6): "senduipi",
    (0xF3, 3, 0xF0, 0): "hreset",
}
# With a memory operand: prefix, map, opcode.
_MEMORY: Final = {
    (0xF2, 2, 0xF8): "enqcmd",
    (0xF3, 2, 0xF8): "enqcmds",
    (0x00, 2, 0xFC): "aadd",
    (0x66, 2, 0xFC): "aand",
    (0xF2, 2, 0xFC): "aor",
    (0xF3, 2, 0xFC): "axor",
}
# VEX map 2: prefix, opcode, whether the ModRM operand is a register.
_VEX: Final = {
    (0x00, 0x49, False): "ldtilecfg",
    (0x00, 0x49, True): "tilerelease",
    (0x66, 0x49, False): "sttilecfg",
    (0xF2, 0x49, True): "tilezero",
    (0x66, 0x4B, False): "tileloaddt1",
    (0xF2, 0x4B, False): "tileloadd",
    (0xF3, 0x4B, False): "tilestored",
    (0x66, 0xB4, False): "vpmadd52luq",
    (0x66, 0xB4, True): "vpmadd52luq",
    (0x66, 0xB5, False): "vpmadd52huq",
    (0x66, 0xB5, True): "vpmadd52huq",
    (0xF2, 0xCB, True): "vsha512rnds2",
    (0xF2, 0xCC, True): "vsha512msg1",
    (0xF2, 0xCD, True): "vsha512msg2",
}
_VEX_PREFIXES: Final = (0x00, 0x66, 0xF3, 0xF2)
# capstone takes these without their ModRM.
_UNDEFINED: Final = {0xB9: "ud1", 0xFF: "ud0"}


def name_of(encoding: Encoding, raw: bytes) -> str | None:
    """The mnemonic of the instruction *raw*, or ``None`` when it is not in the tables."""
    modrm, opcode = encoding.modrm, encoding.opcode
    if modrm is None or 0xF0 in encoding.prefixes:
        return None
    if encoding.space == "vex":
        # The prefix is in the last byte of the VEX prefix.
        prefix = _VEX_PREFIXES[raw[encoding.opcode_offset - 1] & 3]
        return _VEX.get((prefix, opcode, modrm >= 0xC0)) if encoding.map == 2 else None
    if encoding.space:
        return None
    prefix = next((b for b in reversed(encoding.prefixes) if b in (0xF2, 0xF3)), 0)
    if not prefix and 0x66 in encoding.prefixes:
        prefix = 0x66
    if encoding.map == 1 and opcode in _UNDEFINED:
        return _UNDEFINED[opcode]
    if modrm < 0xC0:
        return _MEMORY.get((prefix, encoding.map, opcode))
    if (encoding.map, opcode) == (1, 0x01):
        return _GROUP_7.get((prefix, modrm))
    return _REGISTER.get((prefix, encoding.map, opcode, modrm >> 3 & 7))
