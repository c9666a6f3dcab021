"""Single values and tables as text: addresses, bytes, sizes, durations, columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 79
_GAP = "  "
_MIN_WRAPPED = 20
_NUMBER = re.compile(r"-?[0-9][0-9,.]*( ?[a-zA-Z%]{1,3})?", re.ASCII)
_BYTES_A_LINE = 16


def address(addr: int, symbol: str = "", offset: int = 0, module: str = "") -> str:
    """``0xffffffff81234567 (vfs_read+0x17)``; without a symbol, the number alone."""
    return f"{addr:#018x} ({symbolic(symbol, offset, module=module)})" if symbol else f"{addr:#018x}"


def symbolic(symbol: str, offset: int, size: int = 0, module: str = "") -> str:
    """``vfs_read+0x17/0x370 [module]``, as the kernel prints a place; size and module where they are known."""
    sign = "-" if offset < 0 else "+"
    text = f"{symbol}{sign}{abs(offset):#x}"
    if size:
        text += f"/{size:#x}"
    return f"{text} [{module}]" if module else text


def hex_bytes(data: bytes) -> str:
    """``0f 1f 44 00 00``"""
    return data.hex(" ")


def hexdump(data: bytes, start: int = 0) -> str:
    """Sixteen bytes a line, with the address of the first and the printable ones as characters."""
    lines = []
    for at in range(0, len(data), _BYTES_A_LINE):
        chunk = data[at : at + _BYTES_A_LINE]
        halves = f"{chunk[:8].hex(' '):23}  {chunk[8:].hex(' '):23}"
        characters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in chunk)
        lines.append(f"{start + at:016x}  {halves}  |{characters}|")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in the largest unit that divides them: ``16 MiB``, ``4 KiB``, ``100 bytes``."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return "1 byte" if count == 1 else f"{count} bytes"


def duration(seconds: float) -> str:
    """Three significant digits: ``364 us``, ``8.70 ms``, ``2.61 s``; from two minutes on ``3 min 05 s``."""
    if seconds >= 120:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        # Rounding comes first: 0.9996 s is 1.00 s, not 1000 ms.
        if float(f"{seconds * factor:.3g}") >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{2 if rounded < 10 else 1 if rounded < 100 else 0}f}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under *headers*, two blanks apart; a column of numbers is aligned to the right.

    The last column is wrapped where the line would be longer than :data:`WIDTH` and there is room to wrap in. No
    headers: pass empty strings.
    """
    cells = [tuple(row) for row in rows]
    assert all(len(row) == len(headers) for row in cells), "a row has another number of columns than the headers"
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    lines = cells if not any(headers) else [tuple(headers), *cells]
    return "\n".join(line for row in lines for line in _row(row, widths, right))


def _row(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    padded = [
        cell.rjust(width) if is_right else cell.ljust(width)
        for cell, width, is_right in zip(row, widths, right, strict=True)
    ]
    indent = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    line = _GAP.join(padded).rstrip()
    if len(line) <= WIDTH or WIDTH - indent < _MIN_WRAPPED:
        return [line]
    wrapped = textwrap.wrap(row[-1], WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    first = _GAP.join([*padded[:-1], wrapped[0]])
    return [first, *(" " * indent + more for more in wrapped[1:])]
