"""Where a jump may go in the guest as it is now, and what goes out of line for it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from gdb_kprobe.kprobes.detour import Action, Detour, Flags
from gdb_kprobe.kprobes.forms import Forms
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.window import Function, Window, can_optimize, read_up_to
from gdb_kprobe.model import AddressRange, Refusal, VirtAddr
from gdb_kprobe.session.function_text import FunctionText
from gdb_kprobe.session.guest import Guest
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.liveness import are_flags_dead

_AHEAD = 128
"""Bytes of the function behind the instruction that are looked at: for its window, and for whether its flags live."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A jump that is wanted: what a hit is to do, and what else must be asked of the window."""

    action: Action
    check: Callable[[Window], Refusal | None] = lambda window: None


class Windows:
    """Finds the windows of *guest*, of whose text *text* knows what is ours; *area* is where the detours are."""

    def __init__(self, guest: Guest, text: TextMap, area: AddressRange) -> None:
        self._guest = guest
        self._text = text
        self._area = area
        self._forms = Forms()

    def detour(self, function: FunctionText, insn: Insn, wish: Wish) -> Detour | Refusal:
        """What goes out of line for a jump over *insn* of *function*; or why there can be none."""
        place = function.place
        code = function.code
        piece = self._guest.piece_at(place.start, code[: insn.addr - place.start + _AHEAD])
        known = read_up_to(piece, insn.addr + _AHEAD, place.end, self._forms)
        index = bisect_left(known.addrs, insn.addr)
        window = can_optimize(known, index, lambda: self._guest.references(self._text), self._area)
        if isinstance(window, Refusal):
            return window
        refusal = wish.check(window)
        if refusal is not None:
            return refusal
        text = code[window.start - place.start : window.end - place.start]
        flags = self._flags(known, insn.addr)
        return Detour(window, executed(window.start, text), text, wish.action, flags)

    def _flags(self, function: Function, addr: VirtAddr) -> Flags:
        if are_flags_dead(addr, function.settled, as_processors_do=True):
            return Flags.DEAD
        return Flags.LAHF if self._guest.has_lahf else Flags.PUSHF


def executed(start: VirtAddr, text: bytes) -> tuple[Insn, ...]:
    """The instructions of *text* up to the one behind which execution does not go on."""
    insns: list[Insn] = []
    at = 0
    while at < len(text):
        insn = decode(text[at:], VirtAddr(start + at))
        insns.append(insn)
        if not insn.falls_through:
            break
        at += insn.length
    return tuple(insns)
