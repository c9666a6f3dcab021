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
    " | 67 8d 04 0f | fc | 9f",
    Family.RIP_RELATIVE: "48 8d 05 00 00 00 00 | ff 35 00 00 00 00 | 65 8b 05 00 00 00 00 | 0f b6 05 00 00 00 00"
    " | c6 05 00 00 00 00 01 | 48 0f ba 2d 00 00 00 00 07",
    Family.JCC: "70 00 | 7f fe | 0f 80 00 00 00 00 | 0f 8f 00 00 00 00 | 2e 74 00 | 3e 75 00",
    Family.JMP: "eb fe | e9 00 00 00 00 | 2e e9 00 00 00 00",
    Family.CALL_REL: "e8 00 00 00 00 | 2e e8 00 00 00 00 | 67 e8 00 00 00 00",
    Family.CALL_INDIRECT: "ff d0 | 41 ff d3 | ff 10 | ff 54 24 08 | ff 15 00 00 00 00 | 3e ff d0",
    Family.JMP_INDIRECT: "ff e0 | 41 ff e3 | ff 24 c5 00 00 00 81 | ff 25 00 00 00 00 | 3e ff e0",
    Family.RET: "c3 | c2 08 00 | f3 c3 | 2e c3",
    Family.LOOP: "e0 00 | e1 fe | e2 80 | e3 7f | 67 e3 00",
}  # fmt: skip


@pytest.mark.parametrize("family", Family)
def test_family_takes(family: Family) -> None:
    found = {text: classify(decode(bytes.fromhex(text), ADDR)) for text in FAMILIES[family].split(" | ")}
    assert found == dict.fromkeys(found, family)


@pytest.mark.parametrize(
    ("text", "reason", "kind"),
    [
        ("cc", Reason.FOREIGN_INT3, "a breakpoint"),
        ("cd 80", Reason.UNHANDLED_FAMILY, "software interrupt"),
        ("f1", Reason.UNHANDLED_FAMILY, "software interrupt"),
        ("0f 0b", Reason.UNHANDLED_FAMILY, "raises #UD"),
        ("48 cf", Reason.FAR_TRANSFER, "loads CS"),
        ("cb", Reason.FAR_TRANSFER, "loads CS"),
        ("ff 18", Reason.FAR_TRANSFER, "loads CS"),
        ("ff 28", Reason.FAR_TRANSFER, "loads CS"),
        ("0f 05", Reason.FAR_TRANSFER, "loads CS"),
        ("48 0f 07", Reason.FAR_TRANSFER, "loads CS"),
        ("f3 48 ab", Reason.UNHANDLED_FAMILY, "string"),
        ("a4", Reason.UNHANDLED_FAMILY, "string"),
        ("f0 48 0f b1 0f", Reason.UNHANDLED_FAMILY, "lock-prefixed"),
        ("ec", Reason.UNHANDLED_FAMILY, "port input"),
        ("f4", Reason.UNHANDLED_FAMILY, "halts"),
        ("9c", Reason.UNHANDLED_FAMILY, "flags"),
        ("9d", Reason.UNHANDLED_FAMILY, "flags"),
        ("fa", Reason.UNHANDLED_FAMILY, "interrupt flag"),
        ("fb", Reason.UNHANDLED_FAMILY, "interrupt flag"),
        ("8e d0", Reason.UNHANDLED_FAMILY, "segment register"),
        ("0f a1", Reason.UNHANDLED_FAMILY, "segment register"),
        ("d9 c0", Reason.UNHANDLED_FAMILY, "x87"),
        ("0f 28 c1", Reason.UNHANDLED_FAMILY, "SSE"),
        ("c5 f8 77", Reason.UNHANDLED_FAMILY, "VEX"),
        ("c4 e2 7b f7 c0", Reason.UNHANDLED_FAMILY, "VEX"),
        ("62 f1 7c 48 10 c1", Reason.UNHANDLED_FAMILY, "EVEX"),
        ("0f 22 d8", Reason.UNHANDLED_FAMILY, "system"),
        ("0f 30", Reason.UNHANDLED_FAMILY, "system"),
        ("0f 01 f8", Reason.UNHANDLED_FAMILY, "system"),  # swapgs
        ("f3 48 0f 1e c8", Reason.UNHANDLED_FAMILY, "system"),  # rdsspq writes a register
        ("0f c7 f0", Reason.UNHANDLED_FAMILY, "system"),  # rdrand
        ("66 c3", Reason.UNHANDLED_FAMILY, "66-prefixed branch"),
        ("66 66 48 e8 00 00 00 00", Reason.UNHANDLED_FAMILY, "66-prefixed branch"),
        ("66 ff d0", Reason.UNHANDLED_FAMILY, "66-prefixed branch"),
        ("66 eb 00", Reason.UNHANDLED_FAMILY, "66-prefixed branch"),
        ("f2 c3", Reason.UNHANDLED_FAMILY, "rep prefix"),
        ("67 8b 05 00 00 00 00", Reason.UNHANDLED_FAMILY, "EIP-relative"),
    ],
)
def test_no_family_takes_and_the_refusal_names_the_kind(text: str, reason: Reason, kind: str) -> None:
    insn = decode(bytes.fromhex(text), ADDR)
    found = classify(insn)
    assert isinstance(found, Unhandled)
    assert found.reason is reason
    assert kind in found.detail
    assert insn.mnemonic in found.detail
