from __future__ import annotations

from array import array
from typing import Any

import pytest

from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.text import ForbiddenRange, ForbiddenRanges, TextFacts
from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, Reason, VirtAddr

TEXT = 0xFFFF_FFFF_8100_0000
INIT = TEXT + 0x8000
SYMBOLS = {
    TEXT: "vfs_read",
    TEXT + 0x100: "__pfx_exc_int3",
    TEXT + 0x110: "exc_int3",
    TEXT + 0x200: "exc_int3.cold",
    TEXT + 0x300: "vfs_write.cold",
    TEXT + 0x400: "blacklisted",
    INIT: "start_kernel",
}


def window(start: int, end: int) -> AddressRange:
    return AddressRange(VirtAddr(start), VirtAddr(end))


@pytest.fixture
def facts(memory: Any) -> TextFacts:
    text = bytearray(0x1000)
    text[0x22:0x24] = b"\xeb\x05"  # a short jump label; the one at 0x30 is a 5-byte nop
    text[0x30:0x35] = bytes.fromhex("0f1f440000")
    memory.add(TEXT, bytes(text))
    addrs = array("Q", list(SYMBOLS))
    symbols = SymbolTable(list(SYMBOLS.values()), "t" * len(SYMBOLS), addrs, (window(TEXT, TEXT + 0x10000),))
    return TextFacts(
        memory=memory,
        kallsyms=Kallsyms(symbols),
        text=(window(TEXT, TEXT + 0x1000),),
        init=(window(INIT, INIT + 0x1000),),
        forbidden=ForbiddenRanges(
            [
                ForbiddenRange(window(TEXT + 0x110, TEXT + 0x200), Reason.NOINSTR, ".noinstr.text"),
                ForbiddenRange(window(TEXT + 0x110, TEXT + 0x180), Reason.BLACKLISTED, "the list"),
                ForbiddenRange(window(TEXT + 0x400, TEXT + 0x500), Reason.BLACKLISTED, "the list"),
            ]
        ),
        tables=TextTables(
            ex_table=array("Q", [TEXT + 0x60]),
            ex_fixups=array("Q", [TEXT + 0x70]),
            jump_labels=array("Q", [TEXT + 0x22, TEXT + 0x30]),
            jump_targets=array("Q", [TEXT + 0x50, TEXT + 0x50]),
            static_calls=array("Q", [TEXT + 0x40]),
            bugs=array("Q", [TEXT + 0x48]),
            locks=array("Q", [TEXT + 0x4A]),
        ),
        bp_path=(window(TEXT + 0x480, TEXT + 0x490),),
    )


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        (0, 5, None),
        (0x20, 2, None),
        (0x20, 3, Reason.JUMP_LABEL),
        (0x22, 2, Reason.JUMP_LABEL),
        (0x23, 1, Reason.JUMP_LABEL),
        (0x24, 3, None),  # right behind the short one
        (0x2F, 1, None),
        (0x34, 1, Reason.JUMP_LABEL),
        (0x35, 3, None),
        (0x40, 5, Reason.STATIC_CALL),
        (0x44, 1, Reason.STATIC_CALL),
        (0x45, 3, None),
        (0x48, 2, Reason.BUG_TABLE),
        (0x4A, 4, Reason.ALTERNATIVE),
        (0x4B, 4, None),
        (0x60, 3, None),  # may fault, but may be touched
        (0x100, 1, Reason.PADDING),
        (0x110, 1, Reason.NOINSTR),
        (0x1FF, 1, Reason.NOINSTR),
        (0x200, 1, Reason.NOINSTR),
        (0x300, 1, None),
        (0x400, 1, Reason.BLACKLISTED),
        (0x480, 1, Reason.BP_PATH),  # also on the list
        (0x48F, 2, Reason.BP_PATH),
        (0x490, 1, Reason.BLACKLISTED),
        (0x3FC, 8, Reason.BLACKLISTED),
        (0xFFF, 1, None),
        (0x1000, 1, Reason.NOT_TEXT),
        (0x8000, 1, Reason.INIT_TEXT),
        (-1, 1, Reason.NOT_TEXT),
    ],
)
def test_reason_at(facts: TextFacts, offset: int, length: int, reason: Reason | None) -> None:
    found = facts.reason_at(VirtAddr(TEXT + offset), length)
    assert (found.reason if found else None) == reason


def test_refusal_names_symbol_and_cause(facts: TextFacts) -> None:
    found = facts.reason_at(VirtAddr(TEXT + 0x208), 1)
    assert found is not None
    assert found.detail == "exc_int3.cold+0x8: exc_int3 is in .noinstr.text"


def test_sites_in_a_window_with_their_sizes(facts: TextFacts) -> None:
    found = [(site.addr - TEXT, site.size, site.reason) for site in facts.sites_in(window(TEXT, TEXT + 0x1000))]
    assert found == [
        (0x22, 2, Reason.JUMP_LABEL),
        (0x30, 5, Reason.JUMP_LABEL),
        (0x40, 5, Reason.STATIC_CALL),
        (0x48, 2, Reason.BUG_TABLE),
        (0x4A, 1, Reason.ALTERNATIVE),
    ]


def test_exception_table_is_by_exact_address(facts: TextFacts) -> None:
    assert facts.in_extable(TEXT + 0x60)
    assert not facts.in_extable(TEXT + 0x61)
    assert not facts.in_extable(TEXT + 0x70)


def test_init_text_is_not_live(facts: TextFacts) -> None:
    assert facts.is_live_text(TEXT)
    assert not facts.is_live_text(INIT)
    assert not facts.is_live_text(TEXT - 1)


def test_a_long_range_is_found_behind_shorter_ones() -> None:
    ranges = ForbiddenRanges(
        ForbiddenRange(window(start, end), Reason.BLACKLISTED, f"{start:#x}")
        for start, end in [(0x500, 0x501), (0x100, 0x1000), (0x200, 0x210)]
    )
    found = ranges.find(window(0x600, 0x601))
    assert found is not None
    assert found.what == "0x100"
    assert ranges.find(window(0x1000, 0x1001)) is None
    assert ranges.find(window(0xFF, 0x100)) is None
