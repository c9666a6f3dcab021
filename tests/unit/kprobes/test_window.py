"""Small functions, of which each window's fate is known."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from gdb_kprobe.kprobes.insn_info import InsnInfos
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.window import (
    Function,
    Window,
    can_optimize,
    kernel_optimizes,
    kernel_optimizes_in,
    make_function,
)
from gdb_kprobe.linux.branch_targets import CodeReferences, find_references
from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, Reason, Refusal, VirtAddr

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_C100_0000))
FAR = AddressRange(VirtAddr(0xFFFF_8880_0000_0000), VirtAddr(0xFFFF_8880_0100_0000))


def tables(**places: list[int]) -> TextTables:
    names = ("ex_table", "ex_fixups", "jump_labels", "jump_targets", "static_calls", "bugs", "locks")
    return TextTables(**{name: array("Q", [ADDR + at for at in places.get(name, [])]) for name in names})


def references(raw: bytes, jump_tables: bool = False, **places: list[int]) -> CodeReferences:
    return find_references([(ADDR, raw)], [ADDR], tables(**places), jump_tables=jump_tables)


def decoded(piece: Piece, rules: Rules | None = None) -> Function:
    return make_function(piece, InsnInfos(rules).read(piece.addr, piece.code, len(piece.code))[0])


def verdict(code: str, offset: int = 0, area: AddressRange = AREA, **given: Any) -> Window | Reason:
    raw = bytes.fromhex(code)
    piece = {name: given.pop(name) for name in ("sites", "extable") if name in given}
    function = decoded(Piece(ADDR, raw, **piece))
    found = can_optimize(function, function.addrs.index(ADDR + offset), lambda: references(raw, **given), area)
    return found.reason if isinstance(found, Refusal) else found


def window(start: int, end: int, *interior: int, **given: Any) -> Window:
    inside = tuple(VirtAddr(ADDR + at) for at in interior)
    return Window(VirtAddr(ADDR + start), VirtAddr(ADDR + end), inside, **given)


@pytest.mark.parametrize("pad", ["f30f1efa", "f30f1efb", "660f1f00", "0f1f40d6"])
def test_the_nop_of_ftrace_is_known_behind_each_landing_pad(pad: str) -> None:
    assert verdict(f"{pad} 0f1f440000 c3", 4) == window(4, 9, borrowed=True)
    assert verdict(f"{pad} 0f1f440000 c3") is Reason.LANDING_PAD
    assert verdict("0f1f4000 0f1f440000 c3") == window(0, 9, 4)  # another nop


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("b801000000 c3", window(0, 5)),
        ("55 4889e5 53 c3", window(0, 5, 1, 4)),
        ("55 b801000000 c3", window(0, 6, 1)),
        ("0f1f440000 c3", window(0, 5, borrowed=True)),
        ("f30f1efa 0f1f440000 c3", Reason.LANDING_PAD),
        ("55 e800000000 c3", window(0, 6, 1)),  # it returns behind the jump
        ("ffd0 0f1f00 c3", window(0, 5, 2, old_return=VirtAddr(ADDR + 2))),
        ("ffd0 90 0f1f440000 c3", window(0, 8, 2, 3, old_return=VirtAddr(ADDR + 2))),
        ("ffd0 4889c3 c3", Reason.WINDOW_CALL),
        ("ffd0 c3 cccccc", Reason.WINDOW_CALL),
        ("5b 5d c3 cccc", window(0, 5, 1, 2, 3, 4)),
        ("5b 5d c3", Reason.WINDOW_OUTSIDE),
        ("5b c3 31c0 90", Reason.WINDOW_UNREACHED),
        ("55 0f0b 9090", Reason.RAISES_UD),
        ("55 90 f30f1efa c3", Reason.LANDING_PAD),  # an indirect branch may go there
        ("55 4889e5 53 ebfa", Reason.WINDOW_TARGET),
        ("55 4889e5 53 ebf9", window(0, 5, 1, 4)),  # to the window's start
        ("7402 4889e5 90 c3", Reason.WINDOW_TARGET),  # into the middle of an instruction
        ("7403 4889e5 90 c3", window(0, 5, 2)),  # to the first byte behind the jump
        ("55 9090 fb f4 c3", window(0, 5, 1, 2, 3, 4)),
        ("9090 9090 fb f4 c3", Reason.INTERRUPT_SHADOW),  # the jump back would part them
    ],
)
def test_our_rules(code: str, expected: Window | Reason) -> None:
    assert verdict(code) == expected


def test_what_the_guest_says_of_the_text() -> None:
    code = "55 4889e5 53 c3"
    assert verdict(code, jump_targets=[1]) is Reason.WINDOW_TARGET
    assert verdict(code, ex_fixups=[4]) is Reason.WINDOW_TARGET
    assert verdict(code, ex_fixups=[5]) == window(0, 5, 1, 4)
    assert verdict(code, extable=[ADDR + 1]) is Reason.EX_TABLE
    assert verdict(code, sites=[(ADDR + 4, 5, Reason.STATIC_CALL)]) is Reason.STATIC_CALL
    assert verdict(code, sites=[(ADDR + 5, 5, Reason.STATIC_CALL)]) == window(0, 5, 1, 4)
    assert verdict(code, area=FAR) is Reason.OUT_OF_REACH


def test_an_indirect_jump_makes_windows_of_several_unsafe() -> None:
    jump = "55 4889e5 53 ffe0"
    own_text = "55 4889e5 53 488d05f5ffffff ffe0"  # lea rax, [rip - 11]: its own second instruction
    elsewhere = "55 4889e5 53 488d05f4ffffff 488d0df3ffffff ffe0"
    assert verdict(jump) == window(0, 5, 1, 4)
    assert verdict(jump, jump_tables=True) is Reason.INDIRECT_JUMP
    assert verdict("b801000000 ffe0", jump_tables=True) == window(0, 5)
    assert verdict(own_text) is Reason.WINDOW_TARGET
    assert verdict(own_text, 5) == window(5, 12)
    assert verdict(elsewhere) is Reason.INDIRECT_JUMP


@pytest.mark.parametrize(
    ("code", "rules", "expected"),
    [
        ("55 4889e5 53 c3", Rules.LINUX_6_1, True),
        ("55 e800000000 c3", Rules.LINUX_6_1, False),  # a call is not boosted
        ("55 4889e5 53 ebf9", Rules.LINUX_6_1, True),
        ("55 4889e5 53 74fe c3", Rules.LINUX_6_1, False),  # the end is inclusive
        ("55 4889e5 53 ffe0", Rules.LINUX_6_1, False),
        ("55 4889e5 53 ffe0", Rules.LINUX_6_12, True),
        ("0f1f440000 c3", Rules.LINUX_6_12, False),
    ],
)
def test_the_kernels_rules(code: str, rules: Rules, expected: bool) -> None:
    raw = bytes.fromhex(code)
    function = decoded(Piece(ADDR, raw), rules)
    assert (kernel_optimizes_in(function, references(raw), rules) and kernel_optimizes(function, 0)) is expected
