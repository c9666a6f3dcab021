"""A probe from add to delete: the guest computes what it would, each call is one hit, nothing is left."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import KprobeError, RefusedError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import CpuId, Reason, Rung
from gdb_kprobe.region.directory import Kind
from tests.support.toy import Toy, ToyMachine, ToyWith

RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)

# Every instruction of the toy program that is worth a probe: place, function to call, hits of one call.
SITES = [
    ("f_nop", "f_nop", 1),
    ("f_push", "f_push", 1),
    ("f_push+1", "f_push", 1),
    ("f_push+5", "f_push", 1),  # inc [rip+x]
    ("f_lea", "f_lea", 1),
    ("f_lea+14", "f_lea", 1),  # mov rax, [rax]
    ("f_jcc+2", "f_jcc", 1),
    ("f_back+6", "f_back", 6),  # a negative rel8
    ("f_back+2", "f_back", 6),
    ("f_call", "f_call", 1),
    ("f_call_register+7", "f_call_register", 1),
    ("leaf", "f_call", 1),
    ("f_jmp", "f_jmp", 1),
    ("f_loop+6", "f_loop", 6),
    ("f_ret", "f_ret", 1),
]


def outcome(toy: Toy, function: str) -> tuple[dict[str, int], bytes, int]:
    """What a call from a fresh state leaves: the registers, the stack from the stack pointer up, the guest's count."""
    toy.reset_count(function)
    toy.call(function, rax=0, rcx=0, eflags=0x202)
    values = dict(toy.machine.registers[1])
    return values, toy.machine.load(values["rsp"], 0x200), toy.count(function)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(("place", "function", "hits"), SITES)
def test_the_guest_computes_as_without_a_probe(toy: Toy, rung: Rung, place: str, function: str, hits: int) -> None:
    expected = outcome(toy, function)
    probe = toy.add(place, rung=rung)
    for _ in range(5):
        assert outcome(toy, function) == expected
    assert probe.hits == len(toy.hits) == 5 * hits
    toy.session.delete(probe)
    toy.assert_idle()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("edi", [0, 6])
def test_a_conditional_jump_goes_both_ways(toy: Toy, rung: Rung, edi: int) -> None:
    probe = toy.add("f_jcc+2", rung=rung)
    assert toy.call("f_jcc", rdi=edi) == (13 if edi else 99)
    assert probe.hits == 1


def test_the_best_allowed_rung_is_used(toy: Toy, toy_with: ToyWith, machine: ToyMachine) -> None:
    assert toy.session.table.need(toy.add("f_push")).plan.rung is Rung.BOOSTED
    toy.session.detach()
    other = toy_with(machine, (Rung.SINGLE_STEP,))
    assert other.session.table.need(other.add("f_push")).plan.rung is Rung.SINGLE_STEP


def test_a_plan_changes_nothing(toy: Toy) -> None:
    place, plan = toy.session.plan(parse_definition("p f_push+1"))
    assert (str(place), plan.rung, plan.insn.raw) == ("f_push+0x1", Rung.BOOSTED, b"\x48\x89\xe5")
    assert toy.writes() == []
    assert toy.region.slots.used == 0
    toy.assert_idle()


def test_a_plan_at_an_armed_site_is_that_of_the_site(toy: Toy) -> None:
    probe = toy.add("f_push", rung=Rung.SINGLE_STEP)
    assert toy.session.plan(parse_definition("p f_push"))[1] is toy.session.table.need(probe).plan


def test_text_is_decoded_without_our_own_int3(toy: Toy) -> None:
    toy.add("f_push")
    assert toy.session.plan(parse_definition("p f_push+1"))[1].insn.raw == b"\x48\x89\xe5"


@pytest.mark.parametrize("rung", RUNGS)
def test_disabling_restores_the_text_and_enabling_arms_again(toy: Toy, rung: Rung) -> None:
    probe = toy.add("f_push", rung=rung)
    toy.session.set_enabled(probe, False)
    assert (toy.changed_text(), toy.records(), toy.machine.breakpoints) == ({}, [], set())
    assert toy.call("f_push") == 13
    toy.session.set_enabled(probe, True)
    assert toy.call("f_push") == 13
    assert probe.hits == 1


def test_a_probe_defined_disabled_touches_no_text(toy: Toy) -> None:
    probe = toy.add("f_push", enabled=False)
    assert (toy.changed_text(), toy.machine.breakpoints) == ({}, set())
    toy.session.set_enabled(probe, True)
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}


def test_probes_on_one_site_share_the_int3(toy: Toy) -> None:
    first, second = toy.add("p:first f_push"), toy.add("p:second f_push")
    toy.call("f_push")
    assert [hit.probe.name for hit in toy.hits] == ["first", "second"]
    assert len(toy.records()) == 1
    toy.session.delete(first)
    toy.call("f_push")
    assert (first.hits, second.hits) == (1, 2)
    toy.session.set_enabled(second, False)
    assert toy.changed_text() == {}
    toy.session.delete(second)
    toy.assert_idle()


def test_one_gate_serves_all_sites_and_closes_with_the_last(toy: Toy) -> None:
    probes = [toy.add(name) for name in ("f_push", "f_nop", "f_jmp")]
    for probe in probes:
        assert toy.machine.breakpoints == {toy.addr("bp_entry")}
        toy.session.delete(probe)
    assert toy.machine.breakpoints == set()


@pytest.mark.parametrize(("place", "rung"), [("f_push", Rung.BOOSTED), ("f_pushf", Rung.SINGLE_STEP)])
def test_a_post_handler_leaves_the_rung_but_where_its_instruction_is_stepped_alone(
    toy: Toy, place: str, rung: Rung
) -> None:
    first = toy.add(f"p:first {place}")
    assert toy.session.table.need(first).plan.rung is Rung.BOOSTED
    seen: list[int] = []
    second = toy.add(f"p:second {place}", post=lambda hit: seen.append(hit.regs.ip))
    assert toy.session.table.of(first) is toy.session.table.of(second)
    assert toy.session.table.need(first).plan.rung is rung
    assert toy.call(place) == 13
    assert seen == [toy.addr(place, 1)]
    assert (first.hits, second.hits) == (1, 1)
    assert len(toy.records()) == 1
    assert toy.records()[0].rung is rung


def test_a_name_is_taken_once(toy: Toy) -> None:
    toy.add("p:name f_push")
    with pytest.raises(KprobeError, match="there is a probe named name already"):
        toy.add("p:name f_nop")
    assert list(toy.changed_text()) == [toy.addr("f_push")]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("f_push+2", Reason.NOT_A_BOUNDARY),
        ("f_jmp+2", Reason.RAISES_UD),  # ud2
        ("bp_entry", Reason.BP_PATH),
        ("f_int3", Reason.FOREIGN_INT3),
        ("nowhere", Reason.NO_SYMBOL),
        ("f_push+0x40", Reason.OFFSET_OUTSIDE_SYMBOL),
        ("0xffffffff80200000", Reason.NOT_TEXT),
        ("0xffffffff90000000", Reason.NOT_TEXT),
    ],
)
def test_a_refused_probe_leaves_nothing(toy: Toy, place: str, reason: Reason) -> None:
    with pytest.raises(RefusedError) as caught:
        toy.add(f"p:bad {place}")
    assert caught.value.refusal.reason is reason
    assert len(toy.session.probes) == 0
    assert toy.writes() == []
    toy.assert_idle()


def test_an_address_without_a_symbol_is_decoded_from_there(toy: Toy) -> None:
    """The first function of a guest whose symbol file does not name it."""
    del toy.guest._addrs[0], toy.guest._names[0]
    probe = toy.add(f"p:first {toy.addr('f_nop'):#x}")
    toy.call("f_nop")
    assert probe.hits == 1


def fill_code(toy: Toy, *, but: int = 0) -> None:
    """Have no room for slots, *but* for some small ones."""
    toy.region.allocate(Kind.TABLE, toy.region.free)
    taken = list(iter(lambda: toy.region.slots.allocate(1), None))
    for slot in taken[:but]:
        toy.region.slots.discard(slot)


def test_a_full_region_ends_the_quarantine(toy: Toy) -> None:
    """Adding and deleting for ever takes no more room than one probe."""
    fill_code(toy, but=4)
    used = toy.region.slots.used
    for _ in range(10):
        toy.session.delete(toy.add("f_push"))
    assert toy.region.slots.used - sum(slot.size for slot in toy.region.slots.quarantined) == used


def test_a_slot_that_a_vcpu_is_in_stays_in_quarantine(toy: Toy) -> None:
    probe = toy.add("f_push")
    fill_code(toy)
    toy.put_at_trap("f_push", cpu=2)
    toy.session.on_breakpoint(CpuId(2))
    assert toy.machine.registers[2]["rip"] in toy.region.header.code
    toy.session.delete(probe)
    with pytest.raises(RefusedError, match="region is full"):
        toy.add("f_nop")
    assert toy.resume(cpu=2) == 13
    toy.add("f_nop")
