"""Which rung a probe gets, why not a better one, and that a refusal costs nothing."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.plan import Facts, make_plan
from gdb_kprobe.kprobes.slots import SLOT_ALIGN, SlotAllocator
from gdb_kprobe.model import AddressRange, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.x86.decode import Insn, decode, iter_insns
from gdb_kprobe.x86.relocate import copy_for_step, relocate

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_C001_0000))

PUSH, JCC, CALL, LEA, RET = "55", "74f0", "e8fbffffff", "488d0500100000", "c3"
INSNS = [PUSH, JCC, CALL, LEA, RET, "ebfe", "e2fe", "ffd0", "ff1500100000", "0f1f440000"]


def insn(code: str) -> Insn:
    return decode(bytes.fromhex(code), ADDR)


@pytest.fixture
def slots() -> SlotAllocator:
    return SlotAllocator(AREA)


def refused(code: str, facts: Facts, slots: SlotAllocator) -> Refusal:
    """The refusal of a probe that cannot be planned; no slot may be lost over it."""
    before = slots.used
    with pytest.raises(RefusedError) as caught:
        make_plan(insn(code), facts, slots)
    assert slots.used == before
    assert slots.quarantined == ()
    assert f"cannot probe {ADDR:#x}" in str(caught.value)
    return caught.value.refusal


def reasons(declined: tuple[tuple[Rung, Refusal], ...]) -> list[tuple[Rung, Reason]]:
    return [(rung, refusal.reason) for rung, refusal in declined]


NOT_ASKED = (Rung.OPTIMIZED, Reason.POLICY)


@pytest.mark.parametrize("code", INSNS)
def test_boosted_is_the_best_and_its_code_is_the_relocators(code: str, slots: SlotAllocator) -> None:
    plan = make_plan(insn(code), Facts(), slots)
    assert plan.rung is Rung.BOOSTED
    assert plan.code == relocate(insn(code), plan.slot.code)
    assert reasons(plan.declined) == [NOT_ASKED]


@pytest.mark.parametrize("code", INSNS)
@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (Facts(needs_post=True), Reason.NEEDS_SINGLE_STEP),
        (Facts(in_extable=True), Reason.EX_TABLE),
        (Facts(rungs=(Rung.SINGLE_STEP,)), Reason.POLICY),
    ],
)
def test_single_step_holds_a_copy_and_tells_why_not_boosted(
    code: str, facts: Facts, why: Reason, slots: SlotAllocator
) -> None:
    plan = make_plan(insn(code), facts, slots)
    assert plan.rung is Rung.SINGLE_STEP
    assert plan.code == copy_for_step(insn(code), plan.slot.code).code
    assert reasons(plan.declined) == [NOT_ASKED, (Rung.BOOSTED, why)]


@pytest.mark.parametrize(
    ("code", "rung"),
    [(PUSH, Rung.BOOSTED), (LEA, Rung.BOOSTED), (RET, Rung.BOOSTED), (JCC, Rung.SINGLE_STEP), (CALL, Rung.SINGLE_STEP)],
)
def test_by_the_kernels_rules_only_what_it_boosts_is_boosted(code: str, rung: Rung, slots: SlotAllocator) -> None:
    plan = make_plan(insn(code), Facts(kernel_boost=Rules.LINUX_6_12), slots)
    assert plan.rung is rung
    declined = [] if rung is Rung.BOOSTED else [(Rung.BOOSTED, Reason.KERNEL_BOOST)]
    assert reasons(plan.declined) == [NOT_ASKED, *declined]


@pytest.mark.parametrize("code", INSNS)
def test_the_text_gets_int3_over_the_whole_instruction(code: str, slots: SlotAllocator) -> None:
    plan = make_plan(insn(code), Facts(), slots)
    assert (plan.patch.addr, plan.patch.old, plan.patch.new) == (
        ADDR,
        bytes.fromhex(code),
        b"\xcc" * len(bytes.fromhex(code)),
    )
    assert plan.slot_image.startswith(ADDR.to_bytes(8, "little") + plan.code + b"\xcc")
    assert len(plan.slot_image) == plan.slot.size


@pytest.mark.parametrize("code", ["55", "0f1f440000", "488d0500100000"])
def test_boosted_code_ends_with_a_jump_back_behind_the_instruction(code: str, slots: SlotAllocator) -> None:
    plan = make_plan(insn(code), Facts(), slots)
    last = list(iter_insns(plan.code, plan.slot.code))[-1]
    assert (last.mnemonic, last.branch_target) == ("jmp", insn(code).end)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("cc", Reason.FOREIGN_INT3),
        ("cd80", Reason.SOFTWARE_INTERRUPT),  # int 0x80
        ("0f0b", Reason.RAISES_UD),  # ud2
        ("48cf", Reason.FAR_TRANSFER),  # iretq
    ],
)
def test_an_instruction_of_no_family_is_refused(code: str, reason: Reason, slots: SlotAllocator) -> None:
    assert refused(code, Facts(), slots).reason is reason


def test_no_allowed_rung_is_the_policys_refusal(slots: SlotAllocator) -> None:
    assert refused(PUSH, Facts(rungs=()), slots).reason is Reason.POLICY


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(in_extable=True, rungs=(Rung.BOOSTED,)), Reason.EX_TABLE),
        (Facts(needs_post=True, rungs=(Rung.BOOSTED,)), Reason.NEEDS_SINGLE_STEP),
    ],
)
def test_where_only_boosting_is_allowed_its_own_refusal_is_told(
    facts: Facts, reason: Reason, slots: SlotAllocator
) -> None:
    assert refused(PUSH, facts, slots).reason is reason


@pytest.mark.parametrize("facts", [Facts(), Facts(needs_post=True), Facts(in_extable=True)])
def test_a_full_region_says_how_full_and_what_to_do(facts: Facts) -> None:
    """Also where the better rung was out of the question anyway: the room is what is missing."""
    slots = SlotAllocator(AddressRange(AREA.start, VirtAddr(AREA.start + SLOT_ALIGN)))
    make_plan(insn(PUSH), Facts(), slots)
    refusal = refused(PUSH, facts, slots)
    assert refusal.reason is Reason.REGION_FULL
    assert "64 of 64 bytes in use" in refusal.detail
    assert "region.size" in refusal.hint


def test_text_out_of_reach_of_the_region_is_told_as_that() -> None:
    slots = SlotAllocator(AddressRange(VirtAddr(0x1000), VirtAddr(0x2000)))
    refusal = refused(PUSH, Facts(), slots)
    assert refusal.reason is Reason.OUT_OF_REACH
    assert "0x1000-0x2000" in refusal.detail
    assert "region.virtual" in refusal.hint


def test_an_operand_out_of_reach_of_the_slot_is_refused() -> None:
    """The text is in reach, but what it refers to, on its other side, is not."""
    slots = SlotAllocator(AddressRange(VirtAddr(ADDR + 0x7000_0000), VirtAddr(ADDR + 0x7001_0000)))
    refusal = refused("488d05000000c0", Facts(), slots)  # lea rax, [rip-0x40000000]
    assert refusal.reason is Reason.OUT_OF_REACH
    assert "lea" in refusal.detail


@pytest.mark.parametrize("facts", [Facts(), Facts(needs_post=True)])
def test_a_branch_out_of_reach_of_the_slot_is_refused_on_every_rung(facts: Facts) -> None:
    """Also to be stepped: what is left alone in the slot must get there."""
    slots = SlotAllocator(AddressRange(VirtAddr(ADDR + 0x7000_0000), VirtAddr(ADDR + 0x7001_0000)))
    refusal = refused("e8000000c0", facts, slots)  # call far below
    assert refusal.reason is Reason.OUT_OF_REACH
    assert "call" in refusal.detail
