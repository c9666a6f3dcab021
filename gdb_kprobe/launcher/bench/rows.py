"""What a bench found: rows, how they come of measurements, and how they are shown; pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gdb_kprobe.render.text import table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    *us_per_hit* is the median of the repetitions and *spread* their range, in us. *again* are the hits more than
    expected that are no mistake.
    """

    name: str
    us_per_hit: float
    spread: float
    hits: int
    expected_hits: int
    again: int = 0

    @property
    def noisy(self) -> bool:
        """The repetitions differ by more than a third of the value: it proves nothing."""
        return self.spread > self.us_per_hit / 3

    @property
    def exact(self) -> bool:
        """Every call was seen."""
        return self.expected_hits <= self.hits <= self.expected_hits + self.again

    def entry(self) -> dict[str, object]:
        """The row as it is written to the file."""
        return {
            "name": self.name,
            "us_per_hit": self.us_per_hit,
            "spread": self.spread,
            "hits": self.hits,
            "expected_hits": self.expected_hits,
            "noisy": self.noisy,
        }


def make_row(name: str, samples: Sequence[float], hits: int, expected_hits: int, again: int = 0) -> Row:
    """The row of *samples*, in us a hit, one of each repetition."""
    return Row(name, statistics.median(samples), max(samples) - min(samples), hits, expected_hits, again)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How much y grows with x, of the straight line with the least squares; needs two different x."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def show(rows: Sequence[Row]) -> str:
    """The table; how many times faster a row is, is said of the first."""
    lines = [
        (
            row.name,
            f"{row.us_per_hit:.3f}",
            f"{row.spread:.3f}",
            f"{rows[0].us_per_hit / row.us_per_hit:,.0f}" if row.us_per_hit > 0 else "-",
            str(row.hits),
            str(row.expected_hits),
            "noisy" if row.noisy else "",
        )
        for row in rows
    ]
    return table(("row", "us per hit", "spread", "times faster", "hits", "expected", ""), lines)
