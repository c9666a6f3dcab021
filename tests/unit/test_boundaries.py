"""What is said of a function whose instructions were all probed."""

from __future__ import annotations

from collections import Counter

from gdb_kprobe.model import PAGE_SIZE, AddressRange, Rung, Symbol, VirtAddr
from gdb_kprobe.x86.decode import Insn, iter_insns
from tests.support.boundaries import Armed, Counts
from tests.support.functions import Function, Kind, Limits, executions
from tests.torture.boundary_check import differences

BASE = VirtAddr(0xFFFFFFFF81000000)
# push rbx; je +1 (to pop); nop; pop rbx; ret
CODE = bytes.fromhex("53 74 01 90 5b c3")
PUSH, JE, NOP, POP, RET = (VirtAddr(BASE + at) for at in (0, 1, 3, 4, 5))


def insns_at(addr: VirtAddr, code: bytes = CODE) -> tuple[Insn, ...]:
    return tuple(iter_insns(code, addr))


def function() -> Function:
    return Function(
        symbol=Symbol("f", BASE, "T"),
        range=AddressRange(BASE, VirtAddr(BASE + len(CODE))),
        insns=insns_at(BASE),
        kind=Kind.SYSCALL,
        part="files",
        entries=5,
    )


ARMED = Armed(
    {PUSH: Rung.BOOSTED, JE: Rung.BOOSTED, POP: Rung.BOOSTED, RET: Rung.BOOSTED},
    {NOP: "jump label site"},
    {},
    frozenset({PUSH, JE, POP, RET}),
)
COUNTED = {PUSH: Counts(5, 0), JE: Counts(5, 0), POP: Counts(5, 0), RET: Counts(5, 0)}
EXECUTED: Counter[int] = Counter({PUSH: 5, JE: 5, NOP: 2, POP: 5, RET: 5})


def test_no_difference() -> None:
    assert list(differences(function(), ARMED, EXECUTED, COUNTED)) == []


def test_a_hit_less_or_more_than_executions_is_told_with_the_instruction() -> None:
    counted = {**COUNTED, JE: Counts(4, 0), RET: Counts(6, 0)}
    assert list(differences(function(), ARMED, EXECUTED, counted)) == [
        f"f+0x1 74 01 je {POP:#x} (boosted): executed 5 times, counted 4, missed 0",
        "f+0x5 c3 ret (boosted): executed 5 times, counted 6, missed 0",
    ]


def test_a_miss_is_told() -> None:
    counted = {**COUNTED, POP: Counts(5, 1)}
    assert list(differences(function(), ARMED, EXECUTED, counted)) == [
        "f+0x4 5b pop rbx (boosted): executed 5 times, counted 5, missed 1"
    ]


def test_an_error_is_told() -> None:
    armed = Armed(ARMED.rungs, {}, {NOP: "RecursionError: too deep"}, ARMED.sites)
    assert list(differences(function(), armed, EXECUTED, COUNTED)) == [
        "f+0x3 90 nop: cannot be probed: RecursionError: too deep"
    ]


def test_hits_of_what_was_never_executed_are_told() -> None:
    executed = EXECUTED - Counter[int]({RET: 5})
    assert list(differences(function(), ARMED, executed, COUNTED)) == [
        "f+0x5 c3 ret (boosted): executed 0 times, counted 5, missed 0"
    ]


def test_execution_within_an_instruction_is_told() -> None:
    executed = EXECUTED + Counter[int]({BASE + 2: 1})
    assert list(differences(function(), ARMED, executed, COUNTED)) == ["f+0x2 was executed, and is no boundary"]


def test_a_block_goes_on_to_the_next_branch() -> None:
    # The jump is taken twice of five times: what is behind it was entered three times, its target twice.
    assert executions(insns_at(BASE), {PUSH: 5, NOP: 3, POP: 2}) == {PUSH: 5, JE: 5, NOP: 3, POP: 5, RET: 5}


def test_a_block_ends_with_its_page() -> None:
    base = VirtAddr(BASE + PAGE_SIZE - 4)
    insns = insns_at(base)
    # The nop is the last instruction of its page: QEMU enters a block of its own at the pop.
    assert executions(insns, {base: 5, base + 3: 5, base + 4: 5}) == {insn.addr: 5 for insn in insns}


def test_what_no_block_leads_to_was_not_executed() -> None:
    assert executions(insns_at(BASE), {BASE: 7}) == {PUSH: 7, JE: 7}


def test_what_runs_by_itself_or_not_in_each_round_is_not_admitted_by_rounds() -> None:
    steady, unsteady = {PUSH: 10, JE: 5}, {PUSH: 10, JE: 6}
    limits = Limits(executed=2, hits=15, rounds=5)
    assert limits.admit(Kind.LOOP, False, steady, [steady])
    assert not limits.admit(Kind.LOOP, False, steady, [steady, {PUSH: 5, JE: 5}])
    assert not limits.admit(Kind.LOOP, False, unsteady, [])
    assert not limits.admit(Kind.LOOP, True, steady, [])
    assert not limits.admit(Kind.SCHEDULER, False, steady, [])
    assert Limits(executed=2, hits=16).admit(Kind.SCHEDULER, True, unsteady, [steady])
    assert not Limits(executed=2, hits=14).admit(Kind.LOOP, False, steady, [])
    assert not Limits(executed=3, hits=15).admit(Kind.LOOP, False, steady, [])
