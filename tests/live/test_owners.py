"""The guest's own kprobes and tracers come and go where probes of ours do, by chance, and all count what they should.

The oracle is a second guest, which takes the same steps of the guest's own and never meets us. The chance is the same
each time; ``./install.sh torture owners`` has as much of it as is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kprobe_guest import GuestSpec
from tests.torture.owners import Arena
from tests.torture.owners.steps import (
    BPF,
    EVENTS,
    HOW,
    MOST_CALLS,
    PROBES,
    STRATEGIES,
    TRACERS,
    Shadow,
    Step,
    parse,
)

pytestmark = pytest.mark.live

SEQUENCES, STEPS = 5, 12
PLACES = 6
SETTINGS = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

event = st.sampled_from(EVENTS)
ours = st.sampled_from(PROBES)
place = st.integers(0, PLACES - 1)


class Owners(RuleBasedStateMachine):
    """Two owners, at a function of the guests of :attr:`arena`."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.shadow = Shadow()
        self.is_well = False

    def take(self, verb: str, *words: object) -> None:
        step = Step(verb, tuple(str(word) for word in words if word != ""))
        self.is_well = False
        wrong = self.arena.go(lambda match: match.take(step))
        assert not wrong, f"at '{step}': {wrong}"
        self.shadow.follow(step)
        self.is_well = True

    @initialize(data=st.data())
    def choose(self, data: Any) -> None:
        self.take("on", data.draw(st.sampled_from(sorted(self.arena.ground.field.functions))))

    @rule(times=st.integers(1, MOST_CALLS))
    def call(self, times: int) -> None:
        self.take("call", times)

    @rule(name=event, kind=st.sampled_from("pprf"), place=place)
    def define(self, name: str, kind: str, place: int) -> None:
        if kind == "f" and not self.arena.ground.field.has_fprobe:
            kind = "p"
        if name not in self.shadow.events:
            self.take("guest.define", name, kind, place if kind == "p" else 0)

    @precondition(lambda self: self.shadow.events)
    @rule(data=st.data())
    def switch(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadow.events)))
        self.take(f"guest.{'disable' if self.shadow.events[name] else 'enable'}", name)

    @precondition(lambda self: not all(self.shadow.events.values()))
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        off = [name for name, enabled in self.shadow.events.items() if not enabled]
        self.take("guest.remove", data.draw(st.sampled_from(off)))

    @rule(tracer=st.sampled_from(TRACERS))
    def trace(self, tracer: str) -> None:
        self.take("guest.tracer", tracer)

    @precondition(lambda self: self.arena.ground.field.has_bpf)
    @rule(where=st.sampled_from(BPF))
    def attach_bpf(self, where: str) -> None:
        if self.shadow.bpf:
            self.take("guest.unbpf")
        else:
            self.take("guest.bpf", where)

    @precondition(lambda self: self.arena.ground.field.has_live_patch)
    @rule()
    def patch(self) -> None:
        self.take("guest.unpatch" if self.shadow.patched else "guest.patch")

    @precondition(lambda self: any(self.shadow.events.values()))
    @rule()
    def settle(self) -> None:
        self.take("guest.settle")

    @precondition(lambda self: not self.shadow.is_killed)
    @rule(name=ours, place=place, strategy=st.sampled_from(STRATEGIES), how=st.sampled_from(HOW))
    def add(self, name: str, place: int, strategy: str, how: str) -> None:
        if name not in self.shadow.probes:
            self.take("our.add", name, place, strategy, how)

    @precondition(lambda self: self.shadow.probes and not self.shadow.is_killed)
    @rule(data=st.data(), verb=st.sampled_from(("enable", "disable", "delete")))
    def change(self, data: Any, verb: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadow.probes)))
        self.take(f"our.{verb}", name)

    @precondition(lambda self: self.shadow.probes and not self.shadow.is_killed)
    @rule()
    def stop(self) -> None:
        self.take("our.stop")

    @precondition(lambda self: self.shadow.probes and not self.shadow.is_killed)
    @rule(when=st.sampled_from(("running", "stopped")), then=st.sampled_from(("adopt", "restore", "attach")))
    def kill(self, when: str, then: str) -> None:
        self.take("our.kill", when)
        self.take("call", 1)
        self.take(f"our.{then}")

    def teardown(self) -> None:
        """Both go, and nothing is left of either."""
        if self.is_well:
            for step in parse("our.delete all; call 1; guest.clear; call 1"):
                self.take(step.verb, *step.words)
            wrong = self.arena.go(lambda match: match.finish())
            assert not wrong, wrong


@pytest.fixture(params=["debian", "newest"])
def arena(request: Any) -> Iterator[Arena]:
    with Arena(GuestSpec(kernel=request.param)) as made:
        yield made


@pytest.mark.timeout(3600)  # a busy machine takes ten times as long
def test_two_owners_of_one_place_count_what_they_should(arena: Arena) -> None:
    machine = type("OwnersOfThisKernel", (Owners,), {"arena": arena})
    run_state_machine_as_test(machine, settings=SETTINGS)
    assert arena.lost == 0
