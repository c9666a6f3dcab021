"""What came of the cells, as lines, as a table, and as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.matrix.cells import Cell

_DETAIL = 300
"""Most characters of a reason in a line."""


class Result(StrEnum):
    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Row:
    """*detail*: what was seen, or why it failed or was skipped. *seconds* are those of the whole cell."""

    cell: Cell
    result: Result
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.result} {self.cell} ({self.seconds:.0f} s): {self.detail[:_DETAIL]}"


def summary(rows: Sequence[Row]) -> str:
    """Return ``N passed, N failed, N skipped``."""
    counted = {result: sum(row.result is result for row in rows) for result in Result}
    return f"{counted[Result.PASSED]} passed, {counted[Result.FAILED]} failed, {counted[Result.SKIPPED]} skipped"


def markdown(rows: Sequence[Row], versions: Mapping[str, str], command: str) -> str:
    """Return the document of *rows*; *versions* are those in each userland, *command* has made it."""
    lines = [
        "# What was run on what",
        "",
        f"Made by `{command}`; a *cell* has a probe on each rung and one with a condition, against a known number of",
        "calls on every vCPU; text and log of the guest are compared afterwards. A demo is `gdb-kprobe demo`.",
        "",
        summary(rows) + ".",
        "",
        "| userland | versions |",
        "|---|---|",
        *(f"| {userland} | {text} |" for userland, text in versions.items()),
        "",
        "| cell | result | seen |",
        "|---|---|---|",
        *(f"| {row.cell} | {row.result} | {row.detail[:_DETAIL].replace('|', '/')} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
