"""What the demo makes of what it has measured and counted; the expected figures are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.launcher.demo import Cost, _Demo
from gdb_kprobe.model import Rung


def test_a_hit_costs_the_difference_of_the_medians() -> None:
    cost = Cost.of([7.0, 7.1, 7.4], [9.8, 9.9, 10.2])
    assert cost.us == pytest.approx(2.8)
    assert not cost.is_bound
    assert str(cost) == "2.80 us"


def test_what_runs_alike_differ_by_bounds_the_cost() -> None:
    assert Cost.of([7.0, 7.25, 7.5], [7.2, 7.3, 7.4]) == Cost(0.5, is_bound=True)
    assert str(Cost(0.5, is_bound=True)) == "less than 0.50 us"
    assert Cost.of([7.0, 7.25, 7.5], [6.0, 6.1, 6.2]).us == 0.5, "a probe makes no call faster"


class _CountedGdb:
    """A gdb whose only probe has counted."""

    def __init__(self, hits: int, missed: int, rung: str) -> None:
        self._probe = {"name": "single_step", "hits": str(hits), "missed": str(missed), "rung": rung, "addr": "0x1000"}

    def command(self, command: str) -> dict[str, Any]:
        assert command == "-kprobe-list"
        return {"probes": [self._probe]}


def _failures(hits: int, missed: int, rung: str) -> list[str]:
    gdb: Any = _CountedGdb(hits, missed, rung)
    guest: Any = None
    demo = _Demo(gdb, guest, 23)
    demo._expect(Rung.SINGLE_STEP, 23)
    return demo.failures


def test_each_call_is_one_hit_on_the_rung_that_is_shown() -> None:
    assert _failures(23, 0, "single-step") == []


@pytest.mark.parametrize(
    ("hits", "missed", "rung"), [(22, 0, "single-step"), (23, 1, "single-step"), (23, 0, "boosted")]
)
def test_other_counts_and_rungs_fail_the_demo(hits: int, missed: int, rung: str) -> None:
    assert _failures(hits, missed, rung) == [
        f"single-step: not 23 hits of 23 calls, but {hits} and {missed} missed, on the rung {rung}"
    ]
