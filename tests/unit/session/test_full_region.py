"""A region that is full: what frees needs no room, what needs room is refused, and nothing that is there is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import Reason, Refusal, Rung
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.sites.jumps import Jumps
from tests.support.toy import Toy, ToyMachine, ToyWith

RUNGS = (Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP)


@pytest.fixture
def jumping(machine: ToyMachine, toy_with: ToyWith) -> Toy:
    """A session whose probes may be jumps, and whose hits are counted in the guest."""
    toy = toy_with(machine, RUNGS)
    toy.session.unlisten(toy.hits.append)
    return toy


def fill(toy: Toy) -> Callable[[], None]:
    """Take all that is left of the region, nobody being anywhere in it; returns what gives it back."""
    toy.region.slots.release([])
    pages = toy.region.allocate(Kind.TABLE, toy.region.free)
    taken: list[Slot] = list(iter(lambda: toy.region.slots.allocate(1), None))

    def release() -> None:
        toy.region.remove(pages)
        for slot in taken:
            toy.region.slots.discard(slot)

    return release


def resume(toy: Toy) -> tuple[str, ...]:
    toy.session.settle()
    toy.session.disarm_all()
    return toy.session.arm_all()


def rung(toy: Toy, probe: Probe) -> Rung:
    site = toy.session.table.of(probe)
    assert site is not None
    return site.plan.rung


def test_one_of_many_is_deleted_without_room_and_counts_no_more(jumping: Toy) -> None:
    first, second, third = (jumping.add(f"p:{name} f_nop") for name in ("first", "second", "third"))
    jumping.call("f_nop")
    release = fill(jumping)
    free = second.counter
    jumping.session.delete(second)
    assert rung(jumping, first) is Rung.OPTIMIZED
    jumping.call("f_nop")
    assert (first.hits, second.hits, third.hits) == (2, 1, 2)
    site = jumping.session.table.of(first)
    assert site is not None
    assert site.retired == [free], "code that leads to it stays"
    [problem] = resume(jumping)
    assert "is handled as before" in problem
    release()
    assert resume(jumping) == ()
    assert (rung(jumping, first), site.retired) == (Rung.OPTIMIZED, [])
    jumping.call("f_nop")
    assert (first.hits, second.hits, third.hits) == (3, 1, 3)
    assert free is not None
    assert free.read() == (1, 0)
    assert jumping.session.detach().problems == ()
    assert jumping.changed_text() == {}


def test_one_of_many_is_disabled_and_enabled_without_room(jumping: Toy) -> None:
    first, second = jumping.add("p:first f_nop"), jumping.add("p:second f_nop")
    fill(jumping)
    jumping.session.set_enabled(first, False)
    jumping.call("f_nop")
    assert (first.hits, second.hits) == (0, 1)
    jumping.session.set_enabled(first, True)
    jumping.call("f_nop")
    assert (first.hits, second.hits) == (1, 2)
    assert rung(jumping, first) is Rung.OPTIMIZED


def test_all_are_deleted_and_the_guest_is_left_without_room(jumping: Toy) -> None:
    probes = [jumping.add(f"p:n{number} {name}") for number, name in enumerate(("f_nop", "f_nop", "f_push", "f_lea"))]
    fill(jumping)
    for probe in probes:
        jumping.session.delete(probe)
    assert jumping.changed_text() == {}
    assert jumping.session.table.all() == ()
    assert jumping.session.detach().problems == ()


def test_one_more_is_refused_and_takes_no_jump_from_those_that_are_there(jumping: Toy) -> None:
    first = jumping.add("p:first f_nop")
    release = fill(jumping)
    with pytest.raises(RefusedError, match="region is full") as refused:
        jumping.add("p:more f_nop")
    assert refused.value.refusal.reason is Reason.REGION_FULL
    assert [probe.name for probe in jumping.session.probes] == ["first"]
    assert rung(jumping, first) is Rung.OPTIMIZED
    jumping.call("f_nop")
    assert first.hits == 1
    release()
    more = jumping.add("p:more f_nop")
    jumping.call("f_nop")
    assert (first.hits, more.hits) == (2, 1)


def test_a_jump_that_must_go_and_can_be_nothing_else_goes(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has set a breakpoint within its window, say."""
    jumping.add("p:window f_nop")
    [site] = jumping.session.table.all()
    fill(jumping)
    why = Refusal(Reason.BREAKPOINT_INSIDE, site.addr, "at f_nop+0x2")
    monkeypatch.setattr(Jumps, "disturbed", lambda self: iter([(site, why)] if site.is_jump and site.armed else []))
    problems = resume(jumping)
    assert len(problems) == 1
    assert problems[0].startswith("f_nop+0x0 is not probed any more: its jump must go")
    assert "region is full" in problems[0]
    assert jumping.changed_text() == {}
    jumping.call("f_nop")
