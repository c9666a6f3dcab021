"""What the pipe between gdb and its watchdog says: one byte at each change. The end of the pipe is the end of gdb."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What gdb is about; of all that were told, the last one counts."""

    STOPPED = b"s"
    """The machine is stopped for the user, with its own text and no breakpoint: it stays so, and may be let run.

    (But while a call of the guest is made for a command: then there are breakpoints where that stops.)
    """
    RUNNING = b"r"
    """The machine runs, or is about to, and nothing will stop it: QEMU has no breakpoint."""
    WATCHED = b"w"
    """The same, with breakpoints in QEMU: gdb handles hits in between."""
    DONE = b"d"
    """Nothing of ours is in the guest: the watchdog ends."""
