"""What was found of a guest and its QEMU, as text."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.guest.doctor import Finding


def doctor(findings: Sequence[Finding]) -> str:
    """A line for each of *findings*, with what to do below it."""
    width = max((len(finding.what) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{'! ' if finding.remedy else '  '}{finding.what:{width}}  {finding.state}")
        if finding.remedy:
            lines.append(f"{'':{width + 4}}hint: {finding.remedy}")
    return "\n".join(lines)
