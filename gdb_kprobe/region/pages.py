"""Which pages of a region are given out. Pure: nothing is written.

Data grows from the bottom up and code from the top down, until they meet. A page that was mapped for one is never used
for the other: a processor may have the translation that it had.
"""

from __future__ import annotations

from bisect import insort
from enum import Enum, auto

from gdb_kprobe.errors import RegionError


class Zone(Enum):
    """What a page is mapped for."""

    DATA = auto()
    CODE = auto()


class Pages:
    """The pages *first* to *end*, by number. Those up to *data_end* and from *code_start* on are mapped already."""

    def __init__(self, first: int, end: int, data_end: int | None = None, code_start: int | None = None) -> None:
        self.first = first
        self.end = end
        self.data_end = first if data_end is None else data_end
        self.code_start = end if code_start is None else code_start
        self._free: dict[Zone, list[tuple[int, int]]] = {Zone.DATA: [], Zone.CODE: []}
        for zone, start, stop in ((Zone.DATA, first, self.data_end), (Zone.CODE, self.code_start, end)):
            if start < stop:
                self._free[zone].append((start, stop - start))

    @property
    def free(self) -> int:
        """How many are not given out."""
        return self.code_start - self.data_end + sum(count for runs in self._free.values() for _, count in runs)

    def allocate(self, zone: Zone, count: int) -> int | None:
        """The first of *count* pages in a row; ``None``: there are not so many."""
        runs = self._free[zone]
        for at, (start, size) in enumerate(runs):
            if size >= count:
                runs[at : at + 1] = [(start + count, size - count)] if size > count else []
                return start
        return self._grow(zone, count)

    def release(self, zone: Zone, start: int, count: int) -> None:
        """Give *count* pages from *start* on back."""
        runs = self._free[zone]
        insort(runs, (start, count))
        merged: list[tuple[int, int]] = []
        for run in runs:
            if merged and sum(merged[-1]) == run[0]:
                merged[-1] = merged[-1][0], merged[-1][1] + run[1]
            else:
                merged.append(run)
        self._free[zone] = merged

    def claim(self, start: int, count: int) -> Zone:
        """Have *count* pages from *start* on given out, and say what they are mapped for.

        :raises RegionError: they are not free.
        """
        for zone, runs in self._free.items():
            for at, (first, size) in enumerate(runs):
                if first <= start and start + count <= first + size:
                    parts = ((first, start - first), (start + count, first + size - start - count))
                    runs[at : at + 1] = [part for part in parts if part[1]]
                    return zone
        raise RegionError(
            f"the region's directory has pages {start} to {start + count - 1} twice, or outside of what is mapped",
            "the guest has written over it: reset the guest, or restore its text with 'gdb-kprobe restore'",
        )

    def _grow(self, zone: Zone, count: int) -> int | None:
        """Take what lies at the border, free pages there included."""
        runs = self._free[zone]
        if zone is Zone.DATA:
            at_border = runs[-1][1] if runs and sum(runs[-1]) == self.data_end else 0
            start = self.data_end - at_border
            if start + count > self.code_start:
                return None
            self.data_end = start + count
            if at_border:
                runs.pop()
            return start
        at_border = runs[0][1] if runs and runs[0][0] == self.code_start else 0
        start = self.code_start + at_border - count
        if start < self.data_end:
            return None
        self.code_start = start
        if at_border:
            runs.pop(0)
        return start
