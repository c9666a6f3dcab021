"""The kernel's rules, over every opcode: the expectations are written as the kernel writes its table, not as we do."""

from __future__ import annotations

import pytest

from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal, probe_refusal, rules_of
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, decode
from gdb_kprobe.x86.encoding import LEGACY_PREFIXES

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)

BITMAP = (0x8000034C, 0x0002000F, 0x0000FFFF, 0xC0F0CFFF, 0xFFFF0000, 0xF8FFBB3B, 0xBB2EFF03, 0x772EBB26)
"""``twobyte_is_boostable`` as words of 32 bits, the lowest opcodes first."""


def insn(code: str) -> Insn:
    return decode(bytes.fromhex(code), ADDR)


def forms(prefix: bytes, opcode: int) -> list[Insn]:
    """The instructions with this opcode: one for each ModRM.reg, in memory and in registers."""
    found = []
    for modrm in (*range(0x00, 0x40, 8), *range(0xC0, 0x100, 8)):
        try:
            found.append(decode(prefix + bytes((opcode, modrm)) + bytes(12), ADDR))
        except DecodeError:
            continue
    return found


@pytest.mark.parametrize("rules", Rules)
@pytest.mark.parametrize("opcode", range(256))
def test_two_byte_opcodes_are_as_in_the_bitmap(opcode: int, rules: Rules) -> None:
    expected = bool(BITMAP[opcode // 32] >> opcode % 32 & 1)
    for one in forms(b"\x0f", opcode):
        if one.opcode_map == 1:
            assert (boost_refusal(one, rules, in_extable=False) is None) is expected, one


def kernel_boosts(rules: Rules, opcode: int, reg: int) -> bool:
    """The switch over one-byte opcodes, one case a line."""
    if opcode == 0x62 or opcode & 0xF0 == 0x70 or opcode == 0x9A:
        return False
    if opcode in (0xCC, 0xCD, 0xCE, 0xD6) or 0xD8 <= opcode <= 0xDF:
        return False
    if 0xE0 <= opcode <= 0xE3 or opcode in (0xE8, 0xE9, 0xEB) or 0xF0 <= opcode <= 0xF4:
        return False
    newest = rules is Rules.LINUX_6_12
    if opcode in (0xC0, 0xC1) or 0xD0 <= opcode <= 0xD3:
        return newest and reg != 6
    if opcode in (0xF6, 0xF7):
        return newest and reg != 1
    if opcode == 0xFE:
        return newest and reg in (0, 1)
    if opcode == 0xFF:
        return reg in {Rules.LINUX_5: (), Rules.LINUX_6_1: (4,), Rules.LINUX_6_12: (0, 1, 4)}[rules]
    return True


@pytest.mark.parametrize("rules", Rules)
@pytest.mark.parametrize(
    "opcode", [opcode for opcode in range(256) if opcode not in LEGACY_PREFIXES and not 0x40 <= opcode <= 0x4F]
)
def test_one_byte_opcodes_are_as_in_the_switch(opcode: int, rules: Rules) -> None:
    for one in forms(b"", opcode):
        if one.opcode_map == 0 and not one.encoding.space:
            # For opcodes without ModRM the second byte is no register: any value will do.
            expected = kernel_boosts(rules, opcode, one.reg or 0)
            # A movabs with eight bytes behind the opcode is still short enough for the slot.
            assert (boost_refusal(one, rules, in_extable=False) is None) is expected, one


@pytest.mark.parametrize(
    ("code", "boosted"),
    [
        ("c5f877", ()),  # vzeroupper
        ("660f3800c1", ()),  # pshufb: a three-byte map
        ("0f38f00424", ()),  # movbe
        ("2e90", (Rules.LINUX_5,)),  # cs nop
        ("67488d4500", (Rules.LINUX_5,)),  # lea rax, [ebp]
        ("3e90", tuple(Rules)),
        ("48b8efcdab8967452301", tuple(Rules)),  # 10 bytes: the longest that leaves room for the jump
        ("66662e0f1f840000000000", ()),  # 11 bytes
        ("c3", tuple(Rules)),
        ("fb", tuple(Rules)),
        ("9c", tuple(Rules)),
        ("ffe0", (Rules.LINUX_6_1, Rules.LINUX_6_12)),
        ("48ffc0", (Rules.LINUX_6_12,)),  # inc rax
        ("ffd0", ()),
        ("0f05", ()),
    ],
)
def test_prefixes_lengths_and_maps(code: str, boosted: tuple[Rules, ...]) -> None:
    assert tuple(rules for rules in Rules if boost_refusal(insn(code), rules, in_extable=False) is None) == boosted


def test_nothing_of_the_exception_table_is_boosted() -> None:
    assert boost_refusal(insn("90"), Rules.LINUX_6_12, in_extable=True) == "it is in the exception table"


@pytest.mark.parametrize(
    ("code", "probed"),
    [
        ("55", tuple(Rules)),
        ("e800000000", tuple(Rules)),
        ("ffd0", tuple(Rules)),
        ("ff1500000000", (Rules.LINUX_5,)),  # call [rip]
        ("ff24c500000000", (Rules.LINUX_5,)),  # jmp [rax*8]
        ("ff18", (Rules.LINUX_5,)),  # callf [rax]
        ("48cf", (Rules.LINUX_5,)),  # iretq
        ("8ed0", ()),  # mov ss, eax
        ("8ec0", tuple(Rules)),
        ("cc", ()),
        ("cd80", (Rules.LINUX_5, Rules.LINUX_6_1)),
        ("f1", (Rules.LINUX_5, Rules.LINUX_6_1)),
        ("0f0b", (Rules.LINUX_5, Rules.LINUX_6_1)),
        ("0f01c1", (Rules.LINUX_5,)),  # vmcall
        ("0f01ca", tuple(Rules)),  # clac
        ("c5f877", tuple(Rules)),
    ],
)
def test_what_a_kernel_would_probe(code: str, probed: tuple[Rules, ...]) -> None:
    assert tuple(rules for rules in Rules if probe_refusal(insn(code), rules) is None) == probed


@pytest.mark.parametrize(
    ("release", "rules"),
    [
        ("5.10.0-30-amd64", Rules.LINUX_5),
        ("5.12.19", Rules.LINUX_5),
        ("5.13.0", Rules.LINUX_6_1),
        ("6.1.0-43-cloud-amd64", Rules.LINUX_6_1),
        ("6.8.12", Rules.LINUX_6_1),
        ("6.9.0", Rules.LINUX_6_12),
        ("6.12.63+deb13-cloud-amd64", Rules.LINUX_6_12),
        ("7.0-rc1", Rules.LINUX_6_12),
        ("?", Rules.LINUX_6_12),
    ],
)
def test_the_version_chooses_the_rules(release: str, rules: Rules) -> None:
    assert rules_of(release) is rules
