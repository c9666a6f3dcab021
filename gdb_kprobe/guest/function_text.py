"""The instructions of one function of the guest, and which of them may be probed at all."""

from __future__ import annotations

from gdb_kprobe.errors import NEEDS_TYPES_HINT, UnmappedError
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.padding import begins_padding, is_fill
from gdb_kprobe.kprobes.patch import CodePatch, TextMap, recover
from gdb_kprobe.linux.guest_kprobes import GuestKprobes
from gdb_kprobe.model import AddressRange, Reason, Refusal, VirtAddr, offset
from gdb_kprobe.x86.decode import DecodeError, Insn, iter_insns
from gdb_kprobe.x86.encoding import MAX_LENGTH
from gdb_kprobe.x86.shadow import may_shadow, splits_shadow

_AHEAD = 1 << 14
"""Bytes behind the place that are looked at, at most; a function's end is far only where symbols are few."""


class FunctionText:
    """The function around *place*, decoded from its start as far as is asked for.

    What is decoded is the text without our probes and without the guest's own.
    """

    def __init__(self, guest: Guest, text: TextMap, place: Place) -> None:
        """:raises GuestStateError: not all of the guest's own kprobes can be read."""
        self.place = place
        self.kprobes = guest.own_kprobes()
        self.kprobes.check_all()
        self.error: DecodeError | None = None
        """Where decoding ended early."""
        self._guest = guest
        self._insns: list[Insn] = []
        self._fill = (0, -1, False)
        self.code = self._read(text)
        """What is decoded: the function, or as much of it as is needed for the place."""
        self._rest = iter_insns(self.code, place.start)

    def up_to(self, addr: VirtAddr) -> list[Insn]:
        """The instructions that begin at or below *addr*, and the one behind them if that was decoded already."""
        while not self._insns or self._insns[-1].addr < addr:
            if not self._next():
                break
        return self._insns

    def whole(self) -> list[Insn]:
        """All of them."""
        while self._next():
            pass
        return self._insns

    def refusal(self, index: int) -> Refusal | None:
        """Why instruction *index* must not be probed on any rung; ``None`` where only the rungs' rules are left."""
        insn = self._insns[index]
        place = self._guest.place_of(insn.addr)
        refusal = self._opaque(insn) or self._guest.refusal_at(place, insn.length) or self._guest_kprobe(insn)
        if refusal is not None:
            return refusal
        if self.place.symbol is not None and self._is_padding(index):
            return Refusal(Reason.PADDING, insn.addr, f"{place}: no function has this {insn.mnemonic}")
        together = splits_shadow(
            self._insns[index - 1] if index else None, insn, self._at(index + 1) if may_shadow(insn) else None
        )
        return None if together is None else Refusal(together.reason, insn.addr, together.detail)

    def _opaque(self, insn: Insn) -> Refusal | None:
        """Why nothing of the function can be probed: it cannot be decoded."""
        function = AddressRange(self.place.start, max(self.place.end, insn.end))
        kprobe = next((kprobe for kprobe in self.kprobes.within(function) if kprobe.opaque), None)
        if kprobe is None:
            return None
        detail = f"the guest has put one at {self._guest.place_of(kprobe.addr)}, and what was there is not known"
        hint = f"remove it in the guest, or probe another function; or {NEEDS_TYPES_HINT}"
        return Refusal(Reason.GUEST_KPROBE, insn.addr, detail, hint)

    def _guest_kprobe(self, insn: Insn) -> Refusal | None:
        return guest_kprobe_in(self._guest, AddressRange(insn.addr, insn.end))

    def _is_padding(self, index: int) -> bool:
        if not is_fill(self._insns[index]):
            return False
        first, last, padding = self._fill
        if not first <= index <= last:
            first, last, padding = self._fill = self._fill_around(index)
        return padding

    def _fill_around(self, index: int) -> tuple[int, int, bool]:
        """The first and the last instruction of the fill that *index* is part of, and whether it is padding."""
        first = index
        while first and is_fill(self._insns[first - 1]):
            first -= 1
        last = index
        while (following := self._at(last + 1)) is not None and is_fill(following):
            last += 1
        if following is not None or self.error is not None:
            return first, last, False
        start, end = self._insns[first].addr, self._insns[last].end
        if self._guest.piece_at(start, self._guest.memory.read(start, end - start)).fixups:
            return first, last, False  # a fault is fixed up there
        return first, last, begins_padding(self._insns[first - 1] if first else None, self._insns[first])

    def _at(self, index: int) -> Insn | None:
        if index == len(self._insns):
            self._next()
        return self._insns[index] if index < len(self._insns) else None

    def _next(self) -> bool:
        try:
            self._insns.append(next(self._rest))
        except StopIteration:
            return False
        except DecodeError as error:
            self.error = error
            return False
        return True

    def _read(self, text: TextMap) -> bytes:
        place = self.place
        least = place.offset + MAX_LENGTH
        most = least
        if place.symbol is not None:
            most = max(place.end - place.start, place.offset + 1)
            least = min(least, most)
        try:
            data = self._guest.memory.read(place.start, min(most, place.offset + _AHEAD))
        except UnmappedError:
            data = self._guest.memory.read(place.start, least)
        # Where both have patched a byte, the guest's kprobe came later.
        return text.original(place.start, without_kprobes(place.start, data, self.kprobes))


def guest_kprobe_in(guest: Guest, text: AddressRange) -> Refusal | None:
    """Why *text* must not be patched: a kprobe of the guest's own has patched a byte of it, or may at any time.

    :raises GuestStateError: not all of them can be read.
    """
    kprobes = guest.own_kprobes()
    kprobes.check_all()
    for kprobe in kprobes.within(text):
        place = guest.place_of(kprobe.addr)
        detail = f"the guest has put one at {place}"
        if kprobe.size > 1:
            detail += f", which may become a jump over {kprobe.size} bytes"
        return Refusal(Reason.GUEST_KPROBE, text.start, detail, "remove it in the guest, or probe another instruction")
    return None


def without_kprobes(addr: VirtAddr, data: bytes, kprobes: GuestKprobes) -> bytes:
    """*data*, which was read at *addr*, without what the guest's own *kprobes* have overwritten."""
    window = AddressRange(addr, offset(addr, len(data)))
    patches = [CodePatch(at.addr, at.original, at.original) for at in kprobes.within(window) if at.original]
    return recover(addr, data, patches) if patches else data
