"""What the guest calls things may be anything; what is shown of it acts on no terminal, and every byte can be told."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gdb_kprobe
from gdb_kprobe.linux.image import read_string
from gdb_kprobe.linux.strings import c_string, is_printable, letters, showable
from gdb_kprobe.linux.structs import Struct
from gdb_kprobe.linux.types import KnownTypes, Layout, Member
from gdb_kprobe.model import VirtAddr

ESCAPE = b"\x1b]0;owned\x07\x1b[2J"
SHOWN = r"\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"do_sys_openat2.isra.0", "do_sys_openat2.isra.0"),
        (ESCAPE, SHOWN),
        (b"a\nb\rc\td", r"a\x0ab\x0dc\x09d"),
        (b"\x7f\x9b31m", r"\x7f\x9b31m"),  # DEL, and the C1 control that is CSI
        ("\u202egpj.exe".encode(), r"\xe2\x80\xaegpj.exe"),  # right to left from here on
        ("a\u200bb".encode(), r"a\xe2\x80\x8bb"),  # a blank of no width
        (rb"\x1b", r"\\x1b"),
    ],
)
def test_only_printable_ascii_is_shown_as_it_is(data: bytes, shown: str) -> None:
    assert showable(data) == shown


@given(st.binary(max_size=60))
def test_every_byte_can_be_told_from_what_is_shown(data: bytes) -> None:
    shown = showable(data)
    assert shown.isascii()
    assert shown == "" or shown.isprintable()
    back = re.sub(
        rb"\\(\\|x([0-9a-f]{2}))", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[2], 16)]), shown.encode()
    )
    assert back == data
    assert len(letters(data)) == len(data)
    assert letters(data) == "" or letters(data).isprintable()
    assert is_printable(data) == all(0x20 <= byte < 0x7F for byte in data)


def test_strings_and_members_of_structures_are_escaped_as_they_are_read(memory: Any) -> None:
    memory.add(0x1000, ESCAPE.ljust(512, b"\0"))
    assert read_string(memory, VirtAddr(0x1000)) == SHOWN
    types = KnownTypes({"task_struct": lambda: Layout(16, {"comm": Member(0, 16)})}, {})
    assert Struct(types, "task_struct", VirtAddr(0), b"\x1b[31m\0garbage...").string("comm") == r"\x1b[31m"
    assert c_string(b"one\0two\x1b\0", 4) == r"two\x1b"


# What is decoded there is not the guest's: packets of the stub, and files of the user's.
_OTHERS = {"target/packets.py", "target/stub.py", "target/ram.py", "config/document.py", "gdbext/output.py",
           "testing/terminal.py", "linux/strings.py"}  # fmt: skip


def test_no_other_code_makes_text_of_bytes_of_the_guest() -> None:
    root = Path(gdb_kprobe.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "decode":
                first = node.args[0] if node.args else None
                if not node.args or (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                    found.add(str(path.relative_to(root)))
    # A definition in the region is taken only where all of it is printable.
    assert found - _OTHERS == {"region/definitions.py"}
