"""What a bench makes of its measurements; the expected figures are worked out by hand."""

from __future__ import annotations

import argparse
import math
import random
import re

import pytest

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import VirtAddr
from tests.bench import HIT_ROWS, arguments, bulk, run
from tests.bench.machine import FunctionCode
from tests.bench.places import Call, far_enough
from tests.bench.rows import Row, cost_of_a_place, make_row, show, show_acts, slope

ROWS = HIT_ROWS + bulk.ROWS


def test_slope_of_points_on_a_line() -> None:
    assert slope([(0, 5.0), (8, 9.0), (32, 21.0)]) == pytest.approx(0.5)


def test_slope_has_the_least_squares() -> None:
    # x - mean: -1, 0, 1; y - mean: -5/3, 1/3, 4/3; sum of products 3, of squares 2.
    assert slope([(0, 1.0), (1, 3.0), (2, 4.0)]) == pytest.approx(1.5)


def test_a_row_of_one_number_of_places_is_the_median() -> None:
    row = make_row("row", [(1, 3.0), (1, 9.0), (1, 4.0)], hits=7, expected_hits=7)
    assert (row.us_per_hit, row.spread) == (4.0, 6.0)


def test_one_call_that_took_long_changes_no_slope() -> None:
    points = [(0, 5.0), (0, 5.0), (0, 50.0), (8, 9.0), (8, 9.0), (8, 9.0)]
    assert cost_of_a_place(points) == pytest.approx(0.5)


def test_the_spread_is_that_of_the_slope_and_shrinks_with_more_points() -> None:
    """Normal noise of 0.2 us on a call: of the slope, times the square root of 2 * pi/2 / n, by 8; 95 % is +/- 1.96."""
    chance = random.Random(1)

    def spread(count: int) -> float:
        points = [(number, chance.gauss(10 + number, 0.2)) for number in (0, 8) for _ in range(count)]
        return make_row("row", points, 1, 1).spread

    for count in (50, 400):
        assert spread(count) == pytest.approx(2 * 1.96 * 0.2 * math.sqrt(math.pi / count) / 8, rel=0.5)


def test_what_is_the_same_every_time_has_no_spread() -> None:
    row = make_row("row", [(0, 5.0), (8, 9.0), (0, 5.0), (8, 9.0)], 1, 1)
    assert (row.us_per_hit, row.spread) == (0.5, 0.0)


@pytest.mark.parametrize(("spread", "noisy"), [(0.9, False), (1.0, False), (1.1, True)])
def test_row_is_noisy_from_a_third_of_its_value_on(spread: float, noisy: bool) -> None:
    assert Row("row", 3.0, spread, 1, 1).noisy is noisy


def test_row_that_is_not_positive_is_noisy() -> None:
    assert Row("row", -1.0, 0.0, 1, 1).noisy


@pytest.mark.parametrize(("hits", "exact"), [(99, False), (100, True), (102, True), (103, False)])
def test_row_allows_only_as_many_hits_again_as_it_says(hits: int, exact: bool) -> None:
    assert Row("row", 1.0, 0.0, hits, 100, again=2).exact is exact


def test_entry_of_the_file() -> None:
    assert Row("row", 3.0, 2.0, 8, 8).entry() == {
        "name": "row",
        "us_per_hit": 3.0,
        "spread": 2.0,
        "hits": 8,
        "expected_hits": 8,
        "noisy": True,
    }


def test_entry_of_a_row_that_rejects_says_how_often_its_filters_were_asked() -> None:
    row = make_row("row", [(1, 3.0)], 0, 0, evaluated=(320, 320))
    assert row.exact
    assert (row.entry()["evaluated"], row.entry()["calls"]) == (320, 320)
    assert not make_row("row", [(1, 3.0)], 0, 0, evaluated=(319, 320)).exact


def test_table_compares_with_the_first_row() -> None:
    lines = show([Row("dear", 2000.0, 1.0, 1, 1), Row("cheap", 0.02, 0.01, 2, 2)]).splitlines()
    assert lines[1].split() == ["dear", "2000.000", "1.000", "1", "1", "1"]
    assert lines[2].split() == ["cheap", "0.020", "0.010", "100,000", "2", "2", "noisy"]


def test_places_far_enough_for_jumps() -> None:
    # The jump at 0 hides 1 and 4; the next that it does not is 5, whose own hides 9.
    assert far_enough([VirtAddr(addr) for addr in (0, 1, 4, 5, 9, 10, 17)]) == (0, 5, 10, 17)


def test_command_of_a_call() -> None:
    assert Call(293, ("0", "b:")).times(20) == "workload syscall 293 20 0 b:"


def _code(flow: dict[int, tuple[int, ...]], nop: int | None = None) -> FunctionCode:
    entries = {VirtAddr(at): tuple(map(VirtAddr, then)) for at, then in flow.items()}
    return FunctionCode(entries, None if nop is None else VirtAddr(nop))


def test_only_what_can_come_again_is_in_a_loop() -> None:
    # 2 tries; 5, behind the return, tries again, and goes back to 2. 6 is behind a jump backwards that ends at 4.
    code = _code({1: (2,), 2: (3,), 3: (4, 5), 4: (), 5: (6, 2), 6: (4,)})
    assert [at for at in code.insns if code.in_loop(at)] == [2, 3, 5]


def test_a_call_leads_behind_itself_and_elsewhere() -> None:
    assert not _code({1: (2, 900), 2: ()}).in_loop(VirtAddr(1))


@pytest.mark.parametrize(("nop", "behind"), [(1, 4), (4, 9), (9, None), (2, None), (None, None)])
def test_what_is_behind_the_nop(nop: int | None, behind: int | None) -> None:
    assert _code({1: (4,), 4: (9,), 9: ()}, nop).behind_nop == behind


def test_an_act_is_told_with_how_many_times_its_floor_takes() -> None:
    rows = [Row("arm_all", 3_000_000.0, 0.0, 9, 9), Row("arm_all_floor", 2_000_000.0, 0.0, 4, 4)]
    arm, floor = show_acts(rows).splitlines()[1:]
    assert arm.split() == ["arm_all", "3000.000", "0.000", "1.50", "9", "9"]
    assert floor.split() == ["arm_all_floor", "2000.000", "0.000", "4", "4"]


@pytest.mark.parametrize("pattern", ["", "floor", "^optimized", "attach"])
def test_only_chooses_rows_by_a_part_of_their_names(pattern: str) -> None:
    parser = argparse.ArgumentParser()
    arguments(parser)
    only = parser.parse_args(["--only", pattern]).only
    assert [name for name in ROWS if only.search(name)] == [name for name in ROWS if re.search(pattern, name)]


def test_a_name_of_no_row_is_refused_before_a_guest_is_started() -> None:
    parser = argparse.ArgumentParser()
    arguments(parser)
    with pytest.raises(KprobeError, match="no row's name has nothing_such"):
        run(parser.parse_args(["--only", "nothing_such"]))
