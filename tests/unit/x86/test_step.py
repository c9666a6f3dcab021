"""What a single step came to, and what is put right after it."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.relocate import StepCopy, copy_for_step
from gdb_kprobe.x86.step import (
    StepError,
    StepFixup,
    StepOutcome,
    fix_up,
    fix_up_fault,
    is_repeating,
    most_steps,
    outcome,
    stepped,
)

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
SLOT = VirtAddr(0xFFFF_FFFF_C0FF_E000)
STACK = 0xFFFF_C900_0000_8000
ENTRY = 0xFFFF_FFFF_81A0_0B00  # an exception's entry
BEFORE = {"rip": SLOT, "rsp": STACK, "rcx": 7, "eflags": 2}


def insn(text: str) -> Insn:
    return decode(bytes.fromhex(text), ADDR)


def copy(text: str) -> StepCopy:
    return copy_for_step(insn(text), SLOT)


def after(**changed: int) -> dict[str, int]:
    return {**BEFORE, **changed}


def no_stack(addr: int, size: int) -> bytes:
    raise AssertionError("this family needs no stack")


class Stack:
    """Holds given quadwords upwards from an address."""

    def __init__(self, addr: int, *words: int) -> None:
        self._addr, self._data = addr, b"".join(word.to_bytes(8, "little") for word in words)

    def __call__(self, addr: int, size: int) -> bytes:
        assert self._addr <= addr <= self._addr + len(self._data) - size
        return self._data[addr - self._addr :][:size]


@pytest.mark.parametrize(
    ("text", "rip", "corrected"),
    [
        ("0f 1f 44 00 00", SLOT + 5, ADDR + 5),
        ("41 57", SLOT + 2, ADDR + 2),
        ("48 8b 05 00 00 00 00", SLOT + 7, ADDR + 7),
        ("75 f0", SLOT + 6, ADDR + 2),  # not taken
        ("2e 75 f0", SLOT + 6, ADDR + 3),
        ("e2 f0", SLOT + 2, ADDR + 2),
        ("e2 f0", SLOT + 7, ADDR + 2 - 0x10),  # taken
    ],
)
def test_ip_is_moved_from_the_slot_to_where_the_original_ends(text: str, rip: int, corrected: int) -> None:
    assert fix_up(copy(text), after(rip=rip), no_stack) == StepFixup({"rip": corrected})


@pytest.mark.parametrize(
    ("text", "rip"),
    [
        ("75 f0", ADDR + 2 - 0x10),
        ("75 fe", ADDR),
        ("e9 00 00 00 50", ADDR + 5 + 0x5000_0000),
        ("41 57", ADDR + 2),  # QEMU has executed the jump back as well
    ],
)
def test_ip_that_is_right_already_is_left_alone(text: str, rip: int) -> None:
    assert fix_up(copy(text), after(rip=rip), no_stack) == StepFixup({})


@pytest.mark.parametrize("text", ["c3", "c2 08 00", "f3 c3", "ff e0", "ff 25 00 00 00 00"])
def test_absolute_ip_is_left_alone(text: str) -> None:
    assert fix_up(copy(text), after(rip=0xFFFF_FFFF_8155_5555), no_stack) == StepFixup({})


@pytest.mark.parametrize(
    ("text", "length", "original"),
    [("e8 10 00 00 00", 5, 5), ("2e e8 10 00 00 00", 5, 6), ("ff d0", 2, 2), ("ff 54 24 08", 4, 4)],
)
def test_call_gets_its_return_address_corrected(text: str, length: int, original: int) -> None:
    stack = Stack(STACK - 8, SLOT + length)
    found = fix_up(copy(text), after(rip=ENTRY, rsp=STACK - 8), stack)
    assert found == StepFixup({}, ((STACK - 8, (ADDR + original).to_bytes(8, "little")),))


def test_return_address_that_is_right_already_is_left_alone() -> None:
    assert fix_up(copy("ff d0"), after(rip=ENTRY, rsp=STACK - 8), Stack(STACK - 8, ADDR + 2)) == StepFixup({})


def test_call_without_its_return_address_on_the_stack_is_an_error() -> None:
    with pytest.raises(StepError, match="the stack holds 0x1234"):
        fix_up(copy("ff d0"), after(rip=ENTRY, rsp=STACK - 8), Stack(STACK - 8, 0x1234))


@pytest.mark.parametrize(
    ("text", "changed", "expected"),
    [
        ("41 57", {"rip": SLOT + 2, "rsp": STACK - 8}, StepOutcome.DONE),
        ("41 57", {}, StepOutcome.UNMOVED),
        ("48 8b 00", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("41 57", {"rip": ADDR + 2, "rsp": STACK - 8}, StepOutcome.DONE),  # and the jump back
        ("75 f0", {"rip": ADDR + 2 - 0x10}, StepOutcome.DONE),
        ("75 f0", {"rip": SLOT + 6}, StepOutcome.DONE),
        ("75 f0", {}, StepOutcome.UNMOVED),
        ("eb fe", {"rip": ADDR}, StepOutcome.DONE),  # jmp onto itself
        ("75 fe", {"rip": ADDR}, StepOutcome.DONE),
        ("e2 fe", {"rip": SLOT + 7, "rcx": 6}, StepOutcome.DONE),
        ("e2 fe", {"rip": SLOT + 2, "rcx": 0}, StepOutcome.DONE),
        ("e2 fe", {}, StepOutcome.UNMOVED),
        ("e3 fe", {"rip": SLOT + 7}, StepOutcome.DONE),
        ("e8 fb ff ff ff", {"rip": ADDR, "rsp": STACK - 8}, StepOutcome.DONE),
        ("e8 fb ff ff ff", {}, StepOutcome.UNMOVED),
        ("c3", {"rip": 0xFFFF_FFFF_8155_5555, "rsp": STACK + 8}, StepOutcome.DONE),
        ("c3", {"rip": ENTRY, "rsp": STACK + 8}, StepOutcome.DONE),  # returned there
        ("c2 10 00", {"rip": ENTRY, "rsp": STACK + 24}, StepOutcome.DONE),
        ("c3", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("ff e0", {"rip": ENTRY}, StepOutcome.DONE),
        ("ff d0", {"rip": ENTRY, "rsp": STACK - 8}, StepOutcome.DONE),
        ("ff 10", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("c3", {}, StepOutcome.UNMOVED),
        ("f3 a4", {"rcx": 6}, StepOutcome.PARTIAL),
        ("f3 a4", {}, StepOutcome.UNMOVED),
        ("f3 a4", {"rip": SLOT + 2, "rcx": 0}, StepOutcome.DONE),
        ("f3 a4", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("a4", {}, StepOutcome.UNMOVED),
        ("e2 10", {"rcx": 6}, StepOutcome.UNMOVED),  # only a repeated string stays in its place
    ],
)
def test_outcome_of_a_step(text: str, changed: dict[str, int], expected: StepOutcome) -> None:
    through = expected in (StepOutcome.DONE, StepOutcome.FAULTED)
    assert outcome(copy(text), BEFORE, after(**changed), lambda rip: rip == ENTRY) is expected
    assert stepped(copy(text), after(**changed)) is through
    assert is_repeating(copy(text), BEFORE, after(**changed)) is (expected is StepOutcome.PARTIAL)


@pytest.mark.parametrize(
    ("text", "rcx", "steps"),
    [("f3 a4", 0, 1), ("f3 a4", 7, 8), ("f3 a4", 1 << 32, (1 << 32) + 1), ("67 f3 a4", (1 << 32) + 7, 8), ("a4", 7, 1)],
)
def test_steps_of_a_repeated_instruction_are_bounded_by_the_count(text: str, rcx: int, steps: int) -> None:
    assert most_steps(insn(text), {**BEFORE, "rcx": rcx}) == steps


@pytest.mark.parametrize(
    ("text", "pushed", "flags", "corrected"),
    [
        ("9c", 0x246, 0x246, None),
        ("9c", 0x346, 0x246, 0x246),  # the trap flag of whoever stepped it
        ("9c", 0x046, 0x246, 0x246),
        ("9c", 0x246, 0x346, 0x346),  # the guest's own trap flag
    ],
)
def test_pushed_flags_are_those_of_the_processor(text: str, pushed: int, flags: int, corrected: int | None) -> None:
    found = fix_up(copy(text), after(rip=SLOT + 1, rsp=STACK - 8, eflags=flags), Stack(STACK - 8, pushed))
    memory = () if corrected is None else ((STACK - 8, corrected.to_bytes(8, "little")),)
    assert found == StepFixup({"rip": ADDR + 1}, memory)


def test_pushed_flags_of_16_bits_leave_the_rest_of_the_stack_alone() -> None:
    found = fix_up(copy("66 9c"), after(rip=SLOT + 2, rsp=STACK - 2, eflags=0x246), Stack(STACK - 2, 0x1111_0346))
    assert found == StepFixup({"rip": ADDR + 2}, ((STACK - 2, b"\x46\x02"),))


@pytest.mark.parametrize("text", ["90", "75 f0", "c3"])
def test_step_to_nowhere_is_an_error(text: str) -> None:
    with pytest.raises(StepError, match="led to 0x1234"):
        outcome(copy(text), BEFORE, after(rip=0x1234), lambda rip: rip == ENTRY)


def test_exception_frame_is_given_the_original_ip() -> None:
    frame = STACK - 40
    original = ADDR.to_bytes(8, "little")
    without_error_code = Stack(frame, SLOT, 0x10)
    assert fix_up_fault(copy("f7 f1"), after(rip=ENTRY, rsp=frame), without_error_code) == StepFixup(
        {}, ((frame, original),)
    )
    with_error_code = Stack(frame - 8, 0, SLOT)
    assert fix_up_fault(copy("48 8b 00"), after(rip=ENTRY, rsp=frame - 8), with_error_code) == StepFixup(
        {}, ((frame, original),)
    )


def test_half_done_repetition_faults_at_the_original() -> None:
    frame = STACK - 48
    found = fix_up_fault(copy("f3 a4"), after(rip=ENTRY, rsp=frame, rcx=3), Stack(frame, 2, SLOT))
    assert found == StepFixup({}, ((frame + 8, ADDR.to_bytes(8, "little")),))


@pytest.mark.parametrize(
    ("text", "saved", "memory"),
    [
        ("75 f0", ADDR + 2 - 0x10, {}),
        ("75 f0", SLOT + 6, {-40: ADDR + 2}),
        ("e2 f0", SLOT + 7, {-40: ADDR + 2 - 0x10}),
        ("eb 10", ADDR + 0x12, {}),
        ("c3", 0xFFFF_FFFF_8155_5555, {}),
        ("ff d0", 0xFFFF_FFFF_8155_5555, {0: ADDR + 2}),
        ("e8 10 00 00 00", ADDR + 0x15, {0: ADDR + 5}),
        ("41 57", SLOT + 2, {-40: ADDR + 2}),
    ],
)
def test_single_step_trap_of_the_guest_names_where_the_original_led(
    text: str, saved: int, memory: dict[int, int]
) -> None:
    moved = copy(text)
    frame = Stack(STACK - 40, saved, 0x10, 0x102, STACK, 0x18, moved.behind)
    expected = tuple((STACK + at, word.to_bytes(8, "little")) for at, word in memory.items())
    assert fix_up_fault(moved, after(rip=ENTRY, rsp=STACK - 40), frame) == StepFixup({}, expected)


def test_exception_frame_of_something_else_is_an_error() -> None:
    with pytest.raises(StepError, match="left no frame that names the slot"):
        fix_up_fault(copy("f7 f1"), after(rip=ENTRY, rsp=STACK - 40), Stack(STACK - 40, ADDR, 0x10, 0x102, STACK, 0x18))
