"""What has to be put right after the copy of an instruction was single-stepped in its slot.

The rules are the kernel's ``resume_execution`` (arch/x86/kernel/kprobes/core.c before v5.13). The step is made by
QEMU, which uses no trap flag and holds interrupts off without touching IF; so ``popf``, ``cli``, ``sti`` and ``mov ss``
need nothing, and ``pushf`` is only checked. (A step under KVM does use the trap flag.) A relative branch is stepped
"into thin air": it lands as far from the slot as it should from the original.

A step of a repeated string instruction executes one iteration and stays in the slot. Wherever that ends, at an
exception or because somebody has enough of it, the registers say what is left to do, and the original address is where
to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, classify

ReadStack = Callable[[int, int], bytes]
"""Reads *size* bytes at an address of the stepped CPU's stack."""

_MASK = (1 << 64) - 1
_TF = 0x100
_TF_AND_IF = 0x300


class StepError(KprobeError):
    """The state after a step is not one that the instruction can have left."""


@dataclass(frozen=True, slots=True)
class StepFixup:
    """What to write before the CPU may go on: registers by name, and pieces of memory."""

    registers: dict[str, int]
    memory: tuple[tuple[int, bytes], ...] = ()


class StepOutcome(StrEnum):
    DONE = "done"
    """The instruction was executed: :func:`fix_up` is next."""
    UNMOVED = "unmoved"
    """Nothing was executed. The stub does that once in some 500 steps: step again."""
    PARTIAL = "partial"
    """One iteration of a repeated string instruction was executed, and there are more: step again."""
    FAULTED = "faulted"
    """The instruction raised an exception, and the CPU is at its handler: :func:`fix_up_fault` is next."""


def fix_up(
    insn: Insn, slot: VirtAddr, before: Mapping[str, int], after: Mapping[str, int], read_stack: ReadStack
) -> StepFixup:
    """What to correct after the copy of *insn* at *slot* was stepped.

    *before* and *after* hold the registers by hardware name (``rax`` ... ``r15``, ``rip``, ``eflags``).

    :raises StepError: a call did not leave its return address on the stack.
    """
    match _family(insn):
        case Family.NOP | Family.PLAIN | Family.RIP_RELATIVE | Family.REPEATED:
            return StepFixup(_original_ip(insn, slot, after))
        case Family.JCC | Family.JMP | Family.LOOP:
            return StepFixup(_original_ip(insn, slot, after))
        case Family.PUSH_FLAGS:
            return StepFixup(_original_ip(insn, slot, after), _pushed_flags(insn, after, read_stack))
        case Family.CALL_REL:
            return StepFixup(_original_ip(insn, slot, after), _return_address(insn, slot, after, read_stack))
        case Family.CALL_INDIRECT:
            return StepFixup({}, _return_address(insn, slot, after, read_stack))
        case Family.JMP_INDIRECT | Family.RET:
            return StepFixup({})


def outcome(
    insn: Insn,
    slot: VirtAddr,
    before: Mapping[str, int],
    after: Mapping[str, int],
    is_exception_entry: Callable[[int], bool],
) -> StepOutcome:
    """What a single step of the copy of *insn* at *slot* came to.

    *before* is how the step began: of a repeated instruction not the first one, but the last.

    :raises StepError: RIP is neither where the instruction leads, nor at the slot, nor at an exception's entry.
    """
    rip = after["rip"]
    if not stepped(insn, slot, before, after):
        return StepOutcome.PARTIAL if is_repeating(insn, slot, before, after) else StepOutcome.UNMOVED
    family = _family(insn)
    if family in (Family.CALL_INDIRECT, Family.JMP_INDIRECT, Family.RET):
        # Where it leads is anybody's guess, also into an exception's entry; how far it moves RSP is not.
        if after["rsp"] == before["rsp"] + _stack_effect(insn, family) & _MASK:
            return StepOutcome.DONE
    elif rip in _destinations(insn, slot):
        return StepOutcome.DONE
    if is_exception_entry(rip):
        return StepOutcome.FAULTED
    raise StepError(
        f"stepping {insn} of {insn.addr:#x} in the slot at {slot:#x} led to {rip:#x}",
        "the instruction cannot have gone there; please report it with the output of 'kprobe plan' for the address",
    )


def stepped(insn: Insn, slot: VirtAddr, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether the instruction is through: executed to its end, or in an exception."""
    return after["rip"] != slot or _executed_onto_itself(insn, before, after)


def is_repeating(insn: Insn, slot: VirtAddr, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether the step executed one iteration of a repeated string instruction and left others to do.

    Each iteration counts RCX down, so that this is never an unmoved step (:data:`StepOutcome.UNMOVED`).
    """
    return _family(insn) is Family.REPEATED and after["rip"] == slot and after["rcx"] != before["rcx"]


def most_steps(insn: Insn, before: Mapping[str, int]) -> int:
    """How many steps the instruction takes at the most, those left out that come back unmoved."""
    if _family(insn) is not Family.REPEATED:
        return 1
    # Whether the one that finds the count at 0 is a step of its own depends on QEMU's version.
    return (before["rcx"] & (0xFFFF_FFFF if 0x67 in insn.prefixes else _MASK)) + 1


def fix_up_fault(insn: Insn, slot: VirtAddr, after: Mapping[str, int], read_stack: ReadStack) -> StepFixup:
    """Make the exception frame on the stack name the original instruction instead of its copy.

    The frame starts with RIP, or with an error code and RIP. With the guest's own trap flag set, the exception is #DB
    and comes behind the instruction, wherever that has led.

    :raises StepError: neither of the two words is an address that the copy can have caused.
    """
    rsp = after["rsp"]
    for position in (0, 8):
        at = rsp + position & _MASK
        saved = int.from_bytes(read_stack(at, 8), "little")
        if slot <= saved <= slot + insn.length:
            return StepFixup({}, ((at, _qword(saved - slot + insn.addr)),))
    saved, flags, interrupted_rsp = (int.from_bytes(read_stack(rsp + at & _MASK, 8), "little") for at in (0, 16, 24))
    if flags & _TF and insn.is_branch:
        memory: tuple[tuple[int, bytes], ...] = ()
        if insn.branch_target is not None:
            memory = ((rsp, _qword(saved - slot + insn.addr)),)
        if insn.is_call:
            memory += _return_address(insn, slot, {"rsp": interrupted_rsp}, read_stack)
        return StepFixup({}, memory)
    raise StepError(f"the exception raised by {insn} in the slot at {slot:#x} left no frame that names the slot")


def overrun(insn: Insn, slot: VirtAddr, after: Mapping[str, int], read_stack: ReadStack) -> StepFixup | None:
    """The fix-up of a step that has gone on to the int3 behind the copy, or ``None`` when this one has not.

    To be asked when *after* is at the #BP entry. Where QEMU must leave its loop to execute an instruction (``pause``;
    with several vCPUs a locked one whose operand is not aligned), it forgets that one step was asked for and executes
    the next instruction as well. The instruction is through then.
    """
    rip, _, flags, rsp = (int.from_bytes(read_stack(after["rsp"] + at & _MASK, 8), "little") for at in (0, 8, 16, 24))
    if insn.is_branch or rip != slot + insn.length + 1:
        return None
    return StepFixup({"rip": insn.end, "rsp": rsp, "eflags": flags})


def _family(insn: Insn) -> Family:
    family = classify(insn)
    assert isinstance(family, Family), "an instruction without a family is never copied to a slot"
    return family


def _original_ip(insn: Insn, slot: VirtAddr, after: Mapping[str, int]) -> dict[str, int]:
    return {"rip": after["rip"] + insn.addr - slot & _MASK}


def _pushed_flags(insn: Insn, after: Mapping[str, int], read_stack: ReadStack) -> tuple[tuple[int, bytes], ...]:
    """What ``pushf`` must have pushed as TF and IF: it changes neither, so that the processor still has them."""
    size = 2 if 0x66 in insn.prefixes and not insn.rex & 8 else 8
    pushed = int.from_bytes(read_stack(after["rsp"], size), "little")
    right = pushed & ~_TF_AND_IF | after["eflags"] & _TF_AND_IF
    return () if pushed == right else ((after["rsp"], right.to_bytes(size, "little")),)


def _return_address(
    insn: Insn, slot: VirtAddr, after: Mapping[str, int], read_stack: ReadStack
) -> tuple[tuple[int, bytes], ...]:
    rsp = after["rsp"]
    found = int.from_bytes(read_stack(rsp, 8), "little")
    expected = slot + insn.length & _MASK
    if found == insn.end:
        return ()  # put right already, by a fix-up that was cut off
    if found != expected:
        raise StepError(f"after {insn} in the slot at {slot:#x} the stack holds {found:#x}, not {expected:#x}")
    return ((rsp, _qword(insn.end)),)


def _destinations(insn: Insn, slot: VirtAddr) -> tuple[int, ...]:
    """Where a step of the copy can end if the instruction does not load RIP from a register or memory."""
    following = slot + insn.length & _MASK
    target = insn.branch_target
    if target is None:
        return (following,)
    astray = target + slot - insn.addr & _MASK
    return (following, astray) if insn.is_jcc or insn.is_loop else (astray,)


def _executed_onto_itself(insn: Insn, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """A branch whose target is itself ends where it began; ``loop`` has then counted, the others change nothing."""
    if insn.branch_target != insn.addr:
        return False
    if insn.is_relative_call:
        return after["rsp"] != before["rsp"]
    counts = insn.is_loop and insn.opcode != 0xE3  # all but jrcxz
    return not counts or after["rcx"] != before["rcx"]


def _stack_effect(insn: Insn, family: Family) -> int:
    if family is Family.CALL_INDIRECT:
        return -8
    if family is Family.JMP_INDIRECT:
        return 0
    released = insn.immediate or 0
    return 8 + (released & 0xFFFF)


def _qword(value: int) -> bytes:
    return (value & _MASK).to_bytes(8, "little")
