"""A sequence that fails, made shorter: steps are left out as long as it fails."""

from __future__ import annotations

from collections.abc import Callable

from tests.torture.owners.steps import Sequence

_MOST = 40
"""Sequences that are tried."""


def shrink(sequence: Sequence, fails: Callable[[Sequence], bool], most: int = _MOST) -> Sequence:
    """Leave out what is not needed for *fails*, half of it at once, then less, and in the end each step.

    *most* is how often it may be asked.
    """
    size = max(1, len(sequence) // 2)
    while True:
        at = 1  # the first step says where it all is
        gone = False
        while at < len(sequence) and most > 0:
            shorter = sequence[:at] + sequence[at + size :]
            most -= 1
            if fails(shorter):
                sequence, gone = shorter, True
            else:
                at += size
        if most <= 0 or (size == 1 and not gone):
            return sequence
        size = max(1, size // 2)
