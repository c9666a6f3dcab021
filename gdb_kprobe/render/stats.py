"""Counts and rates of probes, as a table and as data."""

from __future__ import annotations

from gdb_kprobe.render.probes import flags
from gdb_kprobe.render.text import duration, symbolic, table
from gdb_kprobe.session.inspect import ProbeInfo
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import Change, Statistics


def stats(found: Statistics) -> str:
    """The table, with a line of totals at its end. Columns in which no probe has anything are left out."""
    headers = ("hits/s", "hits", "missed", "probe", "symbol", "flags")
    timed = found.seconds is not None
    cells = [
        (*_counts(change, timed), probe.name, _symbol(probe), _flags(probe, change)) for probe, change in found.rows
    ]
    shown = len(cells)
    what = f"total of {found.count}" + (f", {shown} shown" if shown < found.count else "")
    cells.append((*_counts(found.total, timed), what, "", ""))
    kept = [index for index in range(len(headers)) if any(row[index] for row in cells)]
    text = table([headers[index] for index in kept], [[row[index] for index in kept] for row in cells])
    return text if found.seconds is None else f"over {duration(found.seconds)}:\n{text}"


def as_data(found: Statistics) -> dict[str, object]:
    """The same as numbers and text, for programs.

    ``seconds``, ``rate``, ``new_hits`` and ``new_missed`` (those of the interval) are there only with an interval.
    """
    timed = found.seconds is not None
    return {
        **({} if found.seconds is None else {"seconds": round(found.seconds, 6)}),
        "probes": [
            {
                "name": probe.name,
                "place": _symbol(probe),
                "flags": _flags(probe, change),
                **_data(change, timed),
            }
            for probe, change in found.rows
        ],
        "total": {"probes": found.count, **_data(found.total, timed)},
    }


def _data(change: Change, timed: bool) -> dict[str, object]:
    total = {"hits": change.total.hits, "missed": change.total.missed}
    if not timed:
        return {**total}
    return {**total, "new_hits": change.hits, "new_missed": change.missed, "rate": round(change.rate, 1)}


def _counts(change: Change, timed: bool) -> tuple[str, str, str]:
    return f"{change.rate:.1f}" if timed else "", str(change.total.hits), str(change.total.missed)


def _flags(probe: Probe, change: Change) -> str:
    return flags(ProbeInfo(probe, change.total.hits, change.total.missed))


def _symbol(probe: Probe) -> str:
    place = probe.place
    if place is None:
        return ""
    if place.symbol is None:
        return f"{place.addr:#x}"
    return symbolic(place.symbol.name, place.offset, module=place.symbol.module)
