"""What gdb writes to the machine, seen on the wire: in gdb's own log of its connection."""

from __future__ import annotations

import re
from pathlib import Path

from gdb_kprobe.testing.mi import GdbMi

_SENT = re.compile(r"^w \+?\$(?P<packet>[MXGP][^#]*)", re.M)
"""Packets that write memory (M, X) or registers (G, P)."""


class Wire:
    """The log of *gdb*'s connection, in the file *path*; to be made before gdb connects."""

    def __init__(self, gdb: GdbMi, path: Path) -> None:
        self._gdb = gdb
        self._path = path
        self._start = 0
        gdb.console(f"set remotelogfile {path}")

    def mark(self) -> None:
        """Begin anew: what was written before does not count."""
        self._start = len(self._read())

    def writes(self) -> list[str]:
        """The packets that wrote memory or registers since the last :meth:`mark`."""
        return [match["packet"] for match in _SENT.finditer(self._read(), self._start)]

    def _read(self) -> str:
        return self._path.read_text(errors="replace") if self._path.exists() else ""
