"""Instructions written by hand, in hexadecimal: at least one of each kind that a family's rule tells apart."""

from __future__ import annotations

from typing import Final

from gdb_kprobe.x86.families import Family

CASES: Final[dict[Family, list[str]]] = {
    Family.NOP: [
        "90", "6690", "f390", "0f1f00", "0f1f440000", "660f1f840000000000", "2e0f1f840000000000", "f30f1efa",
    ],
    Family.PLAIN: [
        "55", "4157", "54", "5c", "5f", "6a80", "6812345678", "ff742408", "ff7424f8", "8f442408", "50", "c9",
        "c8100001",
        "4889e5", "4883ec18", "48b8efcdab8967452301", "b8ffffffff", "488b442410", "8d4701", "488d7c2408",
        "31c0", "85c0",
        "0fb6c3", "0fbe4708", "4863c7", "4801d8", "4811d8", "4819d8", "f7d8", "48ffc0", "fe4f08", "48c1e004", "d1f8",
        "480fafc3", "6bc30a", "48f7e3", "4887d8", "480f44c3", "0f94c0", "4898", "4899", "0fa3c8",
        "480fbae00a", "0fc8",
        "f3480fb8c3", "f30fbcc3", "658b042510000000", "65488b3c25c0ba0100", "a1efcdab8967452301", "9f", "9e",
        "f5", "fc", "a4", "48ab", "ae", "9d", "669d", "fa", "fb", "f048ff07", "f0480fb10f", "f00fc10b", "f0480fba2f07",
        "f34889e5", "0f0d0f", "0f28c1", "f30f6f07", "660fefc1", "660f7e07", "f20f1007", "660f3800c1", "660f3a0fc108",
        "0fb107", "480fc70f", "0fc1c3", "0faee8", "d7", "48f7f3", "0fbcc3", "480fa4d805", "0f184f10", "0f00ed",
    ],
    Family.RIP_RELATIVE: [
        "488b0512345678", "488d3df0ffffff", "c70512345600efbeadde", "803d1234560007", "ff3512345600", "8f0512345600",
        "65488b0512345600", "480fbf1512345600", "f3480fb80512345600", "480fba2d1234560011", "ff0500f0ffff",
        "678b0512345678", "67488d05f0ffffff", "6567488b0512345600", "f048ff0512345600", "f30f6f0512345600",
        "0f590500f0ffff",
    ],
    Family.REPEATED: ["f3a4", "f3a5", "f348a5", "f3aa", "f348ab", "f2ae", "f3a6", "f2a6", "f3ac", "67f3a4", "f366ab"],
    Family.PUSH_FLAGS: ["9c", "669c", "489c"],
    Family.JCC: [f"{op:02x}{rel}" for op in range(0x70, 0x80) for rel in ("10", "f0")]
    + [f"0f{op:02x}{rel}" for op in range(0x80, 0x90) for rel in ("10000000", "f0ffffff", "0000007f")]
    + ["2e75f0", "3e7410", "75fe"],
    Family.JMP: ["eb10", "ebf0", "ebfe", "e900100000", "e9f0f0ffff", "2ee900100000", "4ce900100000"],
    Family.CALL_REL: [
        "e800100000", "e8f0ffffff", "2ee800100000", "48e800100000", "67e800100000", "e800000000", "2e2ee800100000",
        "f2e800100000", "666648e800100000",
    ],
    Family.CALL_INDIRECT: [
        "ffd0", "ffd4", "41ffd3", "41ffd4", "2effd0", "3effd0", "ff10", "ff542408", "ff5424f8", "ff1424",
        "ff9424f0ffffff",
        "ff54c408", "42ff542408", "ff1512345600", "65ff142510000000", "ff14c500000081", "67ff5008", "48ffd0",
        "41ff5424f8",
    ],
    Family.JMP_INDIRECT: ["ffe0", "ffe4", "41ffe3", "3effe0", "ff20", "ff642408", "ff2512345600", "ff24c500000081"],
    Family.RET: ["c3", "f3c3", "f2c3", "2ec3", "c20800", "c2ff7f", "48c3"],
    Family.LOOP: [p + f"e{op}" + rel for p in ("", "67", "2e") for op in range(4) for rel in ("10", "f0", "80")]
    + ["e2fe", "e3fe"],
}  # fmt: skip
