"""Bytes of the guest as text that can be shown: the one place where the guest's bytes become a ``str``.

A terminal acts on control characters, MI and files keep them for the next terminal, and other characters hide or turn
what stands beside them (bidirectional marks, blanks of no width). So printable ASCII is shown as it is, and each other
byte as ``\\x1b``: whatever encoding the guest means, every byte can be told, and any terminal shows the text. A
backslash is doubled, so that nothing looks like an escape that is none. (The kernel escapes a ``comm`` in
/proc/PID/status in a like way: ``proc_task_name()``, fs/proc/array.c.)

Names are escaped when they are read, not when they are shown: no message, table or symbol file can forget it.
"""

from __future__ import annotations

import re
from typing import Final

_NOT_PRINTABLE: Final = re.compile(rb"[^\x20-\x7e]")
_NOT_AS_IS: Final = re.compile(rb"[^\x20-\x5b\x5d-\x7e]")
_SHOWN: Final = tuple(
    "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in range(0x100)
)
_LETTERS: Final = bytes(byte if 0x20 < byte < 0x7F else ord("?") for byte in range(0x100))


def showable(data: bytes) -> str:
    """Return *data* as text, in which each byte that is no printable ASCII is escaped."""
    if _NOT_AS_IS.search(data) is None:
        return data.decode("ascii")
    return "".join([_SHOWN[byte] for byte in data])


def is_printable(data: bytes) -> bool:
    """Whether all of *data* is printable ASCII."""
    return _NOT_PRINTABLE.search(data) is None


def c_string(data: bytes, at: int = 0) -> str:
    """Return the text from offset *at* of *data* up to its NUL, or up to the end of *data*."""
    end = data.find(b"\0", at)
    return showable(data[at:] if end < 0 else data[at:end])


def letters(data: bytes) -> str:
    """Return *data*, which has a letter in each byte; ``?`` where it is none."""
    return data.translate(_LETTERS).decode("ascii")
