"""Ctrl-C and our Python code inside gdb.

gdb turns a SIGINT that arrives while Python runs into a KeyboardInterrupt at a random place. A dispatch must not be cut
in two, so the signal waits until it is over; a handler of the user's can be interrupted.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_SIGNALS = {signal.SIGINT}


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back. One that came meanwhile is raised as KeyboardInterrupt when this ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within :func:`uninterrupted`, let SIGINT through: around code that is not ours."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
