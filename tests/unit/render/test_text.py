"""Single values and tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.render import text

ADDR = 0xFFFF_FFFF_8123_4567


def test_address_with_and_without_a_symbol() -> None:
    assert text.address(ADDR, "vfs_read", 0x17) == "0xffffffff81234567 (vfs_read+0x17)"
    assert text.address(ADDR, "ext4_sync_fs", 0, "ext4") == "0xffffffff81234567 (ext4_sync_fs+0x0 [ext4])"
    assert text.address(ADDR) == "0xffffffff81234567"
    assert text.address(0x40_1000) == "0x0000000000401000"


def test_symbolic_places() -> None:
    assert text.symbolic("vfs_read", 4, 0x370) == "vfs_read+0x4/0x370"
    assert text.symbolic("vfs_read", -4) == "vfs_read-0x4"
    assert text.symbolic("f", 0, 16, "m") == "f+0x0/0x10 [m]"


def test_hexdump() -> None:
    assert text.hexdump(bytes(range(0x30, 0x44)) + b"\x7f\x00", ADDR) == (
        "ffffffff81234567  30 31 32 33 34 35 36 37  38 39 3a 3b 3c 3d 3e 3f  |0123456789:;<=>?|\n"
        "ffffffff81234577  40 41 42 43 7f 00                                 |@ABC..|"
    )
    assert text.hexdump(b"") == ""


@given(st.binary(max_size=100), st.integers(0, 2**48))
def test_a_hexdump_holds_every_byte_once_in_lines_of_one_width(data: bytes, start: int) -> None:
    lines = text.hexdump(data, start).splitlines()
    assert b"".join(bytes.fromhex(line[18:66]) for line in lines) == data
    assert [int(line[:16], 16) for line in lines] == list(range(start, start + len(data), 16))
    assert all(len(line) <= 86 for line in lines)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1000, "1000 bytes"),
        (1024, "1 KiB"),
        (1536, "1536 bytes"),
        (16 << 20, "16 MiB"),
        (3 << 30, "3 GiB"),
    ],
)
def test_sizes(count: int, expected: str) -> None:
    assert text.size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 ns"),
        (12e-9, "12 ns"),
        (999.6e-9, "1.00 us"),
        (364e-6, "364 us"),
        (0.0087, "8.70 ms"),
        (0.0123, "12.3 ms"),
        (0.9996, "1.00 s"),
        (9.999, "10.0 s"),
        (99.96, "100 s"),
        (119.4, "119 s"),
        (120, "2 min 00 s"),
        (185.4, "3 min 05 s"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    assert text.table(("name", "hits", "share"), [("open", "7", "12.5 %"), ("vfs_read", "2,000", "3 %")]) == (
        "name       hits   share\n"
        "open          7  12.5 %\n"
        "vfs_read  2,000     3 %"
    )  # fmt: skip


def test_a_table_without_headers_or_without_rows() -> None:
    assert text.table(("", ""), [("a", "b"), ("ccc", "d")]) == "a    b\nccc  d"
    assert text.table(("name", "hits"), []) == "name  hits"


def test_the_last_column_is_wrapped_under_itself() -> None:
    rendered = text.table(("name", "why"), [("open", "word " * 20), ("x", "short")])
    assert rendered == (
        "name  why\n"
        "open  " + " ".join(["word"] * 14) + "\n"
        "      " + " ".join(["word"] * 6) + "\n"
        "x     short"
    )  # fmt: skip


@given(
    st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.text("abc 123", max_size=40), min_size=columns, max_size=columns), min_size=1, max_size=5
        )
    )
)
def test_a_table_loses_no_word_and_has_no_trailing_blanks(rows: list[list[str]]) -> None:
    headers = [f"h{column}" for column in range(len(rows[0]))]
    rendered = text.table(headers, rows)
    words = [word for row in [headers, *rows] for cell in row for word in cell.split()]
    assert rendered.split() == words
    assert all(line == line.rstrip() for line in rendered.splitlines())
