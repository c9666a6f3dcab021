"""What the guest's own kernel would say of an instruction: its ``can_probe`` and its ``can_boost``.

Nothing here decides what we do, unless the profile asks for it (``policy.boost: kernel``); it is there to compare. The
rules are those of arch/x86/kernel/kprobes/core.c: ``can_probe``, ``__copy_instruction``, ``prepare_emulation``,
``can_boost`` with its bitmap ``twobyte_is_boostable``, and ``prepare_singlestep`` (``prepare_boost`` before v5.13).

Left out is that kernels with CONFIG_PREEMPTION boost nothing since v5.13: then there would be nothing to compare.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from gdb_kprobe.x86.decode import Insn


class Rules(StrEnum):
    """Versions of the rules, named by a kernel that has them."""

    LINUX_5 = "5.x"
    LINUX_6_1 = "6.1"
    LINUX_6_12 = "6.12"


_EMULATES: Final = (5, 13)
"""The release with "x86/kprobes: Use int3 instead of debug trap for single-step" and the fixes around it."""
_MORE_GROUPS: Final = (6, 9)
"""The release with "x86/kprobes: Boost more instructions from grp2/3/4/5" and the refusal of INT and UD."""
_UNKNOWN: Final = Rules.LINUX_6_12


def rules_of(release: str) -> Rules:
    """The rules of the kernel *release* (``6.1.0-43-cloud-amd64``), by its upstream version."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        return _UNKNOWN
    version = int(found[1]), int(found[2])
    if version < _EMULATES:
        return Rules.LINUX_5
    return Rules.LINUX_6_1 if version < _MORE_GROUPS else Rules.LINUX_6_12


def _bytes(text: str) -> frozenset[int]:
    """``"70-7f 9a"`` as a set."""
    found: set[int] = set()
    for word in text.split():
        first, _, last = word.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


_TWO_BYTE_BOOSTABLE: Final = _bytes(
    "02-03 06 08-09 1f-23 31 40-4f 60-6b 6e-6f 74-77 7e-7f 90-a1 a3-a5 a8-a9 ab-ad af-b7 bb-c1 c8-cf d1-d3 d5 d8-d9 "
    "db-dd df e1-e2 e5 e8-e9 eb-ed ef f1-f3 f5 f8-fa fc-fe"
)
_NOT_BOOSTABLE: Final = {
    Rules.LINUX_5: _bytes("62 70-7f 9a c0-c1 cc-ce d0-d3 d6 d8-e3 e8-e9 eb f0-f4 f6-f7 fe-ff"),
    Rules.LINUX_6_1: _bytes("62 70-7f 9a c0-c1 cc-ce d0-d3 d6 d8-e3 e8-e9 eb f0-f4 f6-f7 fe"),
    Rules.LINUX_6_12: _bytes("62 70-7f 9a cc-ce d6 d8-e3 e8-e9 eb f0-f4"),
}
# Groups of which only these ModRM.reg values are boostable.
_GROUPS: Final[dict[Rules, dict[int, tuple[int, ...]]]] = {
    Rules.LINUX_5: {},
    Rules.LINUX_6_1: {0xFF: (4,)},
    Rules.LINUX_6_12: {
        **dict.fromkeys((0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3), (0, 1, 2, 3, 4, 5, 7)),
        **dict.fromkeys((0xF6, 0xF7), (0, 2, 3, 4, 5, 6, 7)),
        0xFE: (0, 1),
        0xFF: (0, 1, 4),
    },
}
_SLOT: Final = 15
_JMP_REL32: Final = 5


def boost_refusal(insn: Insn, rules: Rules, *, in_extable: bool) -> str | None:
    """Why the kernel would not boost *insn*; ``None``: it would."""
    if in_extable:
        return "it is in the exception table"
    what = _opcode_refusal(insn, rules)
    if what is not None:
        return what
    if insn.length > _SLOT - _JMP_REL32:
        return f"its {insn.length} bytes leave no room for a jump in a slot of {_SLOT}"
    return None


def _opcode_refusal(insn: Insn, rules: Rules) -> str | None:
    opcode, group = insn.opcode, _GROUPS[rules].get(insn.opcode)
    if insn.encoding.space or insn.opcode_map > 1:
        return "only opcodes of one or two bytes are boosted"
    if insn.opcode_map == 1:
        return None if opcode in _TWO_BYTE_BOOSTABLE else f"opcode 0f {opcode:02x} is not in its table"
    # Before v5.13 the attribute of the opcode was looked at in place of the prefix's, so that none was ever found.
    if rules is not Rules.LINUX_5 and (0x2E in insn.prefixes or 0x67 in insn.prefixes):
        return "it has a cs or address-size prefix"
    if opcode in _NOT_BOOSTABLE[rules]:
        return f"opcode {opcode:02x} is not boosted"
    if group is not None and insn.reg not in group:
        return f"opcode {opcode:02x} /{insn.reg} is not boosted"
    return None


def probe_refusal(insn: Insn, rules: Rules) -> str | None:
    """Why the kernel would not take a kprobe on *insn*, as far as that is a matter of the instruction alone."""
    if insn.encoding.space:
        return None
    opcode, reg, modrm = insn.opcode, insn.reg, insn.modrm
    if insn.opcode_map == 0:
        if opcode == 0xCC:
            return "an int3 is not probed"
        if rules is Rules.LINUX_6_12 and opcode in (0xCD, 0xCE, 0xF1):
            return "software interrupts are not probed"
        if opcode == 0x17 or (opcode == 0x8E and reg == 2):
            return "it holds interrupts off until the next instruction is done"
        return None if rules is Rules.LINUX_5 else _emulation_refusal(insn)
    if insn.opcode_map == 1:
        if rules is Rules.LINUX_6_12 and opcode in (0xFF, 0xB9, 0x0B):
            return "an instruction that raises #UD is not probed"
        if rules is not Rules.LINUX_5 and opcode == 0x01 and modrm is not None and modrm >= 0xC0 and reg == 0:
            return "VMX transitions are not probed"
    return None


def _emulation_refusal(insn: Insn) -> str | None:
    opcode, reg = insn.opcode, insn.reg
    if opcode in (0x9A, 0xEA, 0xCF):
        return "far transfers are not emulated"
    if opcode != 0xFF or reg not in (2, 3, 4, 5):
        return None
    if reg in (3, 5):
        return "far transfers are not emulated"
    if insn.has_memory_operand:
        return "an indirect branch through memory is not emulated"
    return "its address size is not 64 bits" if 0x67 in insn.prefixes else None
