"""What was found of a guest and its QEMU, as text."""

from __future__ import annotations

from collections.abc import Sequence


def doctor(findings: Sequence[tuple[str, str, str]]) -> str:
    """A line for each of *findings* (what, its state, what to do), with what to do below it."""
    width = max((len(what) for what, _, _ in findings), default=0)
    lines = []
    for what, state, remedy in findings:
        lines.append(f"{'! ' if remedy else '  '}{what:{width}}  {state}")
        if remedy:
            lines.append(f"{'':{width + 4}}hint: {remedy}")
    return "\n".join(lines)
