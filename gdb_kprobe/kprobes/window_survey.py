"""How much of the text gets a jump, by our rules and by the kernel's. Pure: bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gdb_kprobe.kprobes.forms import Forms
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.padding import begins_padding
from gdb_kprobe.kprobes.survey import Piece
from gdb_kprobe.kprobes.window import Function, Window, can_optimize, kernel_optimizes, read_function
from gdb_kprobe.linux.branch_targets import CodeReferences
from gdb_kprobe.model import AddressRange, Reason
from gdb_kprobe.x86.shadow import parted


@dataclass
class WindowSurvey:
    """Of the instructions that can be probed, how many are *optimized*, and why the others are *refused*.

    *borrowed* of the optimized need a nop of the guest's ftrace. *entries* are the first instructions of functions,
    *entries_refused* why some of them get no jump (also those that cannot be probed at all, but for forbidden text).
    """

    optimized: int = 0
    single: int = 0
    borrowed: int = 0
    kernel: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    entries: int = 0
    entries_refused: Counter[Reason] = field(default_factory=Counter)

    @property
    def probeable(self) -> int:
        return self.optimized + self.refused.total()


class WindowSurveyor:
    """Counts pieces into :attr:`survey`.

    :param area: where the detours are, or may be.
    :param rules: the rules of the guest's kernel, to compare.
    """

    def __init__(self, references: CodeReferences, area: AddressRange, rules: Rules) -> None:
        self.survey = WindowSurvey()
        self._references = references
        self._area = area
        self._rules = rules
        self._forms = Forms()

    def count(self, piece: Piece) -> None:
        """Count all instructions of *piece* that can be probed."""
        if piece.rule is not None:
            return
        survey = self.survey
        function = read_function(piece, self._forms)
        probeable = probeable_of(function)
        for index in probeable:
            verdict = can_optimize(function, index, self._references, self._area)
            if isinstance(verdict, Window):
                survey.optimized += 1
                survey.single += not verdict.interior
                survey.borrowed += verdict.borrowed
            else:
                survey.refused[verdict.reason] += 1
            survey.kernel += kernel_optimizes(function, index, self._references, self._rules)
            if index == 0:
                survey.entries += 1
                if not isinstance(verdict, Window):
                    survey.entries_refused[verdict.reason] += 1
        if function.addrs and 0 not in probeable and not function.forms[0].is_fill:
            survey.entries += 1
            survey.entries_refused[_entry_reason(function)] += 1


def _entry_reason(function: Function) -> Reason:
    first, length = function.addrs[0], function.forms[0].length
    for _, reason in function.sites_in(first, first + length):
        return reason
    refused = function.forms[0].refused
    return Reason.INTERRUPT_SHADOW if refused is None else refused.reason


def probeable_of(function: Function) -> list[int]:
    """The indexes of the instructions that a probe can be put on, by the rules of the survey of all text."""
    addrs, forms = function.addrs, function.forms
    end = len(forms)
    if function.is_whole:
        first = end
        while first and forms[first - 1].is_fill:
            first -= 1
        before = forms[first - 1].insn if first else None
        if first < end and begins_padding(before, forms[first].insn):
            end = first
    found = []
    for index in range(end):
        form = forms[index]
        if form.refused is not None:
            continue
        addr = addrs[index]
        if any(True for _ in function.sites_in(addr, addr + form.length)):
            continue
        previous = forms[index - 1] if index else None
        if previous is not None and previous.masks and parted(None, previous.insn, form.insn):
            continue
        if form.masks and index + 1 < len(forms) and parted(None, form.insn, forms[index + 1].insn):
            continue
        found.append(index)
    return found
