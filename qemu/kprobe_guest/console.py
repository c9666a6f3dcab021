"""The guest's serial console, as QEMU logs it: what is new, what looks like a failure, how it ended."""

from __future__ import annotations

import re
from pathlib import Path

_FAILURE = re.compile(
    r"Kernel panic|\bOops\b|\bBUG:|kernel BUG at|WARNING:|Call Trace|soft lockup|hard LOCKUP|rcu:.*stall"
    r"|general protection fault|insmod \S+ failed"
    r"|guest: exception|guest: wrong result"  # the bare-metal guest's own words
)

SUSPICIOUS = "panic|oops|bug|warning|call trace|lockup|stall|protection fault|failed|exception|wrong result"
"""What each line of :func:`find_problems` has one of, whatever the case: for a grep in the guest, so that its whole log
need not come by a serial line. Under KVM each byte there is an exit, and takes milliseconds where KVM is emulated."""

TAIL_LINES = 60
"""Enough for a whole panic with its call trace."""


def find_problems(text: str) -> list[str]:
    """Lines of a kernel log that report a failure or a warning."""
    return [line.strip() for line in text.splitlines() if _FAILURE.search(line)]


class ConsoleLog:
    """The log file, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self._boot = 0

    def new_text(self) -> str:
        """What was printed since the last call, in whole lines."""
        data = self._read(self._seen)
        data = data[: data.rfind(b"\n") + 1]
        self._seen += len(data)
        return data.decode(errors="replace")

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._read(0).decode(errors="replace").replace("\r", "").splitlines()[-TAIL_LINES:])

    def note_reset(self) -> None:
        """What comes from now on is another boot's."""
        self._boot = len(self._read(0))

    def has_line_of_this_boot(self, line: bytes) -> bool:
        return line in self._read(self._boot).replace(b"\r", b"").split(b"\n")

    def _read(self, start: int) -> bytes:
        if not self._path.exists():
            return b""
        with self._path.open("rb") as log:
            log.seek(start)
            return log.read()
