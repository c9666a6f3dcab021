"""Which family takes which instruction, and what is said of those that none takes."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import Reason, VirtAddr
from gdb_kprobe.x86.decode import decode
from gdb_kprobe.x86.families import Family, Unhandled, classify

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)

FAMILIES = {
    Family.NOP: "90 | 66 90 | f3 90 | 0f 1f 44 00 00 | 66 2e 0f 1f 84 00 00 00 00 00 | f3 0f 1e fa"
    " | 0f 1f 05 00 00 00 00",
    Family.PLAIN: "55 | 41 57 | 5d | 48 89 e5 | 48 83 ec 18 | 31 c0 | 85 ff | 49 90 | 0f b6 c3 | 48 63 c7"
    " | f3 48 0f b8 c3 | 65 48 8b 04 25 00 00 00 00 | ff 74 24 08 | 48 98 | 0f 94 c0 | 0f ae e8"
    " | 67 8d 04 0f | fc | 9f"
    # strings, flags, locks and prefixes that mean nothing there
    " | a4 | 48 ab | 6c | 9d | fa | fb | f0 48 0f b1 0f | f3 48 89 e5 | 54 | 5c"
    # segment registers, ports, the system
    " | 8e d0 | 0f a1 | 0f b2 00 | ec | e6 80 | f4 | 0f 22 d8 | 0f 23 f8 | 0f 30 | 0f 32 | 0f 31 | 0f a2 | 0f 01 f8"
    " | 0f 01 ca | 0f 01 cb | 0f 01 c9 | 0f 01 d0 | 0f 01 38 | 0f 01 18 | 0f 00 d8 | 0f 00 2c 24 | 0f 06 | 0f 09"
    " | 0f c7 f0 | 0f 78 c1 | 0f 01 c1 | 0f 01 d9 | 0f ae 27 | 48 0f c7 27 | f3 48 0f c7 f8 | f3 0f ae c0"
    " | f3 48 0f 1e c8 | c6 f8 01"
    # x87, vectors
    " | d9 c0 | db e3 | 9b | 0f 28 c1 | f3 0f 6f 07 | 66 0f 3a 0f c1 08 | c5 f8 77 | c4 e2 7b f7 c0 | 62 f1 7c 48 10 c1"
    # what the disassembler does not know
    " | f2 0f 00 f7 | 0f 01 e8 | f2 0f 01 ff | f3 0f 01 fe | 66 0f 01 cc | c4 e2 78 49 c0",
    Family.RIP_RELATIVE: "48 8d 05 00 00 00 00 | ff 35 00 00 00 00 | 65 8b 05 00 00 00 00 | 0f b6 05 00 00 00 00"
    " | c6 05 00 00 00 00 01 | 48 0f ba 2d 00 00 00 00 07 | 67 8b 05 00 00 00 00 | f0 ff 05 00 00 00 00"
    " | 0f 01 15 00 00 00 00 | c5 fd 6f 05 00 00 00 00 | 62 f1 7c 48 10 05 00 00 00 00",
    Family.REPEATED: "f3 a4 | f3 48 ab | f2 ae | f3 a6 | f3 6c | f3 6f | 67 f3 a4",
    Family.PUSH_FLAGS: "9c | 66 9c",
    Family.JCC: "70 00 | 7f fe | 0f 80 00 00 00 00 | 0f 8f 00 00 00 00 | 2e 74 00 | 3e 75 00",
    Family.JMP: "eb fe | e9 00 00 00 00 | 2e e9 00 00 00 00",
    Family.CALL_REL: "e8 00 00 00 00 | 2e e8 00 00 00 00 | 67 e8 00 00 00 00 | f2 e8 00 00 00 00"
    " | 2e 2e e8 00 00 00 00 | 66 66 48 e8 00 00 00 00",
    Family.CALL_INDIRECT: "ff d0 | 41 ff d3 | ff 10 | ff 54 24 08 | ff 15 00 00 00 00 | 3e ff d0 | f2 ff d0",
    Family.JMP_INDIRECT: "ff e0 | 41 ff e3 | ff 24 c5 00 00 00 81 | ff 25 00 00 00 00 | 3e ff e0",
    Family.RET: "c3 | c2 08 00 | f3 c3 | 2e c3 | f2 c3",
    Family.LOOP: "e0 00 | e1 fe | e2 80 | e3 7f | 67 e3 00",
}  # fmt: skip


@pytest.mark.parametrize("family", Family)
def test_family_takes(family: Family) -> None:
    found = {text: classify(decode(bytes.fromhex(text), ADDR)) for text in FAMILIES[family].split(" | ")}
    assert found == dict.fromkeys(found, family)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cc", Reason.FOREIGN_INT3),
        ("cd 80", Reason.SOFTWARE_INTERRUPT),
        ("f1", Reason.SOFTWARE_INTERRUPT),
        ("0f 0b", Reason.RAISES_UD),
        ("0f b9 40 02", Reason.RAISES_UD),  # ud1
        ("67 0f b9 40 02", Reason.RAISES_UD),
        ("0f ff 00", Reason.RAISES_UD),  # ud0
        ("48 cf", Reason.FAR_TRANSFER),
        ("cb", Reason.FAR_TRANSFER),
        ("ca 08 00", Reason.FAR_TRANSFER),
        ("ff 18", Reason.FAR_TRANSFER),
        ("ff 28", Reason.FAR_TRANSFER),
        ("0f 05", Reason.FAR_TRANSFER),
        ("48 0f 07", Reason.FAR_TRANSFER),
        ("0f 34", Reason.FAR_TRANSFER),
        ("48 0f 35", Reason.FAR_TRANSFER),
        ("0f aa", Reason.FAR_TRANSFER),  # rsm
        ("0f 01 c2", Reason.FAR_TRANSFER),  # vmlaunch
        ("0f 01 d8", Reason.FAR_TRANSFER),  # vmrun
        ("f2 0f 01 ca", Reason.FAR_TRANSFER),  # erets
        ("f3 0f 01 ec", Reason.FAR_TRANSFER),  # uiret
        ("c7 f8 00 00 00 00", Reason.TRANSACTION),
        ("66 c3", Reason.OPERAND_SIZE_BRANCH),
        ("66 ff d0", Reason.OPERAND_SIZE_BRANCH),
        ("66 eb 00", Reason.OPERAND_SIZE_BRANCH),
        ("66 74 00", Reason.OPERAND_SIZE_BRANCH),
        ("66 e2 00", Reason.OPERAND_SIZE_BRANCH),
    ],
)
def test_no_family_takes_and_the_refusal_says_why(text: str, reason: Reason) -> None:
    insn = decode(bytes.fromhex(text), ADDR)
    found = classify(insn)
    assert isinstance(found, Unhandled)
    assert found.reason is reason
    assert str(insn) in found.detail
    assert insn.raw.hex(" ") in found.detail
