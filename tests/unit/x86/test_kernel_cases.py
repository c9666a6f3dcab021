"""What the kernel's own kprobes got wrong, or cannot do; each case with its exact result, on unicorn.

Sources: arch/x86/kernel/kprobes/core.c of several versions; "x86/kprobes: Fix 1 byte conditional jump target" (2023).
"""

from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.relocate import relocate
from tests.proof.differential import check
from tests.proof.emulator import Emulator
from tests.proof.state import State

ADDR = VirtAddr(0xFFFF_FFFF_8123_4567)
SLOT = VirtAddr(0xFFFF_FFFF_C0FF_E123)
STACK = 0xFFFF_C900_0000_8000
TARGET = 0xFFFF_FFFF_8155_5555

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800


def insn(text: str) -> Insn:
    return decode(bytes.fromhex(text), ADDR)


def boosted(machine: Emulator, before: State, text: str) -> State:
    """The state after the code in the slot; first it, and the stepped copy, are compared with the original."""
    original = insn(text)
    assert check(machine, before, original, SLOT)
    return machine.run(before, {SLOT: relocate(original, SLOT)}, SLOT, most=8)


@pytest.fixture
def before(state_from: Any) -> State:
    state: State = state_from("kernel cases")
    state.registers.update(rsp=STACK, eflags=2)
    return state


@pytest.mark.parametrize(
    "text", ["2e e8 10 00 00 00", "2e 2e e8 10 00 00 00", "f2 e8 10 00 00 00", "48 e8 10 00 00 00", "67 e8 10 00 00 00"]
)
def test_prefixed_call_returns_behind_all_of_it(machine: Emulator, before: State, text: str) -> None:
    """The kernel pushes the address + 5, and the guest runs into the last bytes of the displacement."""
    after = boosted(machine, before, text)
    length = len(bytes.fromhex(text))
    assert after.registers["rip"] == ADDR + length + 0x10
    assert after.read(after.registers["rsp"], 8) == (ADDR + length).to_bytes(8, "little")
    assert after.registers["rsp"] == STACK - 8


@pytest.mark.parametrize("text", ["ff 10", "ff 50 08", "ff 54 c3 10", "ff 14 c5 00 10 00 81", "ff 15 00 10 00 00"])
def test_call_through_memory(machine: Emulator, before: State, text: str) -> None:
    """The kernel refuses it ("TODO")."""
    before.registers.update(rax=0xFFFF_8880_0000_1000, rbx=0xFFFF_8880_0000_2000)
    operands = {
        "ff 10": 0xFFFF_8880_0000_1000,
        "ff 50 08": 0xFFFF_8880_0000_1008,
        "ff 54 c3 10": (0xFFFF_8880_0000_2010 + 8 * 0xFFFF_8880_0000_1000) & (1 << 64) - 1,
        "ff 14 c5 00 10 00 81": (0xFFFF_FFFF_8100_1000 + 8 * 0xFFFF_8880_0000_1000) & (1 << 64) - 1,
        "ff 15 00 10 00 00": ADDR + 6 + 0x1000,
    }
    before.write(operands[text], TARGET.to_bytes(8, "little"))
    after = boosted(machine, before, text)
    assert after.registers["rip"] == TARGET
    assert after.registers["rsp"] == STACK - 8
    assert after.read(STACK - 8, 8) == (ADDR + len(bytes.fromhex(text))).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("text", "at"),
    [("ff 14 24", 0), ("ff 54 24 08", 8), ("ff 54 24 f8", -8), ("ff 54 24 f0", -16), ("ff 94 24 00 01 00 00", 0x100)],
)
def test_call_through_the_stack_reads_it_before_it_pushes(machine: Emulator, before: State, text: str, at: int) -> None:
    before.write(STACK + at, TARGET.to_bytes(8, "little"))
    after = boosted(machine, before, text)
    assert after.registers["rip"] == TARGET
    assert after.read(STACK - 8, 8) == (ADDR + len(bytes.fromhex(text))).to_bytes(8, "little")


def test_call_of_rsp_goes_where_it_pointed_before_the_push(machine: Emulator, before: State) -> None:
    after = boosted(machine, before, "ff d4")
    assert after.registers["rip"] == STACK
    assert after.registers["rsp"] == STACK - 8


@pytest.mark.parametrize(
    ("text", "flags", "rcx", "taken", "left"),
    [
        ("e2 f0", 0, 0, True, (1 << 64) - 1),
        ("e2 f0", 0, 1, False, 0),  # the kernel tests the count before it is decremented, and goes round once more
        ("e2 f0", 0, 2, True, 1),
        ("e1 f0", ZF, 0, True, (1 << 64) - 1),
        ("e1 f0", ZF, 1, False, 0),
        ("e1 f0", ZF, 2, True, 1),
        ("e1 f0", 0, 2, False, 1),
        ("e0 f0", 0, 1, False, 0),
        ("e0 f0", 0, 2, True, 1),
        ("e0 f0", ZF, 2, False, 1),
        ("67 e2 f0", 0, 1, False, 0),
        ("67 e2 f0", 0, 1 << 32, True, 0xFFFF_FFFF),  # the upper half is cleared, which the kernel does not do
        ("67 e2 f0", 0, 0x1_0000_0002, True, 1),
        ("e3 f0", 0, 0, True, 0),
        ("e3 f0", 0, 1, False, 1),
        ("e3 f0", 0, 1 << 32, False, 1 << 32),
        ("67 e3 f0", 0, 1 << 32, True, 1 << 32),
    ],
)
def test_loop_counts_down_first(
    machine: Emulator, before: State, text: str, flags: int, rcx: int, taken: bool, left: int
) -> None:
    before.registers.update(rcx=rcx, eflags=2 | flags)
    after = boosted(machine, before, text)
    behind = ADDR + len(bytes.fromhex(text))
    assert after.registers["rip"] == (behind - 0x10 if taken else behind)
    assert after.registers["rcx"] == left
    assert after.registers["eflags"] == 2 | flags


@pytest.mark.parametrize(("text", "released"), [("c2 08 00", 8), ("c2 00 00", 0), ("c2 f8 7f", 0x7FF8), ("c3", 0)])
def test_ret_releases_its_operand(machine: Emulator, before: State, text: str, released: int) -> None:
    """The kernel's emulation leaves it on the stack."""
    before.write(STACK, TARGET.to_bytes(8, "little"))
    after = boosted(machine, before, text)
    assert after.registers["rip"] == TARGET
    assert after.registers["rsp"] == STACK + 8 + released


@pytest.mark.parametrize("displacement", [0x80, 0xF0, 0xFE, 0xFF])
@pytest.mark.parametrize("opcode", ["eb", "74", "e2", "e3"])
def test_negative_rel8_goes_backwards(machine: Emulator, before: State, opcode: str, displacement: int) -> None:
    """Taken for unsigned, it crashed the kernel."""
    before.registers.update(rcx=0, eflags=2 | ZF)
    after = boosted(machine, before, f"{opcode} {displacement:02x}")
    assert after.registers["rip"] == ADDR + 2 + displacement - 0x100


@pytest.mark.parametrize(
    ("flags", "less_or_equal"),
    [
        (0, False),
        (ZF, True),  # the kernel required both at first
        (SF, True),
        (OF, True),
        (SF | OF, False),
        (SF | OF | ZF, True),
        (SF | ZF, True),
        (OF | ZF, True),
        (CF | PF | AF, False),
    ],
)
@pytest.mark.parametrize("size", [2, 6])
def test_jle_and_jg_take_either_condition(
    machine: Emulator, before: State, flags: int, less_or_equal: bool, size: int
) -> None:
    before.registers["eflags"] = 2 | flags
    for condition, taken in ((0xE, less_or_equal), (0xF, not less_or_equal)):
        text = f"7{condition:x} f0" if size == 2 else f"0f 8{condition:x} f0 ff ff ff"
        after = boosted(machine, before, text)
        assert after.registers["rip"] == ADDR + size - (0x10 if taken else 0)
        assert after.registers["eflags"] == 2 | flags
