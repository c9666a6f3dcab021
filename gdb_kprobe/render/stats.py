"""Counts and rates of probes, as a table and as data."""

from __future__ import annotations

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
    """The rows to show, in order, and over how many seconds their rates are; *seconds* is None where there are none.

    *hits*, *missed* and *rate* are the totals of all *count* probes, also of those that are not shown.
    """

    rows: tuple[StatsRow, ...]
    count: int
    hits: int
    missed: int
    rate: RateView | None = None
    seconds: float | None = None


def stats(view: StatsView) -> str:
    """The table, with a line of totals at its end. Columns in which no probe has anything are left out."""
    headers = ("hits/s", "hits", "missed", "probe", "symbol", "flags")
    cells = [
        (
            _rate(row.rate),
            str(row.probe.hits),
            str(row.probe.missed),
            row.probe.name,
            _symbol(row.probe),
            flags(row.probe),
        )
        for row in view.rows
    ]
    shown = len(cells)
    what = f"total of {view.count}" + (f", {shown} shown" if shown < view.count else "")
    cells.append((_rate(view.rate), str(view.hits), str(view.missed), what, "", ""))
    kept = [index for index in range(len(headers)) if any(row[index] for row in cells)]
    text = table([headers[index] for index in kept], [[row[index] for index in kept] for row in cells])
    return text if view.seconds is None else f"over {duration(view.seconds)}:\n{text}"


def as_data(view: StatsView) -> dict[str, object]:
    """The same as numbers and text, for programs.

    ``seconds``, ``rate``, ``new_hits`` and ``new_missed`` (those of the interval) are there only with an interval.
    """
    return {
        **({} if view.seconds is None else {"seconds": round(view.seconds, 6)}),
        "probes": [_row_data(row) for row in view.rows],
        "total": {"probes": view.count, "hits": view.hits, "missed": view.missed, **_rate_data(view.rate)},
    }


def _row_data(row: StatsRow) -> dict[str, object]:
    return {
        "name": row.probe.name,
        "place": _symbol(row.probe),
        "flags": flags(row.probe),
        "hits": row.probe.hits,
        "missed": row.probe.missed,
        **_rate_data(row.rate),
    }


def _rate_data(rate: RateView | None) -> dict[str, object]:
    if rate is None:
        return {}
    return {"new_hits": rate.hits, "new_missed": rate.missed, "rate": round(rate.rate, 1)}


def _rate(rate: RateView | None) -> str:
    return "" if rate is None else f"{rate.rate:.1f}"


def _symbol(view: ProbeView) -> str:
    place = view.place
    if place is None:
        return ""
    return symbolic(place.symbol, place.offset, module=place.module) if place.symbol else f"{place.addr:#x}"
