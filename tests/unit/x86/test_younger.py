"""The table of what capstone does not know, against iced."""

from __future__ import annotations

import iced_x86
import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import DecodeError, decode

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)

YOUNGER = {
    "wrmsrns": "0f 01 c6", "rdmsrlist": "f2 0f 01 c6", "wrmsrlist": "f3 0f 01 c6", "tdcall": "66 0f 01 cc",
    "seamret": "66 0f 01 cd",
    "serialize": "0f 01 e8", "xsusldtrk": "f2 0f 01 e8", "xresldtrk": "f2 0f 01 e9", "uiret": "f3 0f 01 ec",
    "testui": "f3 0f 01 ed", "rdpru": "0f 01 fd", "invlpgb": "0f 01 fe", "rmpupdate": "f2 0f 01 fe",
    "rmpadjust": "f3 0f 01 fe", "tlbsync": "0f 01 ff", "pvalidate": "f2 0f 01 ff", "psmash": "f3 0f 01 ff",
    "lkgs": "f2 41 0f 00 f0", "senduipi": "f3 0f c7 f1", "hreset": "f3 0f 3a f0 c0 07",
    "enqcmd": "f2 0f 38 f8 0d 10 00 00 00", "enqcmds": "f3 0f 38 f8 44 8b 10", "aadd": "0f 38 fc 01",
    "aand": "66 0f 38 fc 01", "aor": "f2 0f 38 fc 01", "axor": "f3 48 0f 38 fc 01",
    "ldtilecfg": "c4 e2 78 49 05 10 00 00 00", "tilerelease": "c4 e2 78 49 c0", "sttilecfg": "c4 e2 79 49 00",
    "tilezero": "c4 e2 7b 49 c0", "tileloaddt1": "c4 e2 79 4b 04 08", "tileloadd": "c4 e2 7b 4b 04 08",
    "tilestored": "c4 e2 7a 4b 04 08", "vpmadd52luq": "c4 e2 fd b4 c1", "vpmadd52huq": "c4 e2 fd b5 41 10",
    "vsha512rnds2": "c4 e2 7f cb c1", "vsha512msg1": "c4 e2 7f cc c1", "vsha512msg2": "c4 e2 7f cd c1",
    "ud1": "67 0f b9 40 02", "ud0": "0f ff 05 10 00 00 00",
}  # fmt: skip


@pytest.mark.parametrize("name", YOUNGER)
def test_name_and_length_are_those_that_iced_gives(name: str) -> None:
    code = bytes.fromhex(YOUNGER[name])
    insn = decode(code + bytes(8), ADDR)
    theirs = iced_x86.Decoder(64, code + bytes(8), ip=ADDR).decode()
    assert insn.raw == code
    assert (insn.mnemonic, insn.length) == (name, theirs.len)
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.INTEL)
    assert formatter.format_mnemonic(theirs, iced_x86.FormatMnemonicOptions.NO_PREFIXES) == name
    assert insn.rip_target == (theirs.ip_rel_memory_address if theirs.is_ip_rel_memory_operand else None)


@pytest.mark.parametrize("text", ["f0 0f 01 e8", "f3 0f 00 f0", "c4 e2 70 5e c1", "f0 48 83 c0 01", "0f 01 eb"])
def test_what_nobody_knows_stays_unknown(text: str) -> None:
    assert iced_x86.Decoder(64, bytes.fromhex(text)).decode().code == iced_x86.Code.INVALID
    with pytest.raises(DecodeError, match="does not know it"):
        decode(bytes.fromhex(text), ADDR)
