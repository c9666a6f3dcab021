"""What a Python handler sees, may change, and cannot break."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import ConnectionLostError, GuestResetError, SessionOverError, UnmappedError
from gdb_kprobe.model import Rung
from gdb_kprobe.session.hit_context import HitContext
from tests.support.toy import Toy

RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)

pytestmark = pytest.mark.parametrize("rung", RUNGS)


def test_the_registers_are_those_at_the_probe_point(toy: Toy, rung: Rung) -> None:
    seen: list[dict[str, int]] = []
    toy.add("p:at f_push+1 a=%di b=%sp", lambda hit: seen.append(dict(hit.regs)), rung=rung)
    toy.call("f_push", r15=0x15, rbx=0xB)
    rsp = toy.machine.stack_top(1) - 0x200 - 16
    expected = {"ip": toy.addr("f_push", 1), "sp": rsp, "di": 6, "si": 7, "r15": 0x15, "bx": 0xB, "cs": 0x10}
    assert {name: seen[0][name] for name in expected} == expected
    assert [(arg.name, value) for arg, value in toy.hits[0].args] == [("a", 6), ("b", rsp)]


def test_a_register_that_is_written_reaches_the_instruction(toy: Toy, rung: Rung) -> None:
    def change(hit: HitContext) -> None:
        hit.regs.di = 100
        hit.regs["rsi"] += 1

    toy.add("f_push", change, rung=rung)
    assert toy.call("f_push") == 108


def test_flags_and_stack_pointer_can_be_written(toy: Toy, rung: Rung) -> None:
    def change(hit: HitContext) -> None:
        hit.regs.flags |= 0x40  # ZF: jz is taken

    toy.add("f_jcc+2", change, rung=rung)
    assert toy.call("f_jcc", rdi=6) == 99

    def pop(hit: HitContext) -> None:
        hit.regs.ip = hit.read_int(hit.regs.sp)
        hit.regs.sp += 8
        hit.regs.ax = 5

    toy.add("f_nop", pop, rung=rung)
    assert toy.call("f_nop") == 5


def test_skip_goes_on_behind_the_instruction(toy: Toy, rung: Rung) -> None:
    toy.add("f_call", lambda hit: hit.skip(), rung=rung)
    assert toy.call("f_call", rax=40) == 41
    assert toy.count("f_call") == 1


def test_memory_can_be_read_and_written(toy: Toy, rung: Rung) -> None:
    def change(hit: HitContext) -> None:
        assert hit.read_int(toy.addr("constant")) == 0x1234
        hit.write(toy.addr("constant"), b"hello\0ab")
        assert hit.read_string(toy.addr("constant")) == "hello"
        with pytest.raises(UnmappedError):
            hit.read(0x10, 1)
        with pytest.raises(UnmappedError):
            hit.write(0x10, b"x")

    probe = toy.add("f_lea", change, rung=rung)
    assert toy.call("f_lea") == int.from_bytes(b"hello\0ab", "little")
    assert probe.last_error == ""


@pytest.mark.parametrize("how", ["stop()", "return True"])
def test_a_stop_shows_the_probe_point_and_is_resumed_without_a_second_hit(toy: Toy, rung: Rung, how: str) -> None:
    probe = toy.add("f_push+1", (lambda hit: hit.stop()) if how == "stop()" else (lambda hit: True), rung=rung)
    assert toy.call("f_push") is None
    toy.session.settle()
    assert toy.machine.registers[1]["rip"] == toy.addr("f_push", 1)
    assert toy.machine.registers[1]["rsp"] == toy.machine.stack_top(1) - 0x200 - 16
    assert toy.resume() == 13
    assert probe.hits == 1
    assert toy.call("f_push") is None
    assert probe.hits == 2


def test_a_probe_that_stops_does_so_after_the_handlers_of_its_site(toy: Toy, rung: Rung) -> None:
    called: list[str] = []
    toy.add("p:stops f_push+1 if di == 99", rung=rung, stop=True)
    toy.add("p:sees f_push+1", lambda hit: called.append(hit.name), rung=rung)
    assert toy.call("f_push") == 13, "the condition did not hold"
    assert called == ["sees"]
    assert toy.call("f_push", rdi=99) is None
    toy.session.settle()
    assert toy.machine.registers[1]["rip"] == toy.addr("f_push", 1)
    assert called == ["sees", "sees"]
    assert toy.resume() == 106
    assert {probe.name: probe.hits for probe in toy.session.probes} == {"stops": 1, "sees": 2}


def test_a_stopped_probe_that_is_left_by_another_way_counts_its_next_hit(toy: Toy, rung: Rung) -> None:
    probe = toy.add("f_push", lambda hit: True, rung=rung)
    assert toy.call("f_push") is None
    toy.session.moved()  # the user's `jump`
    toy.call("f_nop")
    toy.session.settle()
    assert toy.call("f_push") is None
    assert probe.hits == 2


def test_stop_and_skip_together_stop_at_the_new_place(toy: Toy, rung: Rung) -> None:
    def both(hit: HitContext) -> None:
        hit.skip()
        hit.stop()

    probe = toy.add("f_nop", both, rung=rung)
    assert toy.call("f_nop") is None
    assert toy.machine.registers[1]["rip"] == toy.addr("f_nop", 5)
    assert toy.resume() == 13
    assert probe.hits == 1


def test_a_stop_with_changed_registers_goes_on_with_them(toy: Toy, rung: Rung) -> None:
    def change(hit: HitContext) -> bool:
        hit.regs.di = 100
        return True

    probe = toy.add("f_push", change, rung=rung)
    assert toy.call("f_push") is None
    assert toy.resume() == 107
    assert probe.hits == 1


def test_a_handler_that_raises_is_disabled_and_the_guest_goes_on_unchanged(toy: Toy, rung: Rung) -> None:
    def broken(hit: HitContext) -> None:
        hit.regs.di = 1000
        hit.skip()
        raise ValueError("no such thing")

    probe = toy.add("f_push", broken, rung=rung)
    assert toy.call("f_push") == 13
    assert (probe.enabled, probe.hits, probe.missed) == (False, 1, 1)
    assert "ValueError: no such thing" in probe.last_error
    assert (toy.changed_text(), toy.records(), toy.machine.breakpoints) == ({}, [], set())
    assert toy.call("f_push") == 13
    assert probe.hits == 1


def test_a_handler_that_raises_does_not_take_its_neighbours_along(toy: Toy, rung: Rung) -> None:
    broken = toy.add("p:broken f_push", lambda hit: 1 // 0, rung=rung)
    sound = toy.add("p:sound f_push", lambda hit: None, rung=rung)
    for _ in range(3):
        assert toy.call("f_push") == 13
    assert (broken.hits, sound.hits) == (1, 3)
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}


def test_a_handler_may_delete_its_own_probe(toy: Toy, rung: Rung) -> None:
    probe = toy.add("f_push", lambda hit: toy.session.delete(toy.session.probes.get(hit.name)), rung=rung)
    assert toy.call("f_push") == 13
    assert probe.hits == 1
    toy.assert_idle()


def test_a_handler_that_deletes_its_probe_and_raises_leaves_nothing(toy: Toy, rung: Rung) -> None:
    def broken(hit: HitContext) -> None:
        toy.session.delete(toy.session.probes.get(hit.name))
        raise ValueError

    toy.add("f_push", broken, rung=rung)
    assert toy.call("f_push") == 13
    toy.assert_idle()


def test_ctrl_c_in_a_handler_stops_at_the_probe_point(toy: Toy, rung: Rung) -> None:
    calls: list[int] = []

    def interrupted(hit: HitContext) -> None:
        calls.append(hit.hit)
        hit.regs.di = 1000
        raise KeyboardInterrupt

    probe = toy.add("f_push", interrupted, rung=rung)
    assert toy.call("f_push") is None
    assert toy.machine.registers[1]["rip"] == toy.addr("f_push")
    assert toy.resume() == 13
    assert (probe.enabled, probe.hits, calls) == (True, 1, [1])


def test_a_condition_counts_and_calls_only_where_it_holds(toy: Toy, rung: Rung) -> None:
    calls: list[int] = []
    probe = toy.add("p:some f_push if di == 8", lambda hit: calls.append(hit.regs.di), rung=rung)
    for edi in (6, 8, 9, 8):
        assert toy.call("f_push", rdi=edi) == edi + 7
    assert (probe.hits, calls, len(toy.hits)) == (2, [8, 8], 2)


@pytest.mark.parametrize("error", [ConnectionLostError("gone"), GuestResetError("another boot")])
def test_what_ends_the_session_is_no_fault_of_the_handler_that_came_upon_it(
    toy: Toy, rung: Rung, error: SessionOverError
) -> None:
    def read(hit: HitContext) -> None:
        raise error

    probe = toy.add("f_push", read, rung=rung)
    with pytest.raises(type(error)):
        toy.call("f_push")
    assert (toy.session.failed, probe.enabled, probe.last_error) == ([], True, "")


def test_arguments_have_the_names_and_types_of_the_definition(toy: Toy, rung: Rung) -> None:
    seen: list[dict[str, int]] = []

    def look(hit: HitContext) -> None:
        seen.append(dict(hit.args))
        assert (hit.args.small, hit.args["where"]) == (seen[0]["small"], seen[0]["where"])
        hit.regs.di = 5
        assert hit.args.small == 5

    probe = toy.add("p:at f_push+1 small=%di:s8 big=%si:x16 where=%ip", look, rung=rung)
    toy.call("f_push", rdi=0x1_00FF, rsi=0xABCD_1234)
    assert seen == [{"small": -1, "big": 0x1234, "where": toy.addr("f_push", 1)}]
    assert probe.last_error == ""


def test_an_argument_that_is_not_fetched_is_told(toy: Toy, rung: Rung) -> None:
    probe = toy.add("p:at f_push a=%di", lambda hit: hit.args.b, rung=rung)
    toy.call("f_push")
    assert "no argument 'b'; there are a" in probe.last_error


def test_a_read_that_cannot_be_served_is_a_value_to_ask_for(toy: Toy, rung: Rung) -> None:
    seen: list[object] = []

    def read(hit: HitContext) -> None:
        for ask in (hit.read_int, hit.read_string):
            seen.append(ask(0x10, default="(fault)"))
        seen.append(hit.read(0x10, 4, default=None))
        seen.append(hit.read_int(toy.addr("constant"), default=0))
        hit.read(0x10, 4)

    probe = toy.add("f_push", read, rung=rung)
    toy.call("f_push")
    assert seen == ["(fault)", "(fault)", None, 0x1234]
    assert "0x10 is not mapped" in probe.last_error
