"""How every kind of torture is told: what counts as a failure, and the last two lines."""

from __future__ import annotations

import time

from gdb_kprobe.testing import GdbCommandError, GdbDiedError, GdbTimeoutError
from kprobe_guest.errors import GuestError
from kprobe_guest.spec import KernelKind

KERNELS: tuple[KernelKind, ...] = ("debian", "newest")

FAILURES = (GuestError, GdbCommandError, GdbDiedError, GdbTimeoutError, AssertionError)
"""What a guest or a gdb that does not do as it should raises; anything else is a mistake of ours, and ends the run."""


def conclude(started: float, passed: int, failed: int) -> int:
    """Print how it ended; *started* is in seconds of :func:`time.monotonic`. Returns the exit status."""
    print(f"In {time.monotonic() - started:.0f} s:\n{passed} passed, {failed} failed")
    return 1 if failed else 0
