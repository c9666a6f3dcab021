"""Post-handlers: after the instruction, which is stepped where it was relocated to, or in a copy of its own."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import ConnectionLostError, RefusedError
from gdb_kprobe.model import CpuId, Reason, Rung
from gdb_kprobe.session.hit_context import HitContext
from tests.support.kvm_stub import TF
from tests.support.toy import Toy, ToyMachine, ToyWith


def test_it_sees_the_state_after_the_instruction_at_the_original_address(toy: Toy) -> None:
    seen: list[tuple[int, int]] = []
    toy.add("f_call", post=lambda hit: seen.append((hit.regs.ip, hit.read_int(hit.regs.sp))))
    assert toy.call("f_call") == 14
    assert seen == [(toy.addr("leaf"), toy.addr("f_call", 5))]


def test_it_may_change_registers_and_the_way(toy: Toy) -> None:
    def change(hit: HitContext) -> None:
        hit.regs.ax = 1
        hit.regs.ip = hit.read_int(hit.regs.sp)
        hit.regs.sp += 8

    toy.add("f_nop", post=change)
    assert toy.call("f_nop") == 1
    assert toy.count("f_nop") == 0


def test_it_may_stop_behind_the_instruction(toy: Toy) -> None:
    probe = toy.add("f_push", post=lambda hit: True)
    assert toy.call("f_push") is None
    assert toy.machine.registers[1]["rip"] == toy.addr("f_push", 1)
    assert toy.resume() == 13
    assert probe.hits == 1


def test_it_runs_once_when_the_pre_handler_had_stopped(toy: Toy) -> None:
    order: list[str] = []

    def stop(hit: HitContext) -> bool:
        order.append("pre")
        return True

    toy.add("f_push", stop, lambda hit: order.append("post"))
    assert toy.call("f_push") is None
    assert order == ["pre"]
    assert toy.resume() == 13
    assert order == ["pre", "post"]


def test_it_does_not_run_where_the_instruction_is_skipped(toy: Toy) -> None:
    order: list[str] = []
    toy.add("f_nop", lambda hit: hit.skip(), lambda hit: order.append("post"))
    assert toy.call("f_nop") == 13
    assert order == []


def test_it_runs_only_where_the_condition_held_before_the_instruction(toy: Toy) -> None:
    seen: list[int] = []
    probe = toy.add("p:some f_push if di == 8", post=lambda hit: seen.append(hit.regs.di))
    for edi in (6, 8, 9):
        toy.call("f_push", rdi=edi)
    assert (probe.hits, seen) == (1, [8])


def test_the_condition_is_asked_once_also_when_the_hit_is_resumed(toy: Toy) -> None:
    """The pre-handler has made the condition false: the post-handler belongs to the hit all the same."""
    seen: list[int] = []

    def change(hit: HitContext) -> bool:
        hit.regs.di = 1
        return True

    toy.add("p:some f_push if di == 8", change, lambda hit: seen.append(hit.regs.di))
    toy.add("p:other f_push if di == 1", post=lambda hit: seen.append(-1), enabled=False)
    assert toy.call("f_push", rdi=8) is None
    assert toy.resume() == 8
    assert seen == [1]


def test_one_that_raises_is_disabled_and_the_guest_goes_on(toy: Toy) -> None:
    def broken(hit: HitContext) -> None:
        hit.regs.ax = 1000
        hit.regs.ip = 0
        raise ValueError

    probe = toy.add("f_push", post=broken)
    assert toy.call("f_push") == 13
    assert (probe.enabled, probe.missed) == (False, 1)
    assert (toy.changed_text(), toy.machine.breakpoints) == ({}, set())


def test_it_is_refused_where_only_boosting_is_wanted(toy: Toy) -> None:
    with pytest.raises(RefusedError) as caught:
        toy.add("f_pushf", post=lambda hit: None, rung=Rung.BOOSTED)
    assert caught.value.refusal.reason is Reason.NEEDS_SINGLE_STEP
    toy.assert_idle()


def test_a_relocated_step_that_the_connection_was_lost_in_is_the_guests_to_end(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    post: list[int] = []
    probe = toy.add("f_push", post=lambda hit: post.append(hit.hit))
    step = type(toy.session.machine).step

    def lost(self: object, cpu: CpuId) -> None:
        step(self, cpu)  # type: ignore[arg-type]  # of the same class
        toy.machine.registers[cpu]["eflags"] |= TF
        raise ConnectionLostError("lost")

    with monkeypatch.context() as patched:
        patched.setattr(type(toy.session.machine), "step", lost)
        with pytest.raises(ConnectionLostError):
            toy.call("f_push")
    toy.session._dispatcher.complete()
    steps_by_trap_flag = toy.session.machine.quirks.steps_by_trap_flag
    assert bool(toy.machine.registers[1]["eflags"] & TF) is not steps_by_trap_flag, "it is the stub's own, else"
    toy.machine.registers[1]["eflags"] &= ~TF
    assert toy.resume() == 13
    assert (probe.hits, post) == (1, [])


def test_it_is_refused_where_nothing_may_be_stepped(machine: ToyMachine, toy_with: ToyWith) -> None:
    toy = toy_with(machine, (Rung.BOOSTED,))
    with pytest.raises(RefusedError) as caught:
        toy.add("f_push", post=lambda hit: None)
    assert caught.value.refusal.reason is Reason.NEEDS_SINGLE_STEP


def states_behind(toy: Toy, place: str, edi: int) -> list[tuple[int, int, int]]:
    """What RIP, RSP and RAX are behind each execution of *place* in a run without probes."""
    function, _, offset = place.partition("+")
    toy.put(function, rdi=edi)
    values, found = toy.machine.registers[1], []
    while values["rip"] != toy.addr("done"):
        was_there = values["rip"] == toy.addr(function, int(offset or "0"))
        toy.machine.execute(1)
        if was_there:
            found.append((values["rip"], values["rsp"], values["rax"]))
    return found


@pytest.mark.parametrize("rung", [Rung.BOOSTED, Rung.SINGLE_STEP])
@pytest.mark.parametrize("place", ["f_jcc+2", "f_jmp", "f_ret", "f_call", "f_call_register+7", "f_lea", "f_loop+6"])
@pytest.mark.parametrize("edi", [1, 6])
def test_it_sees_the_same_on_each_rung(toy: Toy, rung: Rung, place: str, edi: int) -> None:
    """Where the instruction has led is what the processor itself says of an unprobed run."""
    seen: list[tuple[int, int, int]] = []
    function = place.partition("+")[0]
    plain = toy.call(function, rdi=edi)
    wanted = states_behind(toy, place, edi)
    assert wanted
    probe = toy.add(place, post=lambda hit: seen.append((hit.regs.ip, hit.regs.sp, hit.regs.ax)), rung=rung)
    assert toy.session.table.need(probe).plan.rung is rung
    assert toy.call(function, rdi=edi) == plain
    assert seen == wanted
