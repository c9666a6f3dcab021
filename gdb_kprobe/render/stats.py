"""Counts and rates of probes, as a table and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gdb_kprobe.render.probes import flags
from gdb_kprobe.render.text import duration, symbolic, table
from gdb_kprobe.render.views import ProbeView


@dataclass(frozen=True, slots=True)
class RateView:
    """What a probe has counted in the interval: hits and misses, and hits a second."""

    hits: int
    missed: int
    rate: float


@dataclass(frozen=True, slots=True)
class StatsRow:
    """One probe; *rate* is None where there is no interval."""

    probe: ProbeView
    rate: RateView | None = None


@dataclass(frozen=True, slots=True)
class StatsView:
    """All rows, in any order, and over how many seconds their rates are; *seconds* is None where there is no interval.

    *top* is how many of them are to be shown, the fastest; all are in the total.
    """

    rows: tuple[StatsRow, ...]
    seconds: float | None = None
    top: int | None = None

    @property
    def shown(self) -> tuple[StatsRow, ...]:
        """The rows to show: by rate, then by hits, then by name."""
        return tuple(sorted(self.rows, key=_order)[: self.top])


def _order(row: StatsRow) -> tuple[float, int, str]:
    return (-row.rate.rate if row.rate is not None else 0.0, -row.probe.hits, row.probe.name)


def stats(view: StatsView) -> str:
    """The table, with a line of totals at its end. Columns in which no probe has anything are left out."""
    timed = view.seconds is not None
    headers = ("hits/s", "hits", "missed", "probe", "symbol", "flags")
    cells = [
        (
            "" if row.rate is None else f"{row.rate.rate:.1f}",
            str(row.probe.hits),
            str(row.probe.missed),
            row.probe.name,
            _symbol(row.probe),
            flags(row.probe),
        )
        for row in view.shown
    ]
    shown = len(cells)
    what = f"total of {len(view.rows)}" + (f", {shown} shown" if shown < len(view.rows) else "")
    rate, hits, missed = _totals(view.rows)
    cells.append((f"{rate:.1f}" if timed else "", str(hits), str(missed), what, "", ""))
    kept = [index for index in range(len(headers)) if any(row[index] for row in cells)]
    text = table([headers[index] for index in kept], [[row[index] for index in kept] for row in cells])
    return text if view.seconds is None else f"over {duration(view.seconds)}:\n{text}"


def as_data(view: StatsView) -> dict[str, object]:
    """The same as numbers and text, for programs.

    ``seconds``, ``rate``, ``new_hits`` and ``new_missed`` (those of the interval) are there only with an interval.
    """
    rate, hits, missed = _totals(view.rows)
    total: dict[str, object] = {"probes": len(view.rows), "hits": hits, "missed": missed}
    if view.seconds is None:
        return {"probes": [_row_data(row) for row in view.shown], "total": total}
    total |= {
        "new_hits": sum(row.rate.hits for row in view.rows if row.rate is not None),
        "new_missed": sum(row.rate.missed for row in view.rows if row.rate is not None),
        "rate": round(rate, 1),
    }
    return {
        "seconds": round(view.seconds, 6),
        "probes": [_row_data(row) for row in view.shown],
        "total": total,
    }


def _row_data(row: StatsRow) -> dict[str, object]:
    data: dict[str, object] = {
        "name": row.probe.name,
        "place": _symbol(row.probe),
        "flags": flags(row.probe),
        "hits": row.probe.hits,
        "missed": row.probe.missed,
    }
    if row.rate is not None:
        data |= {"new_hits": row.rate.hits, "new_missed": row.rate.missed, "rate": round(row.rate.rate, 1)}
    return data


def _totals(rows: Sequence[StatsRow]) -> tuple[float, int, int]:
    """Hits a second, hits and misses of all."""
    return (
        sum(row.rate.rate for row in rows if row.rate is not None),
        sum(row.probe.hits for row in rows),
        sum(row.probe.missed for row in rows),
    )


def _symbol(view: ProbeView) -> str:
    place = view.place
    if place is None:
        return ""
    return symbolic(place.symbol, place.offset, module=place.module) if place.symbol else f"{place.addr:#x}"
