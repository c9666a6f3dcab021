"""What the workload answers on how long its calls took; the expected figures are worked out by hand."""

from __future__ import annotations

from kprobe_guest.timed_calls import Took, ticks_of, us_of_a_tick


def test_ticks_in_an_answer() -> None:
    assert ticks_of("workload: 50 calls done, last result -2 12345 3100 3000") == (12345, 3100, 3000)
    assert ticks_of("workload: 0 calls done, last result 0 12345") == (12345,)


def test_a_call_takes_what_it_takes_when_nothing_comes_between() -> None:
    assert Took(1.0, 0, (9000, 3000, 3100, 3200, 50000)).ticks_of_a_call == 150


def test_a_tick_is_what_passed_between_two_looks_by_both_clocks() -> None:
    begins = iter((7, 1_000, 51_000))
    us = us_of_a_tick(lambda calls: Took(0.0, next(begins), ()), 0.05)
    assert 1.0 <= us < 2.0, "50,000 ticks in 50 ms and what sleep() took longer"
