"""Every instruction of a piece of text, by the best rung it can have or by the reason why it has none. Pure: bytes.

What the bytes alone decide is found out once for each instruction that is different
(:mod:`gdb_kprobe.kprobes.insn_info`); what the place decides (sites, padding, neighbours, reach) is put on top.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from gdb_kprobe.kprobes.insn_info import InsnInfo, InsnInfos
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.landing import landing_pad_size
from gdb_kprobe.kprobes.padding import begins_padding
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.slots import INT3, in_reach, reaches
from gdb_kprobe.kprobes.window import (
    FTRACE_NOP_SIZE,
    Function,
    Window,
    can_optimize,
    kernel_optimizes,
    kernel_optimizes_in,
    make_function,
)
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.model import AddressRange, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.shadow import splits_shadow

_ZEROS = b"\0\0"

BY_PLACE: Final = frozenset(
    {
        Reason.NOINSTR,
        Reason.ENTRY_TEXT,
        Reason.JUMP_LABEL,
        Reason.STATIC_CALL,
        Reason.STATIC_CALL_TRAMPOLINE,
        Reason.TEMPLATE,
        Reason.LANDING_PAD,
        Reason.ALTERNATIVE,
        Reason.GUEST_KPROBE,
        Reason.BUG_TABLE,
        Reason.RAISES_UD,
        Reason.FOREIGN_INT3,
        Reason.PADDING,
    }
)
"""Reasons that the user can do nothing about: text that must not trap, that the guest patches, or that is none."""


@dataclass
class Jumps:
    """Of the instructions of the optimized rung, how many have the jump's window to themselves (*single*), and how many
    need a nop of the guest's ftrace (*borrowed*). *refused* says why the others that can be probed are not.

    *entries* are where probes on functions go, *entries_refused* why some of them get no jump (also those that cannot
    be probed at all, but for forbidden text). *kernel* is how many the kernel's own rules would optimize.
    """

    single: int = 0
    borrowed: int = 0
    kernel: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    entries: int = 0
    entries_refused: Counter[Reason] = field(default_factory=Counter)


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
    jumps: Jumps | None = None
    """What was found of jumps; ``None``: they were not asked for."""

    @property
    def instructions(self) -> int:
        return self.rungs.total() + self.refused.total()

    @property
    def refused_otherwise(self) -> int:
        """Refused for a reason that is not of :data:`BY_PLACE`."""
        return sum(count for reason, count in self.refused.items() if reason not in BY_PLACE)

    def as_json(self, kernel: str) -> dict[str, object]:
        """The counts for a file; *kernel* is the kernel's release. Reasons are the names in :class:`Reason`."""
        return {
            "kernel": kernel,
            "instructions": self.instructions,
            "rungs": {str(rung): self.rungs[rung] for rung in Rung},
            "refused": {reason.name: count for reason, count in self.refused.most_common() if count},
            "not_optimized": {}
            if self.jumps is None
            else {reason.name: count for reason, count in self.jumps.refused.most_common() if count},
        }


_Found = tuple[int, InsnInfo | None]


class Surveyor:
    """Counts pieces into :attr:`survey`.

    :param area: where the slots are, or may be.
    :param rules: the rules of the guest's kernel, to compare.
    :param by_kernel_rules: boost only what those rules boost.
    :param references: what goes where in all text; without them nothing is optimized.
    """

    def __init__(
        self,
        area: AddressRange,
        rules: Rules,
        *,
        by_kernel_rules: bool = False,
        references: References | None = None,
    ) -> None:
        self.survey = Survey(jumps=None if references is None else Jumps())
        self._area = area
        self._rules = rules
        self._by_kernel_rules = by_kernel_rules
        self._references = references
        self._infos = InsnInfos(rules)

    def count(self, piece: Piece) -> None:
        """Count all instructions of *piece*."""
        found, tail = self._decode(piece)
        refused = self.survey.refused
        if piece.rule is not None:
            refused[piece.rule] += len(found) + tail
            return
        verdicts, behind = self._verdicts(piece, found, tail)
        refused[behind] += tail
        if self._references is not None:
            self._count_jumps(self._references, piece, found, tail, verdicts)
        for verdict, (addr, info) in zip(verdicts, found, strict=True):
            if isinstance(verdict, Rung):
                assert info is not None
                self._count_rung(verdict, info, addr, in_extable=addr in piece.extable)
            else:
                refused[verdict] += 1

    def _verdicts(self, piece: Piece, found: list[_Found], tail: int) -> tuple[list[Rung | Reason], Reason]:
        """The best rung with an int3 of each instruction, or why it is refused; and what the int3 behind them are."""
        padding, behind = self._padding(found, tail)
        if any(found[-1][0] >= addr >= found[padding][0] for addr in piece.fixups if padding < len(found)):
            padding, behind = len(found), Reason.FOREIGN_INT3
        marks = _marks(found, piece.sites) if piece.sites else {}
        near = AddressRange(piece.addr, VirtAddr(piece.addr + len(piece.code)))
        out_of_reach = not in_reach(self._area, near)
        parted_at = _parted_at(found)
        verdicts: list[Rung | Reason] = []
        for index, (addr, info) in enumerate(found):
            if index in marks:
                verdicts.append(marks[index])
            elif info is None:
                verdicts.append(Reason.UNDECODABLE)
            elif index >= padding:
                verdicts.append(Reason.PADDING)
            elif info.refused is not None:
                verdicts.append(info.refused.reason)
            elif index in parted_at:
                verdicts.append(Reason.INTERRUPT_SHADOW)
            elif out_of_reach:
                verdicts.append(Reason.OUT_OF_REACH)
            else:
                verdicts.append(self._rung(info, addr, piece.extable))
        return verdicts, behind

    def _rung(self, info: InsnInfo, addr: int, extable: Collection[int]) -> Rung | Reason:
        if self._why_not_boosted(info, addr, in_extable=addr in extable) is None:
            return Rung.BOOSTED
        if info.insn.is_halt:
            return Reason.HALTS
        if not self._reaches(info, addr):
            return Reason.OUT_OF_REACH
        return Rung.SINGLE_STEP

    def _why_not_boosted(self, info: InsnInfo, addr: int, *, in_extable: bool) -> Reason | None:
        if in_extable:
            return Reason.EX_TABLE
        if self._by_kernel_rules and not info.kernel_boosts:
            return Reason.KERNEL_BOOST
        return None if self._reaches(info, addr) else Reason.OUT_OF_REACH

    def _reaches(self, info: InsnInfo, addr: int) -> bool:
        return info.reach is None or reaches(self._area, addr + info.reach)

    def _count_rung(self, rung: Rung, info: InsnInfo, addr: int, *, in_extable: bool) -> None:
        survey = self.survey
        survey.rungs[rung] += 1
        survey.kernel_probes += info.kernel_probes
        survey.kernel_boosts += info.kernel_boosts and not in_extable
        if rung is Rung.SINGLE_STEP:
            why = self._why_not_boosted(info, addr, in_extable=in_extable)
            assert why is not None
            survey.not_boosted[why] += 1

    def _count_jumps(
        self,
        references: References,
        piece: Piece,
        found: list[_Found],
        tail: int,
        verdicts: list[Rung | Reason],
    ) -> None:
        """Put the optimized rung into *verdicts* where it is possible."""
        jumps = self.survey.jumps
        assert jumps is not None
        function = make_function(piece, self._known(piece, found, tail))
        by_kernel = kernel_optimizes_in(function, references, self._rules)
        for index in range(min(len(verdicts), len(function.infos))):
            if not isinstance(verdicts[index], Rung):
                continue
            window = can_optimize(function, index, lambda: references, self._area)
            jumps.kernel += by_kernel and kernel_optimizes(function, index)
            if isinstance(window, Window):
                verdicts[index] = Rung.OPTIMIZED
                jumps.single += not window.interior
                jumps.borrowed += window.borrowed
            else:
                jumps.refused[window.reason] += 1
        self._count_entry(references, function, piece, verdicts)

    def _count_entry(
        self, references: References, function: Function, piece: Piece, verdicts: Sequence[Rung | Reason]
    ) -> None:
        """Count where a probe on *function* goes: behind the landing pad and the nop of ftrace that it begins with."""
        jumps = self.survey.jumps
        assert jumps is not None
        nop = function.ftrace
        at = piece.addr + landing_pad_size(piece.code) if nop is None else nop + FTRACE_NOP_SIZE
        index = bisect_left(function.addrs, at)
        verdict = verdicts[index] if index < min(len(verdicts), len(function.addrs)) else Reason.PADDING
        if verdict is Reason.PADDING:
            return
        jumps.entries += 1
        if at != piece.addr and references.is_target(at, at + 1):
            jumps.entries_refused[Reason.LOOP_HEAD] += 1
        elif isinstance(verdict, Reason):
            jumps.entries_refused[verdict] += 1
        elif verdict is not Rung.OPTIMIZED:
            window = can_optimize(function, index, lambda: references, self._area)
            assert isinstance(window, Refusal)
            jumps.entries_refused[window.reason] += 1

    def _known(self, piece: Piece, found: list[_Found], tail: int) -> list[tuple[int, InsnInfo]]:
        """The instructions up to the first place that is none, with the int3 behind them."""
        known = [(addr, info) for addr, info in takewhile(lambda one: one[1] is not None, found) if info is not None]
        fill = self._infos.of(INT3)
        if tail and len(known) == len(found) and fill is not None:
            first = piece.addr + len(piece.code) - tail
            known += [(first + index, fill) for index in range(tail)]
        return known

    def _decode(self, piece: Piece) -> tuple[list[_Found], int]:
        """The instructions, and how many int3 follow them to the end.

        From the first place that is no instruction on, each byte counts as one that is not known.
        """
        code, addr = piece.code, piece.addr
        # A site may be in what looks like padding: then all is decoded.
        end = len(code) if piece.sites else len(code.rstrip(INT3))
        known, at = self._infos.read(addr, code, end)
        found: list[_Found] = [*known]
        if at >= end:
            return found, len(code) - at
        if not any(code[at:]):
            found.append((addr + at, self._infos.of(_ZEROS)))  # an odd number of zeros
            return found, 0
        found += [(addr + rest, None) for rest in range(at, len(code))]
        return found, 0

    def _padding(self, found: list[_Found], tail: int) -> tuple[int, Reason]:
        """The index of the first instruction of the padding at the end, and what the int3 behind them are."""
        first = len(found)
        while first and (info := found[first - 1][1]) is not None and info.is_fill:
            first -= 1
        before = found[first - 1][1] if first else None
        if first < len(found):
            info = found[first][1]
            begin = None if info is None else info.insn
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
    for index, (_, info) in enumerate(found[:-1]):
        if info is not None and info.masks:
            behind = found[index + 1][1]
            if behind is not None and splits_shadow(None, info.insn, behind.insn) is not None:
                indexes.update((index, index + 1))
    return indexes


def _marks(found: list[_Found], sites: Sequence[tuple[int, int, Reason]]) -> dict[int, Reason]:
    """The instructions, by index, that share a byte with one of *sites*."""
    return {index: reason for site in reversed(sites) for index, reason in _marked(found, site)}


def _marked(found: list[_Found], site: tuple[int, int, Reason]) -> Iterator[tuple[int, Reason]]:
    start, size, reason = site
    index = max(bisect_right(found, start, key=lambda one: one[0]) - 1, 0)
    while index < len(found) and found[index][0] < start + size:
        addr, info = found[index]
        if addr + (info.insn.length if info is not None else 1) > start:
            yield index, reason
        index += 1
