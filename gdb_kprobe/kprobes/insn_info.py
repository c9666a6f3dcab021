"""Text in bulk: what its instructions are at any address, found out once for each that is different.

Text has millions of instructions, but few hundred thousand that are different, and of those only the bytes count here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal, probe_refusal
from gdb_kprobe.kprobes.landing import is_landing_pad, landing_pad
from gdb_kprobe.kprobes.padding import is_fill
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, decode
from gdb_kprobe.x86.encoding import EncodingError, parse
from gdb_kprobe.x86.families import Family, Unhandled, classify
from gdb_kprobe.x86.shadow import may_shadow

_NOWHERE: Final = VirtAddr(0)
_HEAD: Final = 4
"""Bytes that decide the length of most instructions."""


@dataclass(frozen=True, slots=True, eq=False)
class InsnInfo:
    """What the bytes of an instruction say at any address; *insn* is decoded at address 0.

    *refused* is why no rung can execute it elsewhere. *is_nop*: it does nothing (landing pads are not). *leaves*:
    execution does not go on behind it. *masks*: what follows may have to stay with it. *reach* is where what it refers
    to is, from its own address; ``None`` where it refers to nothing that must be in reach. What the kernel would do is
    asked only of :class:`InsnInfos` that know its rules.
    """

    insn: Insn
    length: int
    refused: Unhandled | None
    is_nop: bool
    is_fill: bool
    is_call: bool
    leaves: bool
    masks: bool
    reach: int | None
    kernel_probes: bool
    kernel_can_boost: bool

    @property
    def kernel_boosts(self) -> bool:
        return self.kernel_probes and self.kernel_can_boost


class InsnInfos:
    """The infos that were met so far; *rules* are those of the guest's kernel, to compare."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules
        self._infos: dict[bytes, InsnInfo | None] = {}
        self._lengths: dict[bytes, int] = {}

    def read(self, addr: int, code: bytes, end: int) -> tuple[list[tuple[int, InsnInfo]], int]:
        """The instructions of *code*, which is at *addr*, with their addresses, up to the offset *end*.

        Returned second is the offset where it ended: at *end* or behind it, or where no instruction is.
        """
        infos, lengths = self._infos, self._lengths
        found: list[tuple[int, InsnInfo]] = []
        at = 0
        while at < end:
            head = code[at : at + _HEAD]
            length = lengths.get(head, 0)
            if not length:
                try:
                    encoding = parse(code, at)
                except EncodingError:
                    break
                length = encoding.length
                if encoding.head_size <= len(head) == _HEAD:
                    lengths[head] = length
            raw = code[at : at + length]
            if len(raw) < length:
                break
            info = infos[raw] if raw in infos else self.of(raw)
            if info is None:
                break
            found.append((addr + at, info))
            at += length
        return found, at

    def of(self, raw: bytes) -> InsnInfo | None:
        """The form of exactly these bytes; ``None`` when they are no instruction."""
        if raw not in self._infos:
            self._infos[raw] = self._make(raw)
        return self._infos[raw]

    def _make(self, raw: bytes) -> InsnInfo | None:
        try:
            insn = decode(raw, _NOWHERE)
        except DecodeError:
            return None
        family, rules = classify(insn), self._rules
        reach: int | None = None
        if insn.encoding.relative:
            assert insn.immediate is not None
            reach = insn.length + insn.immediate
        elif insn.is_rip_relative and family is not Family.NOP and 0x67 not in insn.prefixes:
            assert insn.displacement is not None
            reach = insn.length + insn.displacement
        return InsnInfo(
            insn,
            insn.length,
            landing_pad(insn) or (family if isinstance(family, Unhandled) else None),
            family is Family.NOP and not is_landing_pad(raw),
            is_fill(insn),
            insn.is_call,
            not insn.falls_through,
            may_shadow(insn),
            reach,
            rules is not None and probe_refusal(insn, rules) is None,
            rules is not None and boost_refusal(insn, rules, in_extable=False) is None,
        )
