"""What has to be put right after the copy of an instruction was single-stepped in its slot.

The copy is :func:`gdb_kprobe.x86.relocate.copy_for_step`'s: wherever a step of it ends, a vCPU that is left alone there
goes on right. This takes it to where the original would have left it, with no address of the slot on its stack.

The rules are the kernel's ``resume_execution`` (arch/x86/kernel/kprobes/core.c before v5.13). The step is made by QEMU,
which holds interrupts off without touching IF and shows no trap flag, neither in the registers nor in what the
instruction pushes (:mod:`gdb_kprobe.target.stub`); so ``popf``, ``cli``, ``sti`` and ``mov ss`` need nothing, and
``pushf`` is only checked.

A step of a repeated string instruction executes one iteration and stays in the slot. Wherever that ends, at an
exception or because the stepper makes no more of them, the registers say what is left to do, and the original address
is where to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, classify
from gdb_kprobe.x86.relocate import StepCopy

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


def fix_up(copy: StepCopy, after: Mapping[str, int], read_stack: ReadStack) -> StepFixup:
    """What to correct after *copy* was stepped.

    *after* holds the registers by hardware name (``rax`` ... ``r15``, ``rip``, ``eflags``).

    :raises StepError: a call did not leave its return address on the stack.
    """
    match _family(copy.insn):
        case Family.NOP | Family.PLAIN | Family.RIP_RELATIVE | Family.REPEATED | Family.JCC | Family.JMP | Family.LOOP:
            return StepFixup(_original_ip(copy, after))
        case Family.PUSH_FLAGS:
            return StepFixup(_original_ip(copy, after), _pushed_flags(copy.insn, after, read_stack))
        case Family.CALL_REL | Family.CALL_INDIRECT:
            return StepFixup({}, _return_address(copy, after["rsp"], read_stack))
        case Family.JMP_INDIRECT | Family.RET:
            return StepFixup({})


def outcome(
    copy: StepCopy,
    before: Mapping[str, int],
    after: Mapping[str, int],
    is_exception_entry: Callable[[int], bool],
) -> StepOutcome:
    """What a single step of *copy* came to.

    *before* is how the step began: of a repeated instruction not the first one, but the last.

    :raises StepError: RIP is neither where the instruction leads, nor at the slot, nor at an exception's entry.
    """
    rip, insn = after["rip"], copy.insn
    if not stepped(copy, after):
        return StepOutcome.PARTIAL if is_repeating(copy, before, after) else StepOutcome.UNMOVED
    if copy.original_end(rip) is not None:
        return StepOutcome.DONE
    # Where it leads is not known, also into an exception's entry; how far it moves RSP is not.
    if not copy.ends and after["rsp"] == before["rsp"] + _stack_effect(insn) & _MASK:
        return StepOutcome.DONE
    if is_exception_entry(rip):
        return StepOutcome.FAULTED
    raise StepError(
        f"stepping {insn} of {insn.addr:#x} in the slot at {copy.slot:#x} led to {rip:#x}",
        "the instruction cannot have gone there; please report it with the output of 'kprobe plan' for the address",
    )


def stepped(copy: StepCopy, after: Mapping[str, int]) -> bool:
    """Whether the instruction is through: executed to its end, or in an exception."""
    return after["rip"] != copy.slot


def is_repeating(copy: StepCopy, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether the step executed one iteration of a repeated string instruction and left others to do.

    Each iteration counts RCX down, so that this is never an unmoved step (:data:`StepOutcome.UNMOVED`).
    """
    return _family(copy.insn) is Family.REPEATED and after["rip"] == copy.slot and after["rcx"] != before["rcx"]


def most_steps(insn: Insn, before: Mapping[str, int]) -> int:
    """How many steps the instruction takes at the most, those left out that come back unmoved."""
    if _family(insn) is not Family.REPEATED:
        return 1
    # Whether the one that finds the count at 0 is a step of its own depends on QEMU's version.
    return (before["rcx"] & (0xFFFF_FFFF if 0x67 in insn.prefixes else _MASK)) + 1


def fix_up_fault(copy: StepCopy, after: Mapping[str, int], read_stack: ReadStack) -> StepFixup:
    """Make the exception frame on the stack name the original instruction instead of its copy.

    The frame starts with RIP, or with an error code and RIP. With the guest's own trap flag set, the exception is #DB
    and comes behind the instruction, wherever that has led.

    :raises StepError: neither of the two words is an address that the copy can have caused.
    """
    insn, rsp = copy.insn, after["rsp"]
    for position in (0, 8):
        at = rsp + position & _MASK
        saved = int.from_bytes(read_stack(at, 8), "little")
        original = insn.addr if saved == copy.slot else copy.original_end(saved)
        if original is not None and saved != original:
            return StepFixup({}, ((at, _qword(original)),))
    flags, interrupted_rsp = (int.from_bytes(read_stack(rsp + at & _MASK, 8), "little") for at in (16, 24))
    if flags & _TF and insn.is_branch:
        return StepFixup({}, _return_address(copy, interrupted_rsp, read_stack) if insn.is_call else ())
    raise StepError(f"the exception raised by {insn} in the slot at {copy.slot:#x} left no frame that names the slot")


def _family(insn: Insn) -> Family:
    family = classify(insn)
    assert isinstance(family, Family), "an instruction without a family is never copied to a slot"
    return family


def _original_ip(copy: StepCopy, after: Mapping[str, int]) -> dict[str, int]:
    original = copy.original_end(after["rip"])
    assert original is not None, "fix_up is for a step that is done"
    return {} if original == after["rip"] else {"rip": original}


def _pushed_flags(insn: Insn, after: Mapping[str, int], read_stack: ReadStack) -> tuple[tuple[int, bytes], ...]:
    """What ``pushf`` must have pushed as TF and IF: it changes neither, so that the processor still has them."""
    size = 2 if 0x66 in insn.prefixes and not insn.rex & 8 else 8
    pushed = int.from_bytes(read_stack(after["rsp"], size), "little")
    right = pushed & ~_TF_AND_IF | after["eflags"] & _TF_AND_IF
    return () if pushed == right else ((after["rsp"], right.to_bytes(size, "little")),)


def _return_address(copy: StepCopy, rsp: int, read_stack: ReadStack) -> tuple[tuple[int, bytes], ...]:
    found = int.from_bytes(read_stack(rsp, 8), "little")
    if found == copy.insn.end:
        return ()  # put right already, by a fix-up that was cut off
    if found != copy.behind:
        what = f"after {copy.insn} in the slot at {copy.slot:#x}"
        raise StepError(f"{what} the stack holds {found:#x}, not {copy.behind:#x}")
    return ((rsp, _qword(copy.insn.end)),)


def _stack_effect(insn: Insn) -> int:
    family = _family(insn)
    if family is Family.CALL_INDIRECT:
        return -8
    if family is Family.JMP_INDIRECT:
        return 0
    released = insn.immediate or 0
    return 8 + (released & 0xFFFF)


def _qword(value: int) -> bytes:
    return (value & _MASK).to_bytes(8, "little")
