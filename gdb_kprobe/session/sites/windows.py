"""Where a jump may go in the guest as it is now, and what goes out of line for it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.detour import Detour, Flags
from gdb_kprobe.kprobes.insn_info import InsnInfos
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.window import Function, Window, can_optimize, read_up_to
from gdb_kprobe.model import AddressRange, Reason, Refusal, VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.liveness import are_flags_dead

_AHEAD = 128
"""Bytes of the function behind the instruction that are looked at: for its window, and for whether its flags live."""


@dataclass(frozen=True, slots=True)
class JumpRequest:
    """A jump that is wanted: what a hit is to do, and what else must be asked of the window."""

    action: Action
    check: Callable[[Window], Refusal | None] = lambda window: None


class Windows:
    """Finds the windows of *guest*, of whose text *text* knows what is ours; *area* is where the detours are."""

    def __init__(self, guest: Guest, text: TextMap, area: AddressRange) -> None:
        self._guest = guest
        self._text = text
        self._area = area
        self._infos = InsnInfos()

    def detour(self, function: FunctionText, insn: Insn, request: JumpRequest) -> Detour | Refusal:
        """What goes out of line for a jump over *insn* of *function*; or why there can be none."""
        place = function.place
        code = function.code
        known = self._read(self._piece(function, insn.addr), function, insn.addr)
        index = bisect_left(known.addrs, insn.addr)
        window = can_optimize(known, index, lambda: self._guest.references(self._text), self._area)
        if isinstance(window, Refusal):
            return window
        refusal = request.check(window)
        if refusal is not None:
            return refusal
        text = code[window.start - place.start : window.end - place.start]
        flags, dead = self._flags(known, insn.addr)
        return Detour(window, executed(window.start, text), text, request.action, flags, dead)

    def flags_under(self, function: FunctionText, addr: VirtAddr) -> tuple[Flags, bool]:
        """How the flags are saved at *addr* of *function*, and whether they are dead, where a kprobe of the guest's is.

        It is on our jump, and changes none of the function's own text.
        """
        piece = self._piece(function, addr)
        sites = [site for site in piece.sites if (site[0], site[2]) != (addr, Reason.GUEST_KPROBE)]
        return self._flags(self._read(replace(piece, sites=sites), function, addr), addr)

    def _piece(self, function: FunctionText, addr: VirtAddr) -> Piece:
        place = function.place
        return self._guest.piece_at(place.start, function.code[: addr - place.start + _AHEAD])

    def _read(self, piece: Piece, function: FunctionText, addr: VirtAddr) -> Function:
        return read_up_to(piece, addr + _AHEAD, function.place.end, self._infos)

    def _flags(self, function: Function, addr: VirtAddr) -> tuple[Flags, bool]:
        dead = are_flags_dead(addr, function.stable_insn, as_processors_do=True)
        return Flags.LAHF if self._guest.has_lahf else Flags.PUSHF, dead


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
