"""Choose the rung of a probe and prepare everything for it, without touching the guest.

A plan keeps the reason why each better rung was refused. Printed, it is the dry run (``kprobe plan``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, assert_never

from gdb_kprobe.errors import KprobeError, RefusedError
from gdb_kprobe.kprobes.detour import Detour
from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal
from gdb_kprobe.kprobes.landing import landing_pad
from gdb_kprobe.kprobes.patch import CodePatch, over
from gdb_kprobe.kprobes.slots import INT3, Slot, SlotAllocator, in_reach
from gdb_kprobe.model import AddressRange, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.x86 import families, relocate
from gdb_kprobe.x86.assemble import DisplacementError
from gdb_kprobe.x86.decode import Insn


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rung's rules need to know about the probe point, beyond the instruction.

    *needs_post*: the instruction is to be stepped, in a copy of its own (:func:`steps_alone`).
    *kernel_boost*: only what a kernel with these rules boosts may be boosted; ``None``: all that can be relocated.
    *detour*: what would be out of line for a jump, or why there can be none.
    """

    in_extable: bool = False
    needs_post: bool = False
    rungs: tuple[Rung, ...] = (Rung.SINGLE_STEP, Rung.BOOSTED)
    kernel_boost: Rules | None = None
    detour: Detour | Refusal | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A probe, ready to arm: the slot's image first, then the patch of the text.

    *detour* is set exactly on the optimized rung, *step_copy*, what the slot holds and how a step of it is put right,
    exactly on the single-step one (the kernel's ``ainsn``).
    """

    insn: Insn
    family: families.Family
    rung: Rung
    slot: Slot
    code: bytes
    patch: CodePatch
    declined: tuple[tuple[Rung, Refusal], ...]
    detour: Detour | None = None
    step_copy: relocate.StepCopy | None = None

    @property
    def slot_image(self) -> bytes:
        return self.slot.image(self.insn.addr, self.code)

    @property
    def first(self) -> AddressRange:
        """Where the code is that does what the instruction does; not of the single-step rung."""
        if self.detour is None:
            return AddressRange(self.slot.code, self.slot.end)
        return self.detour.code(self.slot.code).displaced.first

    def behind_first(self, rip: VirtAddr) -> VirtAddr:
        """The address in the text that *rip*, where a vCPU comes to behind :attr:`first`, stands for."""
        if self.detour is None:
            return rip
        return self.detour.code(self.slot.code).displaced.at(rip) or rip

    @property
    def not_optimized(self) -> Refusal | None:
        """Why it is not on the optimized rung."""
        return next((refusal for rung, refusal in self.declined if rung is Rung.OPTIMIZED), None)


def can_handle(insn: Insn) -> families.Family | Refusal:
    """Whether any rung can execute *insn* out of line."""
    family = landing_pad(insn) or families.classify(insn)
    if isinstance(family, families.Unhandled):
        return Refusal(family.reason, insn.addr, f"{insn}: {family.detail}")
    return family


def steps_alone(insn: Insn) -> bool:
    """Whether a post-handler needs *insn* in a copy of its own, for a step of relocated code is not what it sees.

    Others are stepped where they were relocated to. A repeated one may have more iterations than are stepped at one
    hit, and is executed again then; what pushes the flags may push the step's own trap flag. (A step of what halts does
    not come back: it is refused there.)
    """
    return insn.is_halt or families.classify(insn) in (families.Family.REPEATED, families.Family.PUSH_FLAGS)


def can_boost(insn: Insn, facts: Facts) -> Refusal | None:
    """The rules of the boosted rung.

    Unlike the kernel's ``can_boost`` it does not depend on the opcode: code is relocated, not copied. (Unless the
    kernel's rules are asked for.)
    """
    if Rung.BOOSTED not in facts.rungs:
        return Refusal(Reason.POLICY, insn.addr, "the allowed rungs do not include boosted")
    if facts.needs_post:
        return Refusal(
            Reason.NEEDS_SINGLE_STEP, insn.addr, "a post-handler needs it in a copy of its own, that is stepped"
        )
    if facts.in_extable:
        return Refusal(Reason.EX_TABLE, insn.addr, "a fault must be seen at the original address")
    if facts.kernel_boost is not None:
        why = boost_refusal(insn, facts.kernel_boost, in_extable=facts.in_extable)
        if why is not None:
            return Refusal(Reason.KERNEL_BOOST, insn.addr, why, "policy.boost: relocate in the profile boosts it")
    return None


def can_single_step(insn: Insn, facts: Facts) -> Refusal | None:
    """The rules of the single-step rung."""
    if Rung.SINGLE_STEP not in facts.rungs:
        return Refusal(Reason.POLICY, insn.addr, "the allowed rungs do not include single-step")
    if insn.is_halt:
        return Refusal(Reason.HALTS, insn.addr, f"{insn} at {insn.addr:#x}")
    return None


def can_jump(insn: Insn, facts: Facts) -> Refusal | None:
    """The rules of the optimized rung; those of the window are in :mod:`gdb_kprobe.kprobes.window`."""
    if Rung.OPTIMIZED not in facts.rungs or facts.detour is None:
        return Refusal(Reason.POLICY, insn.addr, "the allowed rungs do not include optimized")
    if facts.needs_post:
        return Refusal(
            Reason.NEEDS_SINGLE_STEP, insn.addr, "a post-handler needs it in a copy of its own, that is stepped"
        )
    return facts.detour if isinstance(facts.detour, Refusal) else None


@dataclass(frozen=True, slots=True)
class Trial:
    """What one rung would be: why not, or the code that would be in the slot, for the address *at*."""

    rung: Rung
    refusal: Refusal | None
    at: VirtAddr | None = None
    code: bytes = b""


def try_rungs(insn: Insn, facts: Facts, slots: SlotAllocator) -> tuple[Trial, ...]:
    """Every rung's answer for *insn*, the best rung first; no slot is kept. *insn* is one that can be handled."""
    trials: list[Trial] = []
    for rung in reversed(Rung):
        refusal = _check(rung, insn, facts)
        prepared = _prepare(rung, insn, facts, slots) if refusal is None else refusal
        if isinstance(prepared, Refusal):
            trials.append(Trial(rung, prepared))
        else:
            slots.discard(prepared.slot)
            trials.append(Trial(rung, None, prepared.slot.code, prepared.code))
    return tuple(trials)


def make_plan(insn: Insn, facts: Facts, slots: SlotAllocator) -> Plan:
    """Plan *insn*'s probe at the best rung that the rules allow; the slot is taken from *slots*.

    :raises RefusedError: no rung is possible; the refusal is that of the instruction, or of the last rung that the
        policy allows.
    """
    family = can_handle(insn)
    if isinstance(family, Refusal):
        raise RefusedError(f"cannot probe {insn.addr:#x}", family)
    declined: list[tuple[Rung, Refusal]] = []
    for rung in reversed(Rung):
        refusal = _check(rung, insn, facts)
        if refusal is None:
            prepared = _prepare(rung, insn, facts, slots)
            if not isinstance(prepared, Refusal):
                slot, code, patch, detour, copy = prepared
                return Plan(insn, family, rung, slot, code, patch, tuple(declined), detour, copy)
            refusal = prepared
        declined.append((rung, refusal))
    told = next((refusal for _, refusal in reversed(declined) if refusal.reason is not Reason.POLICY), declined[-1][1])
    raise RefusedError(f"cannot probe {insn.addr:#x}", told)


class _Prepared(NamedTuple):
    slot: Slot
    code: bytes
    patch: CodePatch
    detour: Detour | None
    copy: relocate.StepCopy | None = None


def _check(rung: Rung, insn: Insn, facts: Facts) -> Refusal | None:
    match rung:
        case Rung.BOOSTED:
            return can_boost(insn, facts)
        case Rung.SINGLE_STEP:
            return can_single_step(insn, facts)
        case Rung.OPTIMIZED:
            return can_jump(insn, facts)
        case _:
            assert_never(rung)


def _prepare(rung: Rung, insn: Insn, facts: Facts, slots: SlotAllocator) -> _Prepared | Refusal:
    try:
        if rung is Rung.OPTIMIZED:
            assert isinstance(facts.detour, Detour), "it was checked"
            return _prepare_detour(facts.detour, slots)
        return _prepare_slot(rung, insn, slots)
    except relocate.RelocateError as error:
        return Refusal(error.reason, insn.addr, error.detail)
    except DisplacementError as error:
        return Refusal(Reason.OUT_OF_REACH, insn.addr, error.message)


def _prepare_slot(rung: Rung, insn: Insn, slots: SlotAllocator) -> _Prepared | Refusal:
    boosted = rung is Rung.BOOSTED
    size = relocate.relocated_size(insn) if boosted else relocate.step_copy_size(insn)
    slot = _allocate(size, AddressRange(insn.addr, insn.end), slots)
    if isinstance(slot, Refusal):
        return slot
    try:
        copy = None if boosted else relocate.copy_for_step(insn, slot.code)
        code = relocate.relocate(insn, slot.code) if copy is None else copy.code
    except relocate.RelocateError:
        slots.discard(slot)
        raise
    return _Prepared(slot, code, over(insn.addr, insn.raw, INT3), None, copy)


def _prepare_detour(detour: Detour, slots: SlotAllocator) -> _Prepared | Refusal:
    # Its size does not depend on where it is; its bytes do, and most often they are right at once.
    at = slots.likely if in_reach(slots.area, detour.window.range) else detour.window.end
    code = detour.emit(at)
    slot = _allocate(len(code), detour.window.range, slots)
    if isinstance(slot, Refusal):
        return slot
    try:
        if slot.code != at:
            code = detour.emit(slot.code)
        return _Prepared(slot, code, detour.patch(slot.code), detour)
    except KprobeError:
        slots.discard(slot)
        raise


def _allocate(size: int, near: AddressRange, slots: SlotAllocator) -> Slot | Refusal:
    slot = slots.allocate(size, near)
    if slot is None and not in_reach(slots.area, near):
        return Refusal(
            Reason.OUT_OF_REACH,
            near.start,
            f"the region's code is at {slots.area}",
            "place the region within 2 GiB of the text (region.virtual in the profile)",
        )
    if slot is None:
        return Refusal(
            Reason.REGION_FULL,
            near.start,
            f"no slot of {size} bytes in reach ({slots.used} of {slots.area.size} bytes in use)",
            "reserve a larger region (region.size in the profile), or delete probes",
        )
    return slot
