"""numpy, loaded so that the threads it starts take no signals.

A signal for a process goes to any thread that does not block it. gdb waits for its Ctrl-C in the first one.
"""

from __future__ import annotations

import signal

_before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
try:
    import numpy as np
    import numpy.typing as npt
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before)

__all__ = ["np", "npt"]
