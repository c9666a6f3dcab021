"""Every instruction of a piece of text, by the best rung it can have or by the reason why it has none. Pure: bytes.

What the bytes alone decide is found out once for each instruction that is different (:mod:`gdb_kprobe.kprobes.forms`);
what the place decides (sites, padding, neighbours, reach) is put on top.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gdb_kprobe.kprobes.forms import Form, Forms
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.padding import begins_padding
from gdb_kprobe.kprobes.slots import INT3, in_reach, reaches
from gdb_kprobe.model import AddressRange, Reason, Rung, VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.shadow import parted

_ZEROS = b"\0\0"

BY_PLACE: Final = frozenset(
    {
        Reason.NOINSTR,
        Reason.ENTRY_TEXT,
        Reason.JUMP_LABEL,
        Reason.STATIC_CALL,
        Reason.STATIC_CALL_TRAMPOLINE,
        Reason.ALTERNATIVE,
        Reason.GUEST_KPROBE,
        Reason.BUG_TABLE,
        Reason.RAISES_UD,
        Reason.FOREIGN_INT3,
        Reason.PADDING,
    }
)
"""Reasons that nobody can do anything about: text that must not trap, that the guest patches, or that is none."""


@dataclass
class Survey:
    """The counts: each instruction is in exactly one of *rungs* (its best one) and *refused*.

    *not_boosted* says why those of the single-step rung have no better one. *kernel_probes* and *kernel_boosts*: how
    many of those that are not refused the kernel would probe and boost, as far as that is a matter of the instruction
    and of the exception table.
    """

    rungs: Counter[Rung] = field(default_factory=Counter)
    refused: Counter[Reason] = field(default_factory=Counter)
    not_boosted: Counter[Reason] = field(default_factory=Counter)
    kernel_probes: int = 0
    kernel_boosts: int = 0

    @property
    def instructions(self) -> int:
        return self.rungs.total() + self.refused.total()

    @property
    def refused_otherwise(self) -> int:
        """Refused for a reason that is not of :data:`BY_PLACE`."""
        return sum(count for reason, count in self.refused.items() if reason not in BY_PLACE)

    def as_json(self, kernel: str) -> dict[str, object]:
        """The counts for a file; *kernel* is the kernel's release."""
        return {
            "kernel": kernel,
            "instructions": self.instructions,
            "rungs": {str(rung): self.rungs[rung] for rung in Rung},
            "refused": {str(reason): count for reason, count in self.refused.most_common() if count},
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one symbol, up to the next symbol, and what the guest says of it.

    *rule* refuses all of it. *sites* are (address, bytes, reason), of several at a place the one that counts first.
    *extable* are the addresses of instructions that may fault.
    """

    addr: VirtAddr
    code: bytes
    rule: Reason | None = None
    sites: Sequence[tuple[int, int, Reason]] = ()
    extable: Collection[int] = ()


_Found = tuple[int, Form | None]


class Surveyor:
    """Counts pieces into :attr:`survey`.

    :param area: where the slots are, or may be.
    :param rules: the rules of the guest's kernel, to compare.
    :param by_kernel_rules: boost only what those rules boost.
    """

    def __init__(self, area: AddressRange, rules: Rules, *, by_kernel_rules: bool = False) -> None:
        self.survey = Survey()
        self._area = area
        self._by_kernel_rules = by_kernel_rules
        self._forms = Forms(rules)

    def count(self, piece: Piece) -> None:
        """Count all instructions of *piece*."""
        found, tail = self._decode(piece)
        refused = self.survey.refused
        if piece.rule is not None:
            refused[piece.rule] += len(found) + tail
            return
        padding, behind = self._padding(found, tail)
        refused[behind] += tail
        marks = _marks(found, piece.sites) if piece.sites else {}
        near = AddressRange(piece.addr, VirtAddr(piece.addr + len(piece.code)))
        out_of_reach = not in_reach(self._area, near)
        parted_at = _parted_at(found)
        boosted = probed = kernel_boosted = 0
        for index, (addr, form) in enumerate(found):
            if index in marks:
                refused[marks[index]] += 1
            elif form is None:
                refused[Reason.UNDECODABLE] += 1
            elif index >= padding:
                refused[Reason.PADDING] += 1
            elif form.refused is not None:
                refused[form.refused.reason] += 1
            elif index in parted_at:
                refused[Reason.INTERRUPT_SHADOW] += 1
            elif out_of_reach:
                refused[Reason.OUT_OF_REACH] += 1
            elif form.reach is None and not piece.extable and not self._by_kernel_rules:
                boosted += 1
                probed += form.kernel_probes
                kernel_boosted += form.kernel_boosts
            else:
                self._count_rung(form, addr, in_extable=addr in piece.extable)
        self.survey.rungs[Rung.BOOSTED] += boosted
        self.survey.kernel_probes += probed
        self.survey.kernel_boosts += kernel_boosted

    def _count_rung(self, form: Form, addr: int, *, in_extable: bool) -> None:
        survey = self.survey
        in_reach_of_slots = form.reach is None or reaches(self._area, addr + form.reach)
        if in_extable:
            why = Reason.EX_TABLE
        elif self._by_kernel_rules and not form.kernel_boosts:
            why = Reason.KERNEL_BOOST
        elif not in_reach_of_slots:
            why = Reason.OUT_OF_REACH
        else:
            survey.rungs[Rung.BOOSTED] += 1
            survey.kernel_probes += form.kernel_probes
            survey.kernel_boosts += form.kernel_boosts
            return
        if form.insn.is_halt:
            survey.refused[Reason.HALTS] += 1
        elif not in_reach_of_slots and form.insn.is_rip_relative:
            survey.refused[Reason.OUT_OF_REACH] += 1
        else:
            survey.rungs[Rung.SINGLE_STEP] += 1
            survey.not_boosted[why] += 1
            survey.kernel_probes += form.kernel_probes
            survey.kernel_boosts += form.kernel_boosts and not in_extable

    def _decode(self, piece: Piece) -> tuple[list[_Found], int]:
        """The instructions, and how many int3 follow them to the end.

        From the first place that is no instruction on, each byte counts as one that is not known.
        """
        code, addr = piece.code, piece.addr
        # A site may be in what looks like padding: then all is decoded.
        end = len(code) if piece.sites else len(code.rstrip(INT3))
        known, at = self._forms.read(addr, code, end)
        found: list[_Found] = [*known]
        if at >= end:
            return found, len(code) - at
        if not any(code[at:]):
            found.append((addr + at, self._forms.of(_ZEROS)))  # an odd number of zeros
            return found, 0
        found += [(addr + rest, None) for rest in range(at, len(code))]
        return found, 0

    def _padding(self, found: list[_Found], tail: int) -> tuple[int, Reason]:
        """The index of the first instruction of the padding at the end, and what the int3 behind them are."""
        first = len(found)
        while first and (form := found[first - 1][1]) is not None and form.is_fill:
            first -= 1
        before = found[first - 1][1] if first else None
        if first < len(found):
            form = found[first][1]
            begin = None if form is None else form.insn
        else:
            begin = _int3() if tail else None
        if begin is None or (first and before is None):
            return len(found), Reason.FOREIGN_INT3
        if begins_padding(None if before is None else before.insn, begin):
            return first, Reason.PADDING
        return len(found), Reason.FOREIGN_INT3


def _int3() -> Insn:
    return decode(INT3, VirtAddr(0))


def _parted_at(found: list[_Found]) -> set[int]:
    """The instructions, by index, that must not be parted from the one behind or in front of them."""
    indexes: set[int] = set()
    for index, (_, form) in enumerate(found[:-1]):
        if form is not None and form.masks:
            behind = found[index + 1][1]
            if behind is not None and parted(None, form.insn, behind.insn) is not None:
                indexes.update((index, index + 1))
    return indexes


def _marks(found: list[_Found], sites: Sequence[tuple[int, int, Reason]]) -> dict[int, Reason]:
    """The instructions, by index, that share a byte with one of *sites*."""
    return {index: reason for site in reversed(sites) for index, reason in _marked(found, site)}


def _marked(found: list[_Found], site: tuple[int, int, Reason]) -> Iterator[tuple[int, Reason]]:
    start, size, reason = site
    index = max(bisect_right(found, start, key=lambda one: one[0]) - 1, 0)
    while index < len(found) and found[index][0] < start + size:
        addr, form = found[index]
        if addr + (form.insn.length if form is not None else 1) > start:
            yield index, reason
        index += 1
