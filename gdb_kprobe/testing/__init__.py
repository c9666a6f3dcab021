"""For tests of guests: a gdb with the plugin behind GDB/MI or at a terminal, and the comparison of the guest's text."""

from gdb_kprobe.testing.mi import GdbCommandError, GdbDiedError, GdbMi, GdbTimeoutError
from gdb_kprobe.testing.terminal import GdbTerminal
from gdb_kprobe.testing.text import TextSnapshot

__all__ = [
    "GdbCommandError",
    "GdbDiedError",
    "GdbMi",
    "GdbTerminal",
    "GdbTimeoutError",
    "TextSnapshot",
]
