"""What is peculiar to KVM, on the toy machine: too few breakpoints, FRED, and no trap flag that stays."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.guest.fault_entries import fault_entries
from gdb_kprobe.model import CpuId, Rung
from gdb_kprobe.session.attach import check_event_delivery
from gdb_kprobe.system.idt import decode_gate
from tests.support.toy import Toy


@pytest.fixture
def wired() -> bool:
    return True


@pytest.mark.parametrize(("rung", "fits"), [(Rung.SINGLE_STEP, 1), (Rung.BOOSTED, 3)])
def test_what_the_users_breakpoints_leave_no_room_for_is_not_armed_and_told(toy: Toy, rung: Rung, fits: int) -> None:
    toy.add("f_push", rung=rung)
    for taken in range(5):
        toy.machine.users_breakpoints = set(range(0x1000, 0x1000 + taken))
        toy.session.disarm_all()
        problems = toy.session.arm_all()
        if taken <= fits:
            assert (problems, toy.call("f_push")) == ((), 13)
        else:
            assert len(problems) == 1
            assert f"breakpoints, and you have {taken}" in problems[0]
            assert toy.changed_text() == {}
            break


def test_fred_is_refused(toy: Toy) -> None:
    check_event_delivery(toy.session.machine)
    toy.machine.registers[2]["cr4"] |= 1 << 32
    with pytest.raises(GuestStateError, match="the guest uses FRED"):
        check_event_delivery(toy.session.machine)


def test_the_faults_that_are_watched_are_the_likely_ones_first() -> None:
    gates = {}
    for vector in (0, 3, 6, 12, 13, 14):
        descriptor = bytes((vector, 0, 16, 0, 0, 0x8E, 0, 0, 0, 0, 0, 0)) + bytes(4)
        gate = decode_gate(vector, descriptor)
        gates[gate.handler] = gate
    assert fault_entries(gates) == {14: 24, 13: 24, 12: 24, 0: 16}


def test_a_fault_in_a_step_is_handled_where_the_instruction_is_and_leaves_no_trap_flag(toy: Toy) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    probe = toy.add("f_load", rung=Rung.SINGLE_STEP)
    for count in range(1, 4):
        assert toy.call("f_load", rdi=0x10) == (1 << 64) - 14
        assert probe.hits == count
    assert toy.machine.traps == 0


def test_of_two_that_come_to_the_gate_at_once_the_other_one_comes_again(toy: Toy) -> None:
    """KVM's breakpoint stops each arrival once, and gdb is told of one vCPU alone."""
    probe = toy.add("f_push", rung=Rung.BOOSTED)
    for cpu in (1, 2):
        toy.put_at_trap("f_push", cpu)
    assert not toy.session.on_breakpoint(CpuId(1))
    assert toy.machine.registers[2]["rip"] == toy.addr("f_push")
    assert probe.hits == 1
    assert [toy.resume(cpu) for cpu in (1, 2)] == [13, 13]
    assert (probe.hits, toy.count("f_push")) == (2, 2)


def test_the_same_at_the_end_of_a_step_of_the_users(toy: Toy) -> None:
    probe = toy.add("f_push", rung=Rung.BOOSTED)
    toy.put_at_trap("f_push", 2)
    assert not toy.session.on_place(CpuId(1), toy.addr("f_nop"))
    assert toy.machine.registers[2]["rip"] == toy.addr("f_push")
    assert toy.resume(2) == 13
    assert probe.hits == 1
