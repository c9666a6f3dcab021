"""Traps that are not hits, stops at any moment, steps that do not move, and faults of a stepped instruction."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import CpuId, Rung
from tests.support.toy import Toy

RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)
LAZY = 0xFFFF_FFFF_8038_0000
EFAULT = (1 << 64) - 14


@pytest.fixture
def died(toy: Toy) -> type[Exception]:
    """What happens to a guest whose kernel would have oopsed."""
    kind: type[Exception] = toy.died
    return kind


# -- whose trap is it ---------------------------------------------------------------------------------------------


def test_the_guests_own_breakpoint_goes_to_the_guest(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.call("f_int3")
    assert toy.machine.own_int3 == [(toy.addr("f_int3"), 0x10)]
    assert (probe.hits, toy.count("f_int3")) == (0, 1)


def test_a_breakpoint_of_user_mode_goes_to_the_guest(toy: Toy) -> None:
    toy.add("f_push")
    values = toy.machine.registers[1]
    values.update(rip=0x40_0000, cs=0x33, rsp=0x7FFF_0000)
    toy.machine.execute(1)
    assert values["rip"] == toy.addr("bp_entry")
    assert toy.session.on_breakpoint(CpuId(1)) is False
    toy.session.settle()
    toy.machine.execute(1)
    assert toy.machine.own_int3 == [(0x40_0000, 0x33)]
    assert (values["rip"], values["cs"], values["rsp"]) == (0x40_0001, 0x33, 0x7FFF_0000)


def test_a_trap_of_user_mode_is_foreign_even_at_the_address_of_a_site(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.machine.registers[1]["cs"] = 0x33
    toy.machine.raise_exception(1, "bp_entry", toy.addr("f_push", 1))
    toy.session.on_breakpoint(CpuId(1))
    assert toy.machine.registers[1]["rip"] == toy.addr("bp_entry")
    assert probe.hits == 0


def test_a_vcpu_that_is_not_at_the_entry_is_not_dispatched(toy: Toy) -> None:
    probe = toy.add("f_push")
    before = dict(toy.machine.registers[2])
    assert toy.session.on_breakpoint(CpuId(2)) is False
    assert (toy.machine.registers[2], probe.hits) == (before, 0)


def test_a_stack_that_is_not_mapped_is_an_error_not_a_guess(toy: Toy) -> None:
    toy.add("f_push")
    toy.machine.registers[1].update(rip=toy.addr("bp_entry"), rsp=0x1000)
    with pytest.raises(TargetError, match="stack at 0x1000 is not mapped"):
        toy.session.on_breakpoint(CpuId(1))


# -- stops for the user -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", RUNGS)
def test_settle_handles_the_hit_of_a_vcpu_that_is_parked_at_the_entry(toy: Toy, rung: Rung) -> None:
    probe = toy.add("f_push", rung=rung)
    toy.put_at_trap("f_push", cpu=2)
    toy.session.settle()
    assert toy.machine.registers[2]["rip"] == toy.addr("f_push", 1)
    assert toy.resume(cpu=2) == 13
    assert probe.hits == 1


@pytest.mark.parametrize("place", ["f_push", "f_jcc+2", "f_call", "f_call_register+7", "f_back+6", "f_ret", "f_lea"])
def test_settle_steps_a_vcpu_out_of_a_slot_wherever_it_is_in_it(toy: Toy, place: str) -> None:
    function = place.partition("+")[0]
    expected = toy.call(function)
    probe = toy.add(place)
    slot = toy.session.table.need(probe).plan.slot.range
    for steps in range(4):
        toy.put(function, cpu=2)
        toy.run_until(toy.addr("bp_entry"), cpu=2)
        toy.session.on_breakpoint(CpuId(2))
        for _ in range(steps):
            if toy.machine.registers[2]["rip"] in slot:
                toy.machine.execute(2)
        toy.session.settle()
        assert toy.machine.registers[2]["rip"] not in toy.region.header.range
        assert toy.resume(cpu=2) == expected


def test_settle_leaves_a_vcpu_alone_that_has_nothing_to_do_with_us(toy: Toy) -> None:
    toy.add("f_push")
    toy.put("f_nop", cpu=2)
    before = dict(toy.machine.registers[2])
    toy.session.settle()
    assert toy.machine.registers[2] == before


def test_a_vcpu_that_never_leaves_a_slot_is_an_error(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.put("f_push", rip=toy.session.table.need(probe).plan.slot.code)
    toy.machine.unmoved_steps = 10_000
    with pytest.raises(TargetError, match="does not leave the slot"):
        toy.session.settle()


@pytest.mark.parametrize("rung", RUNGS)
def test_disabling_sends_a_vcpu_back_that_has_taken_the_int3_already(toy: Toy, rung: Rung) -> None:
    probe, other = toy.add("f_push", rung=rung), toy.add("f_nop", rung=rung)
    toy.put_at_trap("f_push", cpu=1)
    toy.put_at_trap("f_nop", cpu=2)
    toy.session.set_enabled(probe, False)
    assert toy.machine.registers[1]["rip"] == toy.addr("f_push")
    assert toy.machine.registers[1]["rsp"] == toy.machine.stack_top(1) - 0x208
    assert toy.machine.registers[2]["rip"] == toy.addr("bp_entry"), "the other site's hit is still to come"
    assert (toy.resume(1), toy.resume(2)) == (13, 13)
    assert (probe.hits, other.hits) == (0, 1)


def test_two_vcpus_in_one_site_are_two_hits(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.put_at_trap("f_push", cpu=1)
    toy.put_at_trap("f_push", cpu=2)
    assert (toy.resume(1), toy.resume(2)) == (13, 13)
    assert [hit.cpu for hit in toy.hits] == [1, 2]
    assert probe.hits == 2


# -- steps that do not move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["f_push", "f_call", "f_loop+6", "f_ret"])
@pytest.mark.parametrize("unmoved", [1, 5, 63])
def test_a_step_that_does_not_move_is_made_again(toy: Toy, place: str, unmoved: int) -> None:
    function = place.partition("+")[0]
    expected = toy.call(function)
    probe = toy.add(place, rung=Rung.SINGLE_STEP)
    toy.machine.unmoved_steps = unmoved
    assert toy.call(function) == expected
    assert probe.hits == (6 if place == "f_loop+6" else 1)


def test_a_step_that_never_moves_leaves_the_instruction_to_the_guest(toy: Toy) -> None:
    post: list[int] = []
    probe = toy.add("f_pushf", post=lambda hit: post.append(hit.hit))
    toy.machine.unmoved_steps = 64
    assert toy.call("f_pushf") == 13
    assert (probe.hits, probe.missed, post) == (1, 0, [1])


def test_a_relocated_step_that_never_moves_leaves_the_rest_to_the_guest(toy: Toy) -> None:
    post: list[int] = []
    probe = toy.add("f_push", post=lambda hit: post.append(hit.hit))
    toy.machine.unmoved_steps = 64
    assert toy.call("f_push") == 13
    assert (probe.hits, probe.missed, post) == (1, 1, [])


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulting(toy: Toy) -> Toy:
    """The toy with ``f_load`` in its exception table."""
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    return toy


def test_an_instruction_of_the_exception_table_is_single_stepped(faulting: Toy) -> None:
    probe = faulting.add("f_load")
    assert faulting.session.table.need(probe).plan.rung is Rung.SINGLE_STEP
    assert sorted(faulting.changed_text()) == faulting.bytes_of("f_load", "fixup")
    faulting.session.delete(probe)
    faulting.assert_idle()


def test_a_fault_is_fixed_up_at_the_original_address_and_is_one_hit(faulting: Toy) -> None:
    post: list[int] = []
    probe = faulting.add("f_load", post=lambda hit: post.append(hit.hit))
    for count in (1, 2, 3):
        assert faulting.call("f_load", rdi=0x10) == EFAULT
        assert (probe.hits, post) == (count, [])
    assert faulting.call("f_load", rdi=faulting.addr("constant")) == 0x1234
    assert (probe.hits, post) == (4, [4])


def test_an_instruction_whose_fixup_is_itself_needs_no_watch(toy: Toy) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("f_load")
    probe = toy.add("f_load")
    assert toy.session.table.need(probe).plan.rung is Rung.SINGLE_STEP
    assert sorted(toy.changed_text()) == toy.bytes_of("f_load")
    assert toy.call("f_load", rdi=toy.addr("constant")) == 0x1234
    assert probe.hits == 1
    toy.session.delete(probe)
    toy.assert_idle()


def test_a_fixup_that_is_watched_takes_a_probe_of_any_rung(faulting: Toy) -> None:
    faulting.add("p:load f_load")
    at_fixup = faulting.add("p:at fixup", rung=Rung.SINGLE_STEP)
    assert faulting.session.table.need(at_fixup).plan.rung is Rung.SINGLE_STEP
    assert faulting.call("f_load", rdi=0x10) == EFAULT
    assert at_fixup.hits == 1


def test_a_step_that_executes_the_jump_back_as_well_is_through(toy: Toy) -> None:
    post: list[int] = []
    probe = toy.add("f_push", rung=Rung.SINGLE_STEP, post=lambda hit: post.append(hit.regs.ip - toy.addr("f_push")))
    toy.machine.overrunning_steps = 1
    toy.call("f_push")
    assert toy.machine.overrunning_steps == 0
    assert (probe.hits, post, toy.count("f_push")) == (1, [1], 1)


def test_a_page_that_is_faulted_in_is_one_hit(faulting: Toy) -> None:
    post: list[int] = []
    probe = faulting.add("f_load", post=lambda hit: post.append(hit.hit))
    faulting.machine.lazy.add(LAZY)
    assert faulting.call("f_load", rdi=LAZY) == 0
    assert faulting.call("f_load", rdi=LAZY) == 0
    assert (probe.hits, post) == (2, [1, 2])


def test_a_probe_of_the_users_own_at_the_fixup_counts_too(faulting: Toy) -> None:
    at_fixup = faulting.add("p:fixup fixup")
    probe = faulting.add("f_load")
    assert faulting.call("f_load", rdi=0x10) == EFAULT
    assert (probe.hits, at_fixup.hits) == (1, 1)
    faulting.session.delete(probe)
    assert sorted(faulting.changed_text()) == faulting.bytes_of("fixup")
    faulting.session.delete(at_fixup)
    faulting.assert_idle()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_fault_without_a_fixup_is_the_guests_and_names_an_address_it_knows(
    toy: Toy, died: type[Exception], rung: Rung
) -> None:
    """Boosted code shows the slot's address in an oops; the kernel would do the same."""
    probe = toy.add("f_store", rung=rung)
    at = toy.addr("f_store") if rung is Rung.SINGLE_STEP else toy.session.table.need(probe).plan.slot.code
    with pytest.raises(died, match=f"page fault at {at:#x}"):
        toy.call("f_store", rdi=0x10)


def test_a_boosted_instruction_that_pages_in_goes_on_in_its_slot(toy: Toy) -> None:
    probe = toy.add("f_store", rung=Rung.BOOSTED)
    toy.machine.lazy.add(LAZY)
    toy.call("f_store", rdi=LAZY)
    assert (probe.hits, toy.count("f_store")) == (1, 1)


def test_without_the_gate_an_int3_of_ours_kills_the_guest(toy: Toy, died: type[Exception]) -> None:
    """The machine is honest: what the tests above rely on."""
    toy.add("f_push")
    toy.machine.breakpoints.clear()
    with pytest.raises(died, match="int3 at"):
        toy.call("f_push")
