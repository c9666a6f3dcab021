"""Choose the rung of a probe and prepare everything for it, without touching the guest.

A plan keeps the reason why each better rung was refused. Printed, it is the dry run (``kprobe plan``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.slots import INT3, Slot, SlotAllocator, in_reach
from gdb_kprobe.model import AddressRange, Reason, Refusal, Rung, VirtAddr, offset
from gdb_kprobe.x86 import families, relocate
from gdb_kprobe.x86.decode import Insn


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rung's rules need to know about the probe point, beyond the instruction.

    *kernel_boost*: only what a kernel with these rules boosts may be boosted; ``None``: all that can be relocated.
    """

    in_extable: bool = False
    needs_post: bool = False
    rungs: tuple[Rung, ...] = (Rung.SINGLE_STEP, Rung.BOOSTED)
    kernel_boost: Rules | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A probe, ready to arm: the slot's image first, then the patch of the text."""

    insn: Insn
    family: families.Family
    rung: Rung
    slot: Slot
    code: bytes
    patch: CodePatch
    declined: tuple[tuple[Rung, Refusal], ...]

    @property
    def slot_image(self) -> bytes:
        return self.slot.image(self.insn.addr, self.code)


def can_handle(insn: Insn) -> families.Family | Refusal:
    """Whether any rung can execute *insn* out of line."""
    family = families.classify(insn)
    if isinstance(family, families.Unhandled):
        return Refusal(family.reason, insn.addr, f"{insn}: {family.detail}")
    return family


def can_boost(insn: Insn, facts: Facts) -> Refusal | None:
    """The rules of the boosted rung.

    Unlike the kernel's ``can_boost`` it does not depend on the opcode: code is relocated, not copied. (Unless the
    kernel's rules are asked for.)
    """
    if Rung.BOOSTED not in facts.rungs:
        return Refusal(Reason.POLICY, insn.addr, "the allowed rungs do not include boosted")
    if facts.needs_post:
        return Refusal(Reason.NEEDS_SINGLE_STEP, insn.addr, "it must regain control right after the instruction")
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


def can_optimize(insn: Insn) -> Refusal:
    """The rules of the optimized rung."""
    return Refusal(Reason.NOT_IMPLEMENTED, insn.addr, "jump optimization comes with compiled handlers")


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
        prepared = _prepare(rung, insn, slots) if refusal is None else refusal
        if isinstance(prepared, Refusal):
            trials.append(Trial(rung, prepared))
        else:
            slot, code = prepared
            slots.discard(slot)
            trials.append(Trial(rung, None, slot.code, code))
    return tuple(trials)


def make_plan(insn: Insn, facts: Facts, slots: SlotAllocator) -> Plan:
    """Plan *insn*'s probe at the best rung that the rules allow; the slot is taken from *slots*.

    :raises RefusedError: no rung is possible; the refusal is that of the instruction, or of the last rung that the
        policy allows.
    """
    family = can_handle(insn)
    if isinstance(family, Refusal):
        raise RefusedError(f"cannot probe {insn.addr:#x}", family)
    declined: list[tuple[Rung, Refusal]] = [(Rung.OPTIMIZED, can_optimize(insn))]
    for rung in (Rung.BOOSTED, Rung.SINGLE_STEP):
        refusal = _check(rung, insn, facts)
        if refusal is None:
            prepared = _prepare(rung, insn, slots)
            if not isinstance(prepared, Refusal):
                slot, code = prepared
                patch = CodePatch(insn.addr, insn.raw[:1], INT3)
                return Plan(insn, family, rung, slot, code, patch, tuple(declined))
            refusal = prepared
        declined.append((rung, refusal))
    ruled_out = (Reason.NOT_IMPLEMENTED, Reason.POLICY)
    told = next((refusal for _, refusal in reversed(declined) if refusal.reason not in ruled_out), declined[-1][1])
    raise RefusedError(f"cannot probe {insn.addr:#x}", told)


def _check(rung: Rung, insn: Insn, facts: Facts) -> Refusal | None:
    match rung:
        case Rung.BOOSTED:
            return can_boost(insn, facts)
        case Rung.SINGLE_STEP:
            return can_single_step(insn, facts)
        case Rung.OPTIMIZED:
            return can_optimize(insn)
        case _:
            assert_never(rung)


def _prepare(rung: Rung, insn: Insn, slots: SlotAllocator) -> tuple[Slot, bytes] | Refusal:
    size = relocate.relocated_size(insn) if rung is Rung.BOOSTED else insn.length
    near = AddressRange(insn.addr, offset(insn.addr, insn.length))
    slot = slots.allocate(size, near)
    if slot is None and not in_reach(slots.area, near):
        return Refusal(
            Reason.OUT_OF_REACH,
            insn.addr,
            f"the region's code is at {slots.area}",
            "place the region within 2 GiB of the text (region.virtual in the profile)",
        )
    if slot is None:
        return Refusal(
            Reason.REGION_FULL,
            insn.addr,
            f"no slot of {size} bytes in reach ({slots.used} of {slots.area.size} bytes in use)",
            "reserve a larger region (region.size in the profile), or delete probes",
        )
    make = relocate.relocate if rung is Rung.BOOSTED else relocate.copy_for_step
    try:
        return slot, make(insn, slot.code)
    except relocate.RelocateError as error:
        slots.discard(slot)
        return Refusal(error.reason, insn.addr, error.detail)
