"""What all probes have counted at one moment, and how fast they count; also while the guest runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.region.counters import read_counters
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.target.protocols import PhysicalMemory


@dataclass(frozen=True, slots=True)
class Count:
    """What one probe has counted since it was added.

    :ivar hits: how often it was hit.
    :ivar missed: how often the instruction ran without its handlers.
    """

    hits: int
    missed: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What probes had counted at one moment.

    :ivar moment: ``time.monotonic()``, in seconds.
    :ivar counts: of each probe, by its name.
    """

    moment: float
    counts: dict[str, Count]


@dataclass(frozen=True, slots=True)
class Change:
    """What was counted up to the second of two readings (*total*), and between them."""

    total: Count
    hits: int = 0
    missed: int = 0
    rate: float = 0.0
    """Hits a second."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What probes have counted.

    :ivar rows: the probes to show, each with what it has counted, the fastest first.
    :ivar count: how many probes there are, also those that are not shown.
    :ivar total: what all of them have counted together.
    :ivar seconds: over how many seconds the changes and rates are; ``None``: there are only totals.
    """

    rows: tuple[tuple[Probe, Change], ...]
    count: int
    total: Change
    seconds: float | None = None


def read_counts(memory: PhysicalMemory, probes: Sequence[Probe]) -> Reading:
    """Read what *probes* have counted.

    Counters that lie near to each other are read in one piece: nearly at the same moment, however many there are.

    :raises TargetError: the machine runs, and its memory cannot be read meanwhile.
    """
    found = read_counters(memory, [probe.counter for probe in probes if probe.counter is not None])
    moment = time.monotonic()
    counts: dict[str, Count] = {}
    for probe in probes:
        hits, missed = (0, 0) if probe.counter is None else found[probe.counter.addr]
        counts[probe.name] = Count(probe.seen + hits, probe.failures + missed)
    return Reading(moment, counts)


def statistics(probes: Sequence[Probe], before: Reading | None, after: Reading, top: int | None) -> Statistics:
    """What *probes* had counted at *after*, and since *before*, if there is such a reading; the *top* fastest, or all.

    :raises KprobeError: a count went down: it is not the same guest, or the memory was written to.
    """
    found = changes(before, after)
    by_name = {probe.name: probe for probe in probes}
    rows = tuple((by_name[name], found[name]) for name in fastest(found, top))
    seconds = None if before is None else after.moment - before.moment
    return Statistics(rows, len(found), sum_of(found.values()), seconds)


def changes(before: Reading | None, after: Reading) -> dict[str, Change]:
    """How much was counted from *before* to *after*, by probe; a probe that was not there before counted from zero.

    Without *before* there are only totals.

    :raises KprobeError: a count went down: it is not the same guest, or the memory was written to.
    """
    if before is None:
        return {name: Change(count) for name, count in after.counts.items()}
    seconds = after.moment - before.moment
    found: dict[str, Change] = {}
    for name, count in after.counts.items():
        first = before.counts.get(name, Count(0, 0))
        hits, missed = count.hits - first.hits, count.missed - first.missed
        if hits < 0 or missed < 0:
            raise KprobeError(
                f"{name} had {first.hits} hits ({first.missed} missed) and now has {count.hits} ({count.missed})",
                "the guest was reset, or a snapshot was loaded: interrupt the guest, and 'kprobe attach' again",
            )
        found[name] = Change(count, hits, missed, hits / seconds if seconds > 0 else 0.0)
    return found


def sum_of(found: Iterable[Change]) -> Change:
    """What all of them have counted together."""
    every = tuple(found)
    total = Count(sum(change.total.hits for change in every), sum(change.total.missed for change in every))
    hits, missed = sum(change.hits for change in every), sum(change.missed for change in every)
    return Change(total, hits, missed, sum(change.rate for change in every))


def fastest(found: Mapping[str, Change], top: int | None) -> list[str]:
    """The names of the *top* probes, or of all: by rate, then by hits, then by name."""
    order = (name for _, _, name in sorted((-change.rate, -change.total.hits, name) for name, change in found.items()))
    return list(itertools.islice(order, top))
