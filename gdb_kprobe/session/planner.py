"""May this place be probed, and how: the rules, asked of the guest as it is now. Nothing is written."""

from __future__ import annotations

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.plan import Facts, Plan, make_plan
from gdb_kprobe.kprobes.slots import SlotAllocator
from gdb_kprobe.model import Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.session.guest import Guest, Place
from gdb_kprobe.x86.decode import DecodeError, Insn, iter_insns
from gdb_kprobe.x86.encoding import MAX_LENGTH


class Planner:
    """Makes plans for the text of *guest*, of which *text* knows what is ours; slots are taken from *slots*."""

    def __init__(self, guest: Guest, text: TextMap, slots: SlotAllocator, rungs: tuple[Rung, ...]) -> None:
        self._guest = guest
        self._text = text
        self._slots = slots
        self._rungs = rungs

    def plan(self, place: Place, *, needs_post: bool, strategy: Rung | None) -> Plan:
        """Plan a probe at *place*; *strategy* is the one rung to use, if that is wanted.

        :raises RefusedError: a rule says no.
        """
        insn = self._probeable_insn(place)
        rungs = tuple(rung for rung in self._rungs if strategy in (None, rung))
        return make_plan(insn, Facts(self._guest.fixup_of(insn.addr) is not None, needs_post, rungs), self._slots)

    def _probeable_insn(self, place: Place) -> Insn:
        """The kernel's ``can_probe``: decode from the function's start; the address must be a boundary.

        :raises RefusedError: it is not one, or the guest's own rules forbid the place.
        """
        what = f"cannot probe {place}"
        early = self._guest.refusal_at(place, 1)
        if early is not None:
            raise RefusedError(what, early)
        found = self._guest.memory.walk(place.addr)
        if found is None or not found.executable:
            state = "is not mapped" if found is None else "is mapped, but not executable"
            detail = f"{place.addr:#x} {state}"
            raise RefusedError(what, Refusal(Reason.NOT_EXECUTABLE, place.addr, detail, "probe another function"))
        insn = self._decode_up_to(place, what)
        refusal = self._guest.refusal_at(place, insn.length)
        if refusal is not None:
            raise RefusedError(what, refusal)
        return insn

    def _decode_up_to(self, place: Place, what: str) -> Insn:
        size = place.offset + MAX_LENGTH
        if place.symbol is not None:
            size = min(size, max(place.end - place.start, place.offset + 1))
        text = self._original_text(place.start, size)
        before = place.start
        try:
            for insn in iter_insns(text, place.start):
                if insn.addr == place.addr:
                    return insn
                if insn.addr > place.addr:
                    raise RefusedError(
                        what,
                        Refusal(
                            Reason.NOT_A_BOUNDARY,
                            place.addr,
                            f"it is inside the instruction at {self._guest.place_of(before)}",
                            f"the nearest boundaries are {self._guest.place_of(before)} and "
                            f"{self._guest.place_of(insn.addr)}",
                        ),
                    )
                before = insn.addr
        except DecodeError as error:
            raise RefusedError(what, Refusal(Reason.UNDECODABLE, error.addr, error.detail)) from error
        raise RefusedError(what, Refusal(Reason.NOT_A_BOUNDARY, place.addr, "it is behind the function's last one"))

    def _original_text(self, addr: VirtAddr, size: int) -> bytes:
        return self._text.original(addr, self._guest.memory.read(addr, size))
