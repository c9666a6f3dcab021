"""What a single step came to, and what is put right after it."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.step import StepError, StepFixup, StepOutcome, fix_up, fix_up_fault, outcome, stepped

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
SLOT = VirtAddr(0xFFFF_FFFF_C0FF_E000)
STACK = 0xFFFF_C900_0000_8000
ENTRY = 0xFFFF_FFFF_81A0_0B00  # an exception's entry
BEFORE = {"rip": SLOT, "rsp": STACK, "rcx": 7, "eflags": 2}


def insn(text: str) -> Insn:
    return decode(bytes.fromhex(text), ADDR)


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
        ("75 f0", SLOT + 2, ADDR + 2),
        ("75 f0", SLOT + 2 - 0x10, ADDR + 2 - 0x10),
        ("e9 00 00 00 80", SLOT + 5 - 0x8000_0000, ADDR + 5 - 0x8000_0000),
        ("e9 00 00 00 50", 0x10FF_E005, ADDR + 5 + 0x5000_0000),  # only the copy goes past the top
        ("e2 f0", SLOT + 2 - 0x10, ADDR + 2 - 0x10),
    ],
)
def test_ip_is_moved_back_by_the_distance_of_the_slot(text: str, rip: int, corrected: int) -> None:
    assert fix_up(insn(text), SLOT, BEFORE, after(rip=rip), no_stack) == StepFixup({"rip": corrected})


@pytest.mark.parametrize("text", ["c3", "c2 08 00", "f3 c3", "ff e0", "ff 25 00 00 00 00"])
def test_absolute_ip_is_left_alone(text: str) -> None:
    assert fix_up(insn(text), SLOT, BEFORE, after(rip=0xFFFF_FFFF_8155_5555), no_stack) == StepFixup({})


@pytest.mark.parametrize(("text", "length"), [("e8 10 00 00 00", 5), ("2e e8 10 00 00 00", 6)])
def test_call_gets_its_return_address_and_ip_corrected(text: str, length: int) -> None:
    stack = Stack(STACK - 8, SLOT + length)
    found = fix_up(insn(text), SLOT, BEFORE, after(rip=SLOT + length + 0x10, rsp=STACK - 8), stack)
    assert found == StepFixup({"rip": ADDR + length + 0x10}, ((STACK - 8, (ADDR + length).to_bytes(8, "little")),))


@pytest.mark.parametrize(("text", "length"), [("ff d0", 2), ("ff 54 24 08", 4)])
def test_indirect_call_gets_its_return_address_corrected(text: str, length: int) -> None:
    stack = Stack(STACK - 8, SLOT + length)
    found = fix_up(insn(text), SLOT, BEFORE, after(rip=ENTRY, rsp=STACK - 8), stack)
    assert found == StepFixup({}, ((STACK - 8, (ADDR + length).to_bytes(8, "little")),))


def test_call_without_its_return_address_on_the_stack_is_an_error() -> None:
    with pytest.raises(StepError, match="the stack holds 0x1234"):
        fix_up(insn("ff d0"), SLOT, BEFORE, after(rip=ENTRY, rsp=STACK - 8), Stack(STACK - 8, 0x1234))


@pytest.mark.parametrize(
    ("text", "changed", "expected"),
    [
        ("41 57", {"rip": SLOT + 2, "rsp": STACK - 8}, StepOutcome.DONE),
        ("41 57", {}, StepOutcome.UNMOVED),
        ("48 8b 00", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("75 f0", {"rip": SLOT + 2 - 0x10}, StepOutcome.DONE),
        ("75 f0", {"rip": SLOT + 2}, StepOutcome.DONE),
        ("75 f0", {}, StepOutcome.UNMOVED),
        ("eb fe", {}, StepOutcome.DONE),  # jmp onto itself
        ("75 fe", {}, StepOutcome.DONE),
        ("e2 fe", {"rcx": 6}, StepOutcome.DONE),  # loop onto itself has counted ...
        ("e2 fe", {}, StepOutcome.UNMOVED),  # ... or has not been executed
        ("e3 fe", {}, StepOutcome.DONE),
        ("e8 fb ff ff ff", {"rsp": STACK - 8}, StepOutcome.DONE),
        ("e8 fb ff ff ff", {}, StepOutcome.UNMOVED),
        ("c3", {"rip": 0xFFFF_FFFF_8155_5555, "rsp": STACK + 8}, StepOutcome.DONE),
        ("c3", {"rip": ENTRY, "rsp": STACK + 8}, StepOutcome.DONE),  # returned there
        ("c2 10 00", {"rip": ENTRY, "rsp": STACK + 24}, StepOutcome.DONE),
        ("c3", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("ff e0", {"rip": ENTRY}, StepOutcome.DONE),
        ("ff d0", {"rip": ENTRY, "rsp": STACK - 8}, StepOutcome.DONE),
        ("ff 10", {"rip": ENTRY, "rsp": STACK - 48}, StepOutcome.FAULTED),
        ("c3", {}, StepOutcome.UNMOVED),
    ],
)
def test_outcome_of_a_step(text: str, changed: dict[str, int], expected: StepOutcome) -> None:
    assert outcome(insn(text), SLOT, BEFORE, after(**changed), lambda rip: rip == ENTRY) is expected
    assert stepped(insn(text), SLOT, BEFORE, after(**changed)) is (expected is not StepOutcome.UNMOVED)


@pytest.mark.parametrize("text", ["90", "75 f0", "c3"])
def test_step_to_nowhere_is_an_error(text: str) -> None:
    with pytest.raises(StepError, match="led to 0x1234"):
        outcome(insn(text), SLOT, BEFORE, after(rip=0x1234), lambda rip: rip == ENTRY)


def test_exception_frame_is_given_the_original_ip() -> None:
    frame = STACK - 40
    original = ADDR.to_bytes(8, "little")
    without_error_code = Stack(frame, SLOT, 0x10)
    assert fix_up_fault(insn("f7 f1"), SLOT, after(rip=ENTRY, rsp=frame), without_error_code) == StepFixup(
        {}, ((frame, original),)
    )
    with_error_code = Stack(frame - 8, 0, SLOT)
    assert fix_up_fault(insn("48 8b 00"), SLOT, after(rip=ENTRY, rsp=frame - 8), with_error_code) == StepFixup(
        {}, ((frame, original),)
    )


def test_exception_frame_of_something_else_is_an_error() -> None:
    with pytest.raises(StepError, match="left no frame that names the slot"):
        fix_up_fault(insn("f7 f1"), SLOT, after(rip=ENTRY, rsp=STACK - 40), Stack(STACK - 40, ADDR, 0x10))
