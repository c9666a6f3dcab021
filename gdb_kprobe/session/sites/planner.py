"""May this place be probed, and how: the rules, asked of the guest as it is now. Nothing is written."""

from __future__ import annotations

from dataclasses import replace

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.detour import Flags
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.plan import (
    Facts,
    Plan,
    can_boost,
    can_handle,
    can_jump,
    can_single_step,
    make_plan,
    steps_alone,
)
from gdb_kprobe.kprobes.slots import SlotAllocator
from gdb_kprobe.model import Boost, Reason, Refusal, Rung
from gdb_kprobe.session.sites.windows import JumpRequest, Windows
from gdb_kprobe.x86.decode import Insn

_ANOTHER_PLACE_HELPS = frozenset(Reason) - {
    Reason.NO_SYMBOL,
    Reason.AMBIGUOUS_SYMBOL,
    Reason.OFFSET_OUTSIDE_SYMBOL,
    Reason.NOT_TEXT,
    Reason.NOT_EXECUTABLE,
    Reason.INIT_TEXT,
    Reason.OUT_OF_REACH,
    Reason.POLICY,
    Reason.NEEDS_SINGLE_STEP,
    Reason.REGION_FULL,
}
"""Reasons for which the hint is the nearest instruction that can be probed."""


ANY_WINDOW = JumpRequest(Action())


class Planner:
    """Makes plans for the text of *guest*, of which *text* knows what is ours; slots are taken from *slots*."""

    def __init__(
        self,
        guest: Guest,
        text: TextMap,
        slots: SlotAllocator,
        rungs: tuple[Rung, ...],
        boost: Boost = Boost.RELOCATE,
    ) -> None:
        self._guest = guest
        self._text = text
        self._slots = slots
        self._rungs = rungs
        self._kernel_boost: Rules | None = guest.boost_rules if boost is Boost.KERNEL else None
        self._windows = Windows(guest, text, slots.area)

    def plan(
        self,
        place: Place,
        *,
        needs_post: bool = False,
        strategy: Rung | None = None,
        request: JumpRequest | Refusal = ANY_WINDOW,
    ) -> Plan:
        """Plan a probe at *place*; *strategy* is the one rung to use, if that is wanted.

        *request* is the jump that is wanted, or why there must be none.

        :raises RefusedError: a rule says no; the hint names the nearest instruction where none does.
        """
        early = self._check_mapped(place)
        function = FunctionText(self._guest, self._text, place)
        try:
            insn = self._probeable_insn(function, early)
            facts = self.facts(function, insn, needs_post=needs_post, strategy=strategy, request=request)
            return make_plan(insn, facts, self._slots)
        except RefusedError as error:
            refusal = error.refusal
            if refusal.reason not in _ANOTHER_PLACE_HELPS:
                raise
            hint = self._nearest(function, needs_post, strategy)
            raise RefusedError(f"cannot probe {place}", replace(refusal, hint=hint)) from error

    def facts(
        self,
        function: FunctionText,
        insn: Insn,
        *,
        needs_post: bool = False,
        strategy: Rung | None = None,
        request: JumpRequest | Refusal = ANY_WINDOW,
    ) -> Facts:
        """What the rungs' rules need to know of the place of *insn*, which is of *function*."""
        facts = self._plain_facts(insn, needs_post, strategy)
        if Rung.OPTIMIZED not in facts.rungs or facts.needs_post:
            return facts
        detour = request if isinstance(request, Refusal) else self._windows.detour(function, insn, request)
        return replace(facts, detour=detour)

    def steps_alone(self, insn: Insn) -> bool:
        """Whether a post-handler has *insn* single-stepped in a copy of its own, and so on the single-step rung.

        Also where nothing is to be stepped: then it is refused there.
        """
        return Rung.SINGLE_STEP not in self._rungs or steps_alone(insn)

    def flags_under(self, place: Place) -> tuple[Flags, bool]:
        """How the detour of our jump at *place* saves the flags, and whether they are dead there.

        A kprobe of the guest's is on it.
        """
        return self._windows.flags_under(FunctionText(self._guest, self._text, place), place.addr)

    def _plain_facts(self, insn: Insn, needs_post: bool, strategy: Rung | None) -> Facts:
        rungs = tuple(rung for rung in self._rungs if strategy in (None, rung))
        alone = needs_post and self.steps_alone(insn)
        return Facts(self._guest.fixup_of(insn.addr) is not None, alone, rungs, self._kernel_boost)

    def _check_mapped(self, place: Place) -> Refusal | None:
        """What the guest says of the place's first byte.

        :raises RefusedError: there is no code at all.
        """
        early = self._guest.refusal_at(place, 1)
        if early is not None and early.reason not in _ANOTHER_PLACE_HELPS:
            raise RefusedError(f"cannot probe {place}", early)
        found = self._guest.memory.walk(place.addr)
        if found is None or not found.executable:
            state = "is not mapped" if found is None else "is mapped, but not executable"
            refusal = Refusal(Reason.NOT_EXECUTABLE, place.addr, f"{place.addr:#x} {state}", "probe another function")
            raise RefusedError(f"cannot probe {place}", refusal)
        return early

    def _probeable_insn(self, function: FunctionText, refusal: Refusal | None) -> Insn:
        """The kernel's ``can_probe``: decode from the function's start; the address must be a boundary.

        :param refusal: what the guest says of the place's first byte.
        :raises RefusedError: it is not one, or the place is forbidden.
        """
        place = function.place
        if refusal is None:
            insns = function.up_to(place.addr)
            index = next((index for index in range(len(insns) - 1, -1, -1) if insns[index].addr == place.addr), None)
            if index is not None:
                refusal = function.refusal(index)
                if refusal is None:
                    return insns[index]
            else:
                refusal = self._no_boundary(function, insns)
        raise RefusedError(f"cannot probe {place}", refusal)

    def _no_boundary(self, function: FunctionText, insns: list[Insn]) -> Refusal:
        addr = function.place.addr
        if function.error is not None:
            return Refusal(Reason.UNDECODABLE, function.error.addr, function.error.detail)
        around = next((insn for insn in reversed(insns) if insn.addr < addr < insn.end), None)
        if around is None:
            return Refusal(Reason.NOT_A_BOUNDARY, addr, "it is behind the function's last one")
        before, after = self._guest.place_of(around.addr), self._guest.place_of(around.end)
        return Refusal(
            Reason.NOT_A_BOUNDARY,
            addr,
            f"it is inside the instruction at {before}; the nearest boundaries are {before} and {after}",
        )

    def _nearest(self, function: FunctionText, needs_post: bool, strategy: Rung | None) -> str:
        """The hint that names the instruction nearest to the place that can be probed."""
        place = function.place
        if place.symbol is None:
            return "no function is known there: choose another place"
        insns = function.whole()
        order = sorted(range(len(insns)), key=lambda index: abs(insns[index].addr - place.addr))
        for index in order:
            insn = insns[index]
            if function.refusal(index) is None and self._has_rung(function, insn, needs_post, strategy):
                return f"the nearest instruction that can be probed is {self._guest.place_of(insn.addr)}"
        return f"no instruction of {place.symbol} can be probed: choose another function"

    def _has_rung(self, function: FunctionText, insn: Insn, needs_post: bool, strategy: Rung | None) -> bool:
        if isinstance(can_handle(insn), Refusal):
            return False
        facts = self._plain_facts(insn, needs_post, strategy)
        if can_boost(insn, facts) is None or can_single_step(insn, facts) is None:
            return True
        # Last, for its window is more work to find.
        facts = self.facts(function, insn, needs_post=needs_post, strategy=strategy)
        return can_jump(insn, facts) is None
