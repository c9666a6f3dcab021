"""What a refusal says, and that its hint leads to a place where there is none."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.function_text import FunctionText, without_kprobes
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.linux.guest_kprobes import GuestKprobe, GuestKprobes
from gdb_kprobe.model import AddressRange, Boost, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.session.check import examine
from gdb_kprobe.session.sites.planner import Planner
from tests.support.toy import Toy

RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)


def refused(toy: Toy, place: str) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        toy.add(f"p:bad {place}")
    return caught.value.refusal


@pytest.mark.parametrize(
    ("place", "reason", "nearest"),
    [
        ("f_push+2", Reason.NOT_A_BOUNDARY, "f_push+0x1"),
        ("f_jmp+2", Reason.RAISES_UD, "f_jmp+0x0"),  # as near as f_jmp+4: the one in front
        ("f_int3", Reason.FOREIGN_INT3, "f_int3+0x1"),
        ("f_nop+0x20", Reason.PADDING, "f_nop+0xf"),  # its ret
    ],
)
def test_the_hint_names_the_nearest_place_that_can_be_probed(
    toy: Toy, place: str, reason: Reason, nearest: str
) -> None:
    refusal = refused(toy, place)
    assert refusal.reason is reason
    assert refusal.hint == f"the nearest instruction that can be probed is {nearest}"
    toy.add(f"p:good {nearest}")


def test_where_nothing_can_be_probed_another_function_is_the_hint(toy: Toy) -> None:
    assert refused(toy, "bp_entry").hint == "no instruction of bp_entry can be probed: choose another function"


def test_a_place_that_is_no_text_keeps_its_own_hint(toy: Toy) -> None:
    assert "nearest" not in refused(toy, "0xffffffff90000000").hint


def test_the_guests_own_kprobe_is_refused_and_read_through(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its int3 is over the first byte of f_push's second instruction, mov rbp, rsp."""
    at = toy.addr("f_push", 1)
    toy.machine.write_physical(toy.guest.memory.translate(at), b"\xcc")
    monkeypatch.setattr(toy.guest, "own_kprobes", lambda: GuestKprobes([GuestKprobe(at, b"\x48")]), raising=False)
    insns = FunctionText(toy.guest, TextMap(), toy.guest.place_of(at)).whole()
    assert [str(insn) for insn in insns[:3]] == ["push rbp", "mov rbp, rsp", "push rbx"]
    refusal = refused(toy, "f_push+1")
    assert refusal.reason is Reason.GUEST_KPROBE
    assert refusal.detail == "the guest has put one at f_push+0x1"
    assert refusal.hint == "the nearest instruction that can be probed is f_push+0x0"


def test_what_a_jump_of_the_guest_has_overwritten() -> None:
    text = bytes.fromhex("55e910203040c3")
    start = VirtAddr(0x1000)
    jump = GuestKprobe(VirtAddr(0x1001), bytes.fromhex("4889e55390"), 5)
    assert without_kprobes(start, text, GuestKprobes([jump])).hex() == "554889e55390c3"
    nothing = GuestKprobes([GuestKprobe(VirtAddr(0x1001)), GuestKprobe(VirtAddr(0x2000), b"\x90")])
    assert without_kprobes(start, text, nothing) == text
    # One that begins in front of what was read.
    before = GuestKprobes([GuestKprobe(VirtAddr(0xFFF), b"\x90\x91", 2)])
    assert without_kprobes(start, text, before)[:2] == b"\x91\xe9"


def test_what_a_kprobe_of_the_guest_may_jump_over_is_its_own() -> None:
    kprobes = GuestKprobes(
        [
            GuestKprobe(VirtAddr(0x1010), b"\x55", 7),
            GuestKprobe(VirtAddr(0x1000), b"\x55"),
            GuestKprobe(VirtAddr(0x2000)),
        ]
    )

    def found(start: int, end: int) -> list[int]:
        return [kprobe.addr for kprobe in kprobes.within(AddressRange(VirtAddr(start), VirtAddr(end)))]

    assert found(0x1000, 0x1001) == [0x1000]
    assert found(0x1001, 0x1010) == []
    assert found(0x1016, 0x1017) == [0x1010]
    assert found(0x1017, 0x2000) == []
    assert found(0, 0x3000) == [0x1000, 0x1010, 0x2000]
    assert kprobes.at(VirtAddr(0x1010)) is not None
    assert kprobes.at(VirtAddr(0x1011)) is None


def test_the_kernels_boost_rules_step_what_it_does_not_boost(toy: Toy) -> None:
    for place, rung in (("f_call", Rung.SINGLE_STEP), ("f_push", Rung.BOOSTED)):
        found = examine(
            toy.guest, TextMap(), toy.region.slots, parse_definition(f"p {place}").location, RUNGS, Boost.KERNEL
        )
        assert next(trial.rung for trial in found.rungs if trial.refusal is None) is rung


def test_the_hint_names_the_nearest_place_for_a_jump_where_only_jumps_are_wanted(toy: Toy) -> None:
    planner = Planner(toy.guest, TextMap(), toy.region.slots, tuple(Rung))
    place = toy.guest.resolve(parse_definition("p f_call+8").location)
    with pytest.raises(RefusedError) as caught:
        planner.plan(place, strategy=Rung.OPTIMIZED)
    assert caught.value.refusal.hint.startswith("the nearest instruction that can be probed is f_call+0x")
    nearest = caught.value.refusal.hint.rpartition(" ")[2]
    found = planner.plan(toy.guest.resolve(parse_definition(f"p {nearest}").location), strategy=Rung.OPTIMIZED)
    assert found.rung is Rung.OPTIMIZED


def test_an_examination_sees_the_text_without_us_and_keeps_no_slot(toy: Toy) -> None:
    toy.add("f_push")
    used = toy.region.slots.used
    location = parse_definition("p f_push+1").location
    found = examine(toy.guest, toy.session.table.text, toy.region.slots, location, RUNGS, Boost.RELOCATE)
    assert (str(found.insn), found.number, found.family) == ("mov rbp, rsp", 2, "plain")
    assert found.refusal is None
    assert [(trial.rung, trial.refusal is None) for trial in found.rungs] == [
        (Rung.OPTIMIZED, False),
        (Rung.BOOSTED, True),
        (Rung.SINGLE_STEP, True),
    ]
    assert found.rungs[2].code == found.rungs[1].code
    assert found.rungs[2].code.startswith(bytes.fromhex("4889e5 e9"))
    assert toy.region.slots.used == used


def test_an_examination_of_what_faults_names_the_fixup(toy: Toy) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    location = parse_definition("p f_load").location
    found = examine(toy.guest, TextMap(), toy.region.slots, location, RUNGS, Boost.RELOCATE)
    assert found.tables == ("exception table: after a fault it goes on at fixup+0x0",)
    assert [trial.refusal.reason for trial in found.rungs if trial.refusal is not None] == [
        Reason.POLICY,
        Reason.EX_TABLE,
    ]
