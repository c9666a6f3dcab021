"""Jumps of ours that kprobes of the guest's own have saved, or may have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, KprobeError, NeedsTypesError, RefusedError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.linux.guest_kprobes import GuestKprobe, GuestKprobes
from gdb_kprobe.model import PhysAddr, Rung, VirtAddr
from gdb_kprobe.region.region import adopt as go_on
from gdb_kprobe.session.probes import Hit
from gdb_kprobe.session.recovery.restore import restore
from gdb_kprobe.session.session import Session
from gdb_kprobe.session.sites.plans import Policy
from gdb_kprobe.session.sites.probe_store import adopt
from tests.support.toy import Toy, ToyMachine, ToyWith

RUNGS = (Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP)
REGION = PhysAddr(0x40_0000)
UNREAD = GuestKprobes(unread=NeedsTypesError("a kprobe of the guest's own"))


@pytest.fixture
def jumping(machine: ToyMachine, toy_with: ToyWith) -> Toy:
    """A session with a jump, ``jump``, and an int3, ``trap``."""
    toy = toy_with(machine, RUNGS)
    toy.session.unlisten(toy.hits.append)
    toy.add("p:jump f_nop")
    toy.add("p:trap f_push")
    assert {site.plan.rung for site in toy.session.table.all()} == {Rung.OPTIMIZED, Rung.BOOSTED}
    return toy


def own(toy: Toy, monkeypatch: pytest.MonkeyPatch, found: GuestKprobes) -> None:
    """Have the guest have these kprobes of its own."""
    monkeypatch.setattr(toy.guest, "own_kprobes", lambda: found, raising=False)


def saver(toy: Toy) -> GuestKprobes:
    """The guest's kprobe that has saved the jump."""
    [site] = [site for site in toy.session.table.all() if site.is_jump]
    return GuestKprobes([GuestKprobe(site.addr, b"\xe9", leads_to=site.plan.slot.code)])


def test_a_detach_is_done_where_the_guests_kprobes_cannot_be_read(
    jumping: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is disabled may have saved the jump, and would write a byte of it back one day."""
    calls = jumping.call("f_nop"), jumping.call("f_push")
    own(jumping, monkeypatch, UNREAD)
    done = jumping.session.detach()
    assert (done.restored, done.unmapped, done.still_armed) == (1, False, ())
    [problem] = done.problems
    assert "f_nop+0x0: a kprobe of the guest's own may have saved our jump" in problem
    assert "kprobe attach --vmlinux FILE" in problem
    assert sorted(jumping.changed_text()) == jumping.bytes_of("f_nop")
    assert (jumping.call("f_nop"), jumping.call("f_push")) == calls


def test_a_stop_is_settled_where_the_guests_kprobes_cannot_be_read(
    jumping: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(jumping, monkeypatch, UNREAD)
    for _ in range(2):
        jumping.session.settle()
        jumping.session.disarm_all()
        assert sorted(jumping.changed_text()) == jumping.bytes_of("f_nop")
        assert jumping.session.arm_all() == ()
    assert len(jumping.session.notes) == 1
    jumping.call("f_nop")
    assert {probe.name: probe.hits for probe in jumping.session.probes} == {"jump": 1, "trap": 0}
    with pytest.raises(GuestStateError, match="a kprobe of the guest's own cannot be read"):
        jumping.add("p:more f_lea")
    own(jumping, monkeypatch, GuestKprobes())
    done = jumping.session.detach()
    assert (done.problems, done.unmapped) == ((), True)
    assert jumping.changed_text() == {}


def test_what_a_killed_session_left_stays_where_the_guests_kprobes_cannot_be_read(
    jumping: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(jumping, monkeypatch, UNREAD)
    found = restore(jumping.machine, jumping.machine, jumping.guest, REGION)
    assert [record.rung for record in found.saved] == [Rung.OPTIMIZED]
    assert sorted(jumping.changed_text()) == jumping.bytes_of("f_nop")
    assert any("f_nop+0x0: a kprobe of the guest's own may have saved our jump" in text for text in found.messages)
    own(jumping, monkeypatch, GuestKprobes())
    assert restore(jumping.machine, jumping.machine, jumping.guest, REGION).saved == ()
    assert jumping.changed_text() == {}


def test_a_detach_is_done_whatever_else_of_the_guest_cannot_be_read(
    jumping: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KprobeError("the list of modules has no end")

    monkeypatch.setattr(jumping.guest, "refresh", broken)
    monkeypatch.setattr(jumping.guest, "redirects", broken)
    done = jumping.session.detach()
    assert (done.restored, done.still_armed) == (2, ())
    assert all("the list of modules has no end" in problem for problem in done.problems)
    assert jumping.changed_text() == {}


def test_a_detach_is_done_where_stacks_cannot_be_read(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise GuestStateError("the list of tasks has no end")

    own(jumping, monkeypatch, saver(jumping))
    monkeypatch.setattr(jumping.guest, "stack_words_into", broken)
    done = jumping.session.detach()
    assert (done.restored, done.unmapped) == (1, False)
    [problem] = done.problems
    assert "has saved our jump" in problem
    assert VirtAddr(jumping.addr("f_nop")) in jumping.changed_text()


def test_a_saved_jump_goes_when_its_kprobe_is_gone_and_no_vcpu_is_on_its_way_to_it(
    jumping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word behind the int3 that a sleeping task has on its stack is a remnant: kprobes are handled without sleep."""
    [site] = [site for site in jumping.session.table.all() if site.is_jump]
    behind = site.addr + 1
    on_their_way: set[int] = {behind}

    def words(target: Any, *_: object, on_vcpus: bool = False) -> list[int]:
        return [word for word in (on_their_way if on_vcpus else {behind}) if word in target]

    monkeypatch.setattr(jumping.guest, "stack_words_into", words)
    own(jumping, monkeypatch, saver(jumping))
    jumping.session.settle()
    assert site.saved
    own(jumping, monkeypatch, GuestKprobes())
    jumping.session.settle()
    assert site.saved, "a vCPU has taken the int3 before"
    on_their_way.clear()
    jumping.session.settle()
    assert not site.saved


# -- probes at a jump that is saved ------------------------------------------------------------------------------------


def again(toy: Toy) -> Toy:
    """A session after the one of *toy* was killed: what it has left is restored, its saved jumps are kept."""
    found = restore(toy.machine, toy.machine, toy.guest, REGION)
    assert found.kept is not None
    region = go_on(toy.machine, toy.machine, toy.guest, found.kept)
    region.keep_counters([definition.counter for definition in found.definitions])
    session = Session(toy.session.machine, toy.guest, region, toy.machine, Policy(RUNGS))
    for record in found.saved:
        session.saved.keep(record)
    later = replace(toy, region=region, session=session)
    later.left = [
        adopt(definition, parse_definition(definition.text), region.counters.at(definition.counter))
        for definition in found.definitions
    ]
    return later


def hits(toy: Toy) -> dict[str, int]:
    return {probe.name: probe.hits for probe in toy.session.probes}


def test_a_probe_whose_jump_is_saved_is_adopted_with_its_counts(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    jumping.add("p:never f_nop if di == 99")
    jumping.call("f_nop")
    own(jumping, monkeypatch, saver(jumping))
    text = jumping.changed_text()
    later = again(jumping)
    later.call("f_nop")
    assert later.session.add_many(later.left) == []
    assert {name: at for name, at in later.changed_text().items() if name in text} == text
    later.call("f_nop")
    later.call("f_nop", rdi=99)
    later.call("f_push")
    assert hits(later) == {"jump": 3, "trap": 1, "never": 1}
    own(later, monkeypatch, GuestKprobes())
    later.session.settle()
    later.call("f_nop")
    assert hits(later)["jump"] == 4
    done = later.session.detach()
    assert (done.problems, later.changed_text()) == ((), {})


def test_one_that_was_disabled_stays_so_and_can_be_enabled(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    own(jumping, monkeypatch, saver(jumping))
    jumping.session.settle()
    jumping.session.set_enabled(next(iter(jumping.session.probes)), False)
    later = again(jumping)
    assert later.session.add_many(later.left) == []
    later.call("f_nop")
    assert hits(later)["jump"] == 0
    later.session.set_enabled(next(iter(later.session.probes)), True)
    later.call("f_nop")
    assert hits(later)["jump"] == 1


def test_a_saved_jump_takes_more_probes_as_long_as_there_is_room(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    own(jumping, monkeypatch, saver(jumping))
    jumping.session.settle()
    [site] = [site for site in jumping.session.table.all() if site.is_jump]
    patch, names = site.plan.patch, ["jump", "trap"]
    for number in itertools.count():
        try:
            _, plan = jumping.session.plan(parse_definition("p:more f_nop"))
        except RefusedError:
            break
        names.append(jumping.add(f"p:more{number} f_nop").name)
        assert plan.patch == site.plan.patch == patch
    assert 2 < len(names) < 20
    with pytest.raises(RefusedError, match=r"has saved our jump.*; there is no room for another probe where it leads"):
        jumping.add("p:one_more f_nop")
    jumping.call("f_nop")
    assert hits(jumping) == {name: int(name != "trap") for name in names}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pre": lambda hit: None}, "more needs the host, which the jump cannot ask"),
        ({"post": lambda hit: None}, "more needs the host, which the jump cannot ask"),
        ({"rung": Rung.BOOSTED}, "so more cannot be boosted"),
    ],
)
def test_what_a_saved_jump_cannot_do_is_refused(
    jumping: Toy, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    own(jumping, monkeypatch, saver(jumping))
    jumping.session.settle()
    with pytest.raises(RefusedError, match=f"has saved our jump as the original instruction; {why}"):
        jumping.add("p:more f_nop", **options)
    jumping.call("f_nop")
    assert hits(jumping) == {"jump": 1, "trap": 0}


def test_code_that_somebody_is_in_is_not_changed_under_it(jumping: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    own(jumping, monkeypatch, saver(jumping))
    jumping.session.settle()
    [site] = [site for site in jumping.session.table.all() if site.is_jump]
    jumping.put("f_nop")
    jumping.machine.registers[1]["rip"] = site.plan.slot.code
    with pytest.raises(RefusedError, match="a vCPU or a task is where it leads"):
        jumping.add("p:more f_nop")


# -- a guest whose hits only the stub can stop -------------------------------------------------------------------------


def test_a_jump_is_an_int3_while_it_is_listened_to_and_comes_back(jumping: Toy) -> None:
    def resume() -> Rung:
        jumping.session.disarm_all()
        assert jumping.session.arm_all() == ()
        return Rung(jumping.session.table.need(probe).plan.rung)

    probe = jumping.session.probes.get("jump")
    assert resume() is Rung.OPTIMIZED
    seen: list[str] = []

    def listener(hit: Hit) -> None:
        seen.append(hit.probe.name)

    jumping.session.listen(listener, [probe])
    assert resume() is Rung.BOOSTED
    jumping.call("f_nop")
    jumping.session.unlisten(listener)
    assert resume() is Rung.OPTIMIZED
    jumping.call("f_nop")
    assert (seen, probe.hits) == (["jump"], 2)
