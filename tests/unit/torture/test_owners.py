"""Sequences of steps of two owners: the same for the same seed, text and back, and made short."""

from __future__ import annotations

import random

import pytest

from tests.torture.owners.shrink import shrink
from tests.torture.owners.steps import Field, Sequence, Step, parse, sequence, written

GROUND = Field({"one": 4, "other": 7}, has_fprobe=True, has_bpf=True, has_live_patch=True)


def sequences(number: int = 300) -> list[Sequence]:
    return [sequence(random.Random(f"1/{seed}"), GROUND) for seed in range(number)]


def test_a_seed_gives_the_same_sequence() -> None:
    assert sequences() == sequences()
    assert len(set(sequences())) == 300


def test_a_sequence_is_text_and_back() -> None:
    for one in sequences():
        assert parse(written(one)) == one
        assert parse(written(one).replace("; ", "\n")) == one


def test_both_owners_come_and_in_the_end_are_gone() -> None:
    verbs: set[str] = set()
    for one in sequences():
        verbs |= {step.verb for step in one}
        assert (one[0].verb, one[-1].verb) == ("on", "call")
        last = {str(step) for step in one[-4:]}
        assert "guest.clear" in last
        assert last & {"our.delete all", "our.detach", "our.restore"}
    assert verbs >= {
        "guest.define", "guest.enable", "guest.disable", "guest.remove", "guest.tracer", "guest.settle",
        "guest.bpf", "guest.unbpf", "guest.patch", "guest.unpatch",
        "our.add", "our.enable", "our.disable", "our.delete", "our.stop", "our.detach", "our.attach", "our.kill",
        "our.adopt", "our.restore", "call",
    }  # fmt: skip


def test_what_a_guest_does_not_have_is_not_asked_of_it() -> None:
    without = [sequence(random.Random(seed), Field({"one": 4}, has_fprobe=False)) for seed in range(300)]
    assert not {step.verb for one in without for step in one} & {"guest.bpf", "guest.patch"}
    assert {step.words[1] for one in without for step in one if step.verb == "guest.define"} == {"p", "r"}
    assert {step.words[1] for one in sequences() for step in one if step.verb == "guest.define"} == {"p", "r", "f"}


@pytest.mark.parametrize("needed", [{3}, {2, 9}, {1, 5, 6, 13}])
def test_a_sequence_that_fails_is_made_short(needed: set[int]) -> None:
    steps = [Step("on", ("one",)), *(Step("call", (str(number),)) for number in range(1, 15))]

    def fails(some: Sequence) -> bool:
        return needed <= {int(step.words[0]) for step in some if step.verb == "call"}

    assert shrink(tuple(steps), fails, most=100) == (steps[0], *(steps[number] for number in sorted(needed)))
    assert fails(shrink(tuple(steps), fails, most=3))
