"""A factor that is stated: how much longer everything takes on this machine than on a usual one. Time limits follow it.

A limit says how long something may take at most on a machine that nothing is wrong with. One that is emulated is tens
of times slower; it says so by a variable, which the nesting sets (:mod:`kprobe_guest.nesting`).
"""

from __future__ import annotations

import os

from kprobe_guest.errors import GuestError

SLOWNESS = "GDB_KPROBE_SLOWNESS"
"""The variable: a number, 1 if it is not set."""


def slowness() -> float:
    """Return the factor.

    :raises GuestError: the variable is no number of 1 or more.
    """
    text = os.environ.get(SLOWNESS, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1.0 <= factor < 1e6:
        raise GuestError(f"{SLOWNESS} is {text!r}; it is how many times slower than usual this machine is, 1 or more")
    return factor


def patient(seconds: float) -> float:
    """Return the time limit that *seconds* on a usual machine are here."""
    return seconds * slowness()
