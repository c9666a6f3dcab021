"""What a bench found: rows, how they come of measurements, and how they are shown; pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.render.text import table

_DRAWS: Final = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    *us_per_hit* and *spread*, the width of the interval that it lies in with 95 %, are in us; in a row of an act they
    are of the whole act, and *hits* are the sites that were found in memory, or the packets that were answered.

    *again* are the hits more than expected that are no mistake. *evaluated*, of a row whose hits are all rejected: how
    often the guest has asked the filters, and how often it should.
    """

    name: str
    us_per_hit: float
    spread: float
    hits: int
    expected_hits: int
    again: int = 0
    evaluated: tuple[int, int] | None = None

    @property
    def noisy(self) -> bool:
        """The spread is more than a third of the value: it proves nothing."""
        return self.spread > self.us_per_hit / 3

    @property
    def exact(self) -> bool:
        """Every call was seen."""
        asked = self.evaluated is None or self.evaluated[0] == self.evaluated[1]
        return asked and self.expected_hits <= self.hits <= self.expected_hits + self.again

    def entry(self) -> dict[str, object]:
        """The row as it is written to the file."""
        evaluated = {} if self.evaluated is None else dict(zip(("evaluated", "calls"), self.evaluated, strict=True))
        return {
            "name": self.name,
            "us_per_hit": self.us_per_hit,
            "spread": self.spread,
            "hits": self.hits,
            "expected_hits": self.expected_hits,
            "noisy": self.noisy,
            **evaluated,
        }


Points = Sequence[tuple[int, float]]
"""Of measurements: how many places were observed, and the us of a call."""


def make_row(
    name: str,
    points: Points,
    hits: int,
    expected_hits: int,
    again: int = 0,
    evaluated: tuple[int, int] | None = None,
) -> Row:
    """The row of *points*: what a place costs, and how wide the interval is that it lies in with 95 %."""
    return Row(name, cost_of_a_place(points), _spread(points), hits, expected_hits, again, evaluated)


def cost_of_a_place(points: Points) -> float:
    """How much the us of a call grow with the places; of points with one number of places, their median.

    By the medians of the points with the same number: a call takes much longer now and then.
    """
    medians = [(number, statistics.median(values)) for number, values in _by_number(points).items()]
    return slope(medians) if len(medians) > 1 else medians[0][1]


def slope(points: Points) -> float:
    """How much y grows with x, of the straight line with the least squares; needs two different x."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def _spread(points: Points) -> float:
    """By the bootstrap: of as many points drawn from those of each number, again and again."""
    chance = random.Random(0)
    groups = _by_number(points)
    drawn = sorted(
        cost_of_a_place(
            [(number, us) for number, values in groups.items() for us in chance.choices(values, k=len(values))]
        )
        for _ in range(_DRAWS)
    )
    return drawn[_DRAWS - _DRAWS // 40 - 1] - drawn[_DRAWS // 40]


def _by_number(points: Points) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = {}
    for number, us in points:
        groups.setdefault(number, []).append(us)
    return groups


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


def show_acts(rows: Sequence[Row]) -> str:
    """The table of acts: milliseconds, and how many times as long as its floor each takes."""
    by_name = {row.name: row for row in rows}
    lines = []
    for row in rows:
        floor = by_name.get(f"{row.name}_floor")
        lines.append(
            (
                row.name,
                f"{row.us_per_hit / 1000:.3f}",
                f"{row.spread / 1000:.3f}",
                "" if floor is None else f"{row.us_per_hit / floor.us_per_hit:.2f}",
                str(row.hits),
                str(row.expected_hits),
                "noisy" if row.noisy else "",
            )
        )
    return table(("act", "ms", "spread", "times its floor", "done", "expected", ""), lines)
