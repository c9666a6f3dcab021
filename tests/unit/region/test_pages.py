"""Pages: wherever objects come and go, no two share one, and none changes what it is mapped for."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gdb_kprobe.errors import RegionError
from gdb_kprobe.region.pages import Pages, Zone

FIRST, END = 2, 40


class PageLife(RuleBasedStateMachine):
    """Objects are made and given back, and sessions go on with what another has left. Checked against sets."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(FIRST, END)
        self.made: list[tuple[Zone, int, int]] = []
        self.mapped: dict[int, Zone] = {}

    def _taken(self) -> set[int]:
        return {page for _, start, count in self.made for page in range(start, start + count)}

    @rule(zone=st.sampled_from(Zone), count=st.integers(1, 12))
    def allocate(self, zone: Zone, count: int) -> None:
        start = self.pages.allocate(zone, count)
        free = [page not in self._taken() and self.mapped.get(page, zone) is zone for page in range(FIRST, END)]
        if start is None:
            longest = "".join("x" if is_free else " " for is_free in free)
            # What is free at the far side of the other zone cannot be had: it is mapped, or beyond it.
            border = range(self.pages.data_end, self.pages.code_start)
            assert len(border) < count
            runs = [run for run in longest.split(" ") if run]
            assert all(len(run) < count + len(border) for run in runs)
            return
        own = range(start, start + count)
        assert all(free[page - FIRST] for page in own)
        self.made.append((zone, start, count))
        self.mapped |= dict.fromkeys(own, zone)

    @precondition(lambda self: self.made)
    @rule(pick=st.randoms(use_true_random=False))
    def release(self, pick: random.Random) -> None:
        self.pages.release(*self.made.pop(pick.randrange(len(self.made))))

    @rule()
    def go_on(self) -> None:
        """Another session finds the zones in the header, and the objects in the directory."""
        self.pages = Pages(FIRST, END, self.pages.data_end, self.pages.code_start)
        for zone, start, count in self.made:
            assert self.pages.claim(start, count) is zone

    @invariant()
    def all_is_accounted_for(self) -> None:
        assert self.pages.free == END - FIRST - len(self._taken())
        assert all(page < self.pages.data_end for page, zone in self.mapped.items() if zone is Zone.DATA)
        assert all(page >= self.pages.code_start for page, zone in self.mapped.items() if zone is Zone.CODE)


TestPageLife = PageLife.TestCase
TestPageLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_all_of_it_can_be_data_or_code() -> None:
    for zone in Zone:
        pages = Pages(FIRST, END)
        assert pages.allocate(zone, END - FIRST) == FIRST
        assert (pages.free, pages.allocate(zone, 1)) == (0, None)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 2), (5, 1), (3, 3), (10, 1), (38, 5)])
def test_a_page_that_is_taken_or_unmapped_is_not_claimed(start: int, count: int) -> None:
    pages = Pages(FIRST, END, 8, 35)
    pages.claim(5, 1)
    with pytest.raises(RegionError, match="twice, or outside of what is mapped"):
        pages.claim(start, count)
