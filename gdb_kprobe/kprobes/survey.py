"""Every instruction of a piece of text, by the best rung it can have or by the reason why it has none. Pure: bytes.

Text has millions of instructions, but few hundred thousand that are different. What the bytes alone decide is found out
once for each of those; what the place decides (sites, padding, neighbours, reach) is put on top.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal, probe_refusal
from gdb_kprobe.kprobes.padding import begins_padding, is_fill
from gdb_kprobe.kprobes.slots import in_reach
from gdb_kprobe.model import AddressRange, Reason, Rung, VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, decode
from gdb_kprobe.x86.encoding import Encoding, EncodingError, parse
from gdb_kprobe.x86.families import Family, Unhandled, classify
from gdb_kprobe.x86.shadow import parted

_INT3 = b"\xcc"
_ZEROS = b"\0\0"
_S32 = 1 << 31
_HEAD = 4
_NOWHERE = VirtAddr(0)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What the bytes of an instruction say at any address.

    *reach* is where what it refers to is, from its own address; ``None`` where it refers to nothing that must be in
    reach. *masks*: what follows may have to stay with it.
    """

    insn: Insn
    refused: Reason | None
    kernel_probes: bool
    kernel_boosts: bool
    fill: bool
    masks: bool
    reach: int | None


_Found = tuple[int, _Form | None]


class Surveyor:
    """Counts pieces into :attr:`survey`.

    :param area: where the slots are, or may be.
    :param rules: the rules of the guest's kernel, to compare.
    :param by_kernel_rules: boost only what those rules boost.
    """

    def __init__(self, area: AddressRange, rules: Rules, *, by_kernel_rules: bool = False) -> None:
        self.survey = Survey()
        self._area = area
        self._rules = rules
        self._by_kernel_rules = by_kernel_rules
        self._forms: dict[bytes, _Form | None] = {}
        self._lengths: dict[bytes, int] = {}

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
                refused[form.refused] += 1
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

    def _count_rung(self, form: _Form, addr: int, *, in_extable: bool) -> None:
        survey = self.survey
        in_reach_of_slots = form.reach is None or self._reaches(addr + form.reach)
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

    def _reaches(self, target: int) -> bool:
        """Whether a rel32 anywhere in the slots reaches *target*, which is not cut to 64 bits."""
        return target - self._area.end >= -_S32 and target - self._area.start < _S32

    def _decode(self, piece: Piece) -> tuple[list[_Found], int]:
        """The instructions, and how many int3 follow them to the end.

        From the first place that is no instruction on, each byte counts as one that is not known.
        """
        code, forms, lengths, addr = piece.code, self._forms, self._lengths, piece.addr
        found: list[_Found] = []
        # A site may be in what looks like padding: then all is decoded.
        at, end = 0, len(code) if piece.sites else len(code.rstrip(_INT3))
        while at < end:
            head = code[at : at + _HEAD]
            length = lengths.get(head, 0)
            if not length:
                try:
                    encoding = parse(code, at)
                except EncodingError:
                    break
                length = encoding.length
                if _head_size(encoding) <= len(head) == _HEAD:
                    lengths[head] = length
            raw = code[at : at + length]
            if len(raw) < length:
                break
            if raw in forms:
                form = forms[raw]
            else:
                form = forms[raw] = _form(raw, self._rules)
            if form is None:
                break
            found.append((addr + at, form))
            at += length
        if at >= end:
            return found, len(code) - at
        if not any(code[at:]):
            found.append((addr + at, _form(_ZEROS, self._rules)))  # an odd number of zeros
            return found, 0
        found += [(addr + rest, None) for rest in range(at, len(code))]
        return found, 0

    def _padding(self, found: list[_Found], tail: int) -> tuple[int, Reason]:
        """The index of the first instruction of the padding at the end, and what the int3 behind them are."""
        first = len(found)
        while first and (form := found[first - 1][1]) is not None and form.fill:
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


def _form(raw: bytes, rules: Rules) -> _Form | None:
    try:
        insn = decode(raw, _NOWHERE)
    except DecodeError:
        return None
    family = classify(insn)
    reach: int | None = None
    if insn.encoding.relative:
        assert insn.immediate is not None
        reach = insn.length + insn.immediate
    elif insn.is_rip_relative and family is not Family.NOP and 0x67 not in insn.prefixes:
        assert insn.displacement is not None
        reach = insn.length + insn.displacement
    probes = probe_refusal(insn, rules) is None
    return _Form(
        insn,
        family.reason if isinstance(family, Unhandled) else None,
        probes,
        probes and boost_refusal(insn, rules, in_extable=False) is None,
        is_fill(insn),
        not insn.encoding.space and not insn.opcode_map and insn.opcode in (0xFB, 0x8E),
        reach,
    )


def _int3() -> Insn:
    return decode(_INT3, _NOWHERE)


def _head_size(encoding: Encoding) -> int:
    """How many bytes decide the length: all up to ModRM and SIB."""
    return encoding.opcode_offset + 1 + (encoding.modrm is not None) + (encoding.sib is not None)


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
