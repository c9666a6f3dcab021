"""Numbers as the kernel's kstrtoul(..., 0, ...) reads them: ``10``, ``0xa``, ``012`` (octal)."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?P<hex>0[xX][0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*)", re.ASCII)
_MAX_DIGITS = 64


def parse_number(text: str) -> int | None:
    """Return the number that the whole of *text* is, or None when it is none or needs more than 64 bits."""
    found = _NUMBER.fullmatch(text) if len(text) <= _MAX_DIGITS else None
    if found is None:
        return None
    value = int(text, {"hex": 16, "octal": 8, "decimal": 10}[found.lastgroup or ""])
    return value if value >> 64 == 0 else None
