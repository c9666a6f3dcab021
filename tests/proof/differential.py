"""One instruction four times on one machine: at its address; relocated; stepped in a slot and fixed up; and, in that
slot, run by somebody who knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86 import families, relocate, step
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family
from gdb_kprobe.x86.relocate import StepCopy
from tests.proof.state import Machine, State, differences

MOST_IN_SLOT = 8
"""Instructions of a slot: the longest relocated form has 5."""


def check(machine: Machine, before: State, insn: Insn, slot: VirtAddr, ignored: Iterable[str] = ()) -> bool:
    """Compare all four; true when the instruction was executed and did not raise an exception.

    *ignored* are registers that are different each time (``rdtsc``).

    :raises AssertionError: registers, flags, memory or RIP differ from what the original leaves.
    """
    original = machine.run(before, {insn.addr: insn.raw}, insn.addr, most=_repetitions(insn, before))
    _assert_same(insn, "relocated", original, *_relocated(machine, before, insn, slot, original), ignored)
    if not insn.is_halt:
        copy = relocate.copy_for_step(insn, slot)
        assert len(copy.code) == relocate.step_copy_size(insn), insn
        _assert_same(insn, "stepped", original, _stepped(machine, before, copy, original), range(0), ignored)
        _assert_same(insn, "left to run", original, _left_to_run(machine, before, copy, original), range(0), ignored)
    return not faulted(insn, original)


def faulted(insn: Insn, after: State) -> bool:
    """Unicorn does not always say that there was an exception; but then RIP has not moved."""
    return bool(after.fault) or (after.registers["rip"] == insn.addr and insn.branch_target != insn.addr)


def _repetitions(insn: Insn, before: State) -> int:
    return step.most_steps(insn, before.registers) + 1 if families.classify(insn) is Family.REPEATED else 1


def _relocated(machine: Machine, before: State, insn: Insn, slot: VirtAddr, original: State) -> tuple[State, range]:
    """The state that the code in the slot leaves, and the dead stack that it may have written."""
    code = relocate.relocate(insn, slot)
    assert len(code) == relocate.relocated_size(insn), insn
    after = machine.run(before, {slot: code}, slot, most=MOST_IN_SLOT + _repetitions(insn, before))
    if faulted(insn, original):
        _give_original_ip(insn, slot, original, after)
    elif families.classify(insn) is Family.CALL_INDIRECT:
        return after, range(original.registers["rsp"] - 8, original.registers["rsp"])
    return after, range(0)


def _stepped(machine: Machine, before: State, copy: StepCopy, original: State) -> State:
    insn = copy.insn
    state = before.copy()
    state.registers["rip"] = copy.slot
    while True:
        after = machine.run(state, {copy.slot: copy.code}, copy.slot)
        if not after.fault and step.is_repeating(copy, state.registers, after.registers):
            assert step.outcome(copy, state.registers, after.registers, _no_entry) is step.StepOutcome.PARTIAL
            state = after
            continue
        break
    if faulted(insn, original):
        _give_original_ip(insn, copy.slot, original, after)
        return after
    assert step.outcome(copy, state.registers, after.registers, _no_entry) is step.StepOutcome.DONE, insn
    assert step.stepped(copy, after.registers), insn
    fix = step.fix_up(copy, after.registers, after.read)
    after.registers.update(fix.registers)
    for addr, data in fix.memory:
        after.write(addr, data)
    return after


def _left_to_run(machine: Machine, before: State, copy: StepCopy, original: State) -> State:
    """The state that the slot leaves when nobody steps it; a call's return address is followed to where it leads."""
    insn = copy.insn
    after = machine.run(before, {copy.slot: copy.code}, copy.slot, most=MOST_IN_SLOT + _repetitions(insn, before))
    if faulted(insn, original):
        _give_original_ip(insn, copy.slot, original, after)
    elif insn.is_call:
        rsp = after.registers["rsp"]
        pushed = int.from_bytes(after.read(rsp, 8), "little")
        assert pushed == copy.behind, f"{insn} pushes {pushed:#x}"
        back = copy.code[copy.length :]
        led = machine.run(after, {pushed: back}, pushed).registers["rip"]
        after.write(rsp, led.to_bytes(8, "little"))
    return after


def _give_original_ip(insn: Insn, slot: VirtAddr, original: State, after: State) -> None:
    """It must be as if nothing had been executed, so that the exception can be given the address of the original."""
    assert after.registers["rip"] == slot, (insn, original.fault, hex(after.registers["rip"]))
    after.registers["rip"] = insn.addr
    if not after.fault or not original.fault:
        after.fault = original.fault  # of an exception that unicorn does not tell about


def _no_entry(_: int) -> bool:
    return False


def _assert_same(insn: Insn, how: str, expected: State, found: State, dead: range, ignored: Iterable[str]) -> None:
    for name in ignored:
        found.registers[name] = expected.registers[name]
    told = differences(expected, found, dead)
    assert not told, f"{insn} [{insn.raw.hex(' ')}] at {insn.addr:#x}, {how}: {'; '.join(told)}"
