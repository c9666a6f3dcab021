"""What TAB offers in a definition."""

from __future__ import annotations

import pytest

from gdb_kprobe.language.completion import complete_definition
from gdb_kprobe.model import PT_REGS_NAMES


def offered(text: str) -> list[str]:
    """What *text* may become: the candidates for its last word that begin with it."""
    token = "" if not text or text[-1].isspace() else text.split()[-1]
    return [one for one in complete_definition(text, lambda begun: [f"{begun}_place"]) if one.startswith(token)]


@pytest.mark.parametrize("text", ["vfs", "p vfs", "p:name vfs", "p:group/name vfs", "r:name vfs", "ext4:vfs"])
def test_the_place(text: str) -> None:
    assert offered(text) == [f"{text.split()[-1]}_place"]


@pytest.mark.parametrize("text", ["p:na", "r:group/na"])
def test_a_name_is_the_users(text: str) -> None:
    assert offered(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p vfs_read %d", ["%dx", "%di"]),
        ("p:x vfs_read %di a=%r1", ["a=%r15", "a=%r14", "a=%r13", "a=%r12", "a=%r11", "a=%r10"]),
        ("vfs_read a=%di:s", ["a=%di:s8", "a=%di:s16", "a=%di:s32", "a=%di:s64"]),
        ("vfs_read %di:x1", ["%di:x16"]),
        ("vfs_read i", ["if"]),
        ("vfs_read %di if d", ["dx", "di"]),
        ("vfs_read fd=%di if f", ["fd", "flags"]),
        ("vfs_read fd=%di if di == 3 && f", ["fd", "flags"]),
        ("vfs_read if !(%d", ["!(%dx", "!(%di"]),
        ("vfs_read if di==3&&s3", ["di==3&&s32("]),
        ("vfs_read if di == 3 && s32(d", ["s32(dx", "s32(di"]),
    ],
)
def test_arguments_types_and_conditions(text: str, expected: list[str]) -> None:
    assert offered(text) == expected


def test_behind_a_place_all_registers_and_if() -> None:
    assert offered("vfs_read ") == [*(f"%{name}" for name in PT_REGS_NAMES), "if"]
