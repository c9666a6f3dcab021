"""Small pieces of text, of which each instruction's fate is known."""

from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.survey import Survey, Surveyor
from gdb_kprobe.model import AddressRange, Reason, Rung, VirtAddr

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_C100_0000))


def counted(code: str, area: AddressRange = AREA, *, by_kernel_rules: bool = False, **options: Any) -> Survey:
    surveyor = Surveyor(area, Rules.LINUX_6_12, by_kernel_rules=by_kernel_rules)
    surveyor.count(Piece(ADDR, bytes.fromhex(code), **options))
    return surveyor.survey


def counts(survey: Survey) -> dict[Rung | Reason, int]:
    rungs: dict[Rung | Reason, int] = {rung: count for rung, count in survey.rungs.items() if count}
    return rungs | {reason: count for reason, count in survey.refused.items() if count}


BOOSTED = Rung.BOOSTED


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("55 4889e5 5d c3", {BOOSTED: 4}),
        ("55 c3 cccccc", {BOOSTED: 2, Reason.PADDING: 3}),
        ("55 c3 cc 5d c3", {BOOSTED: 4, Reason.FOREIGN_INT3: 1}),  # behind a return, but not at the end
        ("55 c3 cc 90 6690", {BOOSTED: 2, Reason.PADDING: 3}),
        ("e800000000 0f1f440000", {BOOSTED: 1, Reason.PADDING: 1}),  # behind a call of something that does not return
        ("55 0f1f440000", {BOOSTED: 2}),  # execution gets there
        ("90 90", {BOOSTED: 2}),  # all of a function
        ("cc cc", {Reason.PADDING: 2}),
        ("c3 f30f1efa", {BOOSTED: 1, Reason.LANDING_PAD: 1}),  # no padding: it is somebody's target
        ("f30f1efb 660f1f00 0f1f40d6 0f1f4000", {Reason.LANDING_PAD: 3, BOOSTED: 1}),
        ("c3 0000 0000 00", {BOOSTED: 1, Reason.PADDING: 3}),
        ("0f0b cc", {Reason.RAISES_UD: 1, Reason.PADDING: 1}),
        ("55 cccc", {BOOSTED: 1, Reason.FOREIGN_INT3: 2}),  # execution runs into them
        ("55 06 9090 c3", {BOOSTED: 1, Reason.UNDECODABLE: 4}),  # from there on nothing is known
        ("55 e80000", {BOOSTED: 1, Reason.UNDECODABLE: 3}),
        ("fb f4 c3", {Reason.INTERRUPT_SHADOW: 2, BOOSTED: 1}),
        ("fb c3", {BOOSTED: 2}),
        ("8ed0 4889c4 c3", {Reason.INTERRUPT_SHADOW: 2, BOOSTED: 1}),
        ("48cf", {Reason.FAR_TRANSFER: 1}),
    ],
)
def test_each_instruction_is_counted_once(code: str, expected: dict[Rung | Reason, int]) -> None:
    survey = counted(code)
    assert counts(survey) == expected
    assert survey.instructions == sum(expected.values())


def test_where_faults_are_fixed_up_is_code_and_no_padding() -> None:
    """``ASM_CLAC`` in front of ``bad_get_user`` is a nop for a CPU without SMAP (arch/x86/lib/getuser.S)."""
    code = "c3 0f1f00"
    assert counts(counted(code)) == {BOOSTED: 1, Reason.PADDING: 1}
    assert counts(counted(code, fixups=[ADDR + 1])) == {BOOSTED: 2}
    assert counts(counted(code, fixups=[ADDR + 4])) == {BOOSTED: 1, Reason.PADDING: 1}, "of the next function"


def test_a_rule_takes_all_and_a_site_what_it_touches() -> None:
    assert counts(counted("55 c3 cccc", rule=Reason.NOINSTR)) == {Reason.NOINSTR: 4}
    # A site of 5 bytes at the return: what a static call without a target is.
    site = (ADDR + 1, 5, Reason.STATIC_CALL)
    assert counts(counted("55 c3 cccccccc cc", sites=[site])) == {
        BOOSTED: 1,
        Reason.STATIC_CALL: 5,
        Reason.PADDING: 1,
    }
    first, second = (ADDR, 2, Reason.BUG_TABLE), (ADDR, 2, Reason.JUMP_LABEL)
    assert counts(counted("6690 c3", sites=[first, second])) == {Reason.BUG_TABLE: 1, BOOSTED: 1}
    # In the middle of an instruction.
    assert counts(counted("488d0500100000 c3", sites=[(ADDR + 6, 1, Reason.JUMP_LABEL)])) == {
        Reason.JUMP_LABEL: 1,
        BOOSTED: 1,
    }


def test_the_exception_table_is_stepped() -> None:
    survey = counted("488b07 c3", extable=[ADDR])
    assert counts(survey) == {Rung.SINGLE_STEP: 1, BOOSTED: 1}
    assert survey.not_boosted == {Reason.EX_TABLE: 1}


def test_by_the_kernels_rules_branches_are_stepped() -> None:
    code = "55 74fd e800000000 c3"
    ours, kernels = counted(code), counted(code, by_kernel_rules=True)
    assert (ours.kernel_probes, ours.kernel_boosts) == (4, 2)
    assert counts(ours) == {BOOSTED: 4}
    assert counts(kernels) == {BOOSTED: 2, Rung.SINGLE_STEP: 2}
    assert kernels.not_boosted == {Reason.KERNEL_BOOST: 2}
    # What does not come back from a step has only the boosted rung.
    assert counts(counted("f4 c3", by_kernel_rules=True)) == {Reason.HALTS: 1, BOOSTED: 1}


def test_reach_of_the_slots() -> None:
    far = AddressRange(VirtAddr(0x1000), VirtAddr(0x2000))
    assert counts(counted("55 c3", far)) == {Reason.OUT_OF_REACH: 2}
    near = AddressRange(VirtAddr(ADDR + 0x7000_0000), VirtAddr(ADDR + 0x7001_0000))
    # lea rax, [rip-0x40000000] and call -0x40000000 can do the same nowhere there.
    assert counts(counted("488d05000000c0 e8000000c0 c3", near)) == {Reason.OUT_OF_REACH: 2, BOOSTED: 1}


def test_the_file_has_exactly_these_keys() -> None:
    assert counted("55 c3 cc").as_json("6.12.1") == {
        "kernel": "6.12.1",
        "instructions": 3,
        "rungs": {"single-step": 0, "boosted": 2, "optimized": 0},
        "refused": {"PADDING": 1},
        "not_optimized": {},
    }
