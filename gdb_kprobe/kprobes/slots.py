"""Where out-of-line code goes: slots in the region's code pages.

Bounds in, address out: the caller says how much code and from where it must be reachable, never which page. A freed
slot is quarantined: a task may have been preempted in it. It is given out again only after a scan of all stacks found
no pointer into it (:meth:`SlotAllocator.release`).

Layout of a slot, so that it says by itself what it belongs to::

    +0   original address of the instruction, 8 bytes
    +8   code, then int3 up to the slot's end
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gdb_kprobe.model import AddressRange, VirtAddr, offset

SLOT_ALIGN = 64
SLOT_HEADER = 8
INT3 = b"\xcc"
_S32 = 1 << 31
S32_REACH = 0x7FFF_FFFF - 0x1000
"""How far a rel32 goes, less a page: the displacement counts from the end of an instruction."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of the code area: *start* is its header, the code begins at :attr:`code`."""

    start: VirtAddr
    size: int

    @property
    def code(self) -> VirtAddr:
        return offset(self.start, SLOT_HEADER)

    @property
    def end(self) -> VirtAddr:
        return offset(self.start, self.size)

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.start, self.end)

    def image(self, original: VirtAddr, code: bytes) -> bytes:
        """The slot's bytes: header, *code*, int3."""
        body = original.to_bytes(SLOT_HEADER, "little") + code
        assert len(body) <= self.size, f"{len(body)} bytes for a slot of {self.size}"
        return body + INT3 * (self.size - len(body))


class SlotAllocator:
    """Hands out slots within *area*, from the pieces of it that *more* gives: of at least so many bytes, or ``None``.

    Without *more* all of *area* is one piece.
    """

    def __init__(self, area: AddressRange, more: Callable[[int], AddressRange | None] | None = None) -> None:
        self.area = area
        self._more = _once(area) if more is None else more
        self._next = self._end = area.start
        self._pieces: set[VirtAddr] = set()
        """Where pieces begin: no slot is in two of them."""
        self._free: dict[int, list[Slot]] = {}
        self._used: set[Slot] = set()
        self._quarantine: set[Slot] = set()
        self._claimed: set[Slot] = set()

    @property
    def used(self) -> int:
        """Bytes in slots that are in use or quarantined."""
        return sum(slot.size for slot in self._used | self._quarantine)

    @property
    def likely(self) -> VirtAddr:
        """Where the code of the next slot is going to be, most often: not where one of its size was freed."""
        return offset(self._next, SLOT_HEADER)

    def allocate(self, code_size: int, near: AddressRange | None = None) -> Slot | None:
        """Return a slot for *code_size* bytes with every byte of *near* (if any) in s32 reach of it, or ``None``."""
        size = -(-(code_size + SLOT_HEADER) // SLOT_ALIGN) * SLOT_ALIGN
        slot = self._take(size)
        if slot is None:
            return None
        if near is not None and not in_reach(slot.range, near):
            self._put_back(slot)
            return None
        self._used.add(slot)
        return slot

    def claim(self, slot: Slot) -> None:
        """Have *slot*, which another session gave out, in use. It is not given out again when it is freed."""
        self._used.add(slot)
        self._claimed.add(slot)

    def is_claimed(self, area: AddressRange) -> bool:
        """Whether a slot of another session that is in use, or waits, is in *area*."""
        return any(slot.range.overlaps(area) for slot in self._claimed)

    def give(self, area: AddressRange) -> None:
        """Hand out slots of *area* too, where none ever was."""
        self._pieces.add(area.start)
        if self._next == self._end:
            self._next, self._end = area.start, area.end
        elif area.size:
            self._put_back(Slot(area.start, area.size))

    def discard(self, slot: Slot) -> None:
        """Give back a slot that no CPU can ever have entered."""
        self._used.remove(slot)
        self._put_back(slot)

    def free(self, slot: Slot) -> None:
        """Give back a slot that may still be executing; it waits for :meth:`release`."""
        self._used.remove(slot)
        self._quarantine.add(slot)

    @property
    def quarantined(self) -> tuple[Slot, ...]:
        return tuple(sorted(self._quarantine, key=lambda slot: slot.start))

    def release(self, pointers: list[int]) -> int:
        """End the quarantine of slots that none of *pointers* (words found on stacks) points into; returns how many."""
        clean = [slot for slot in self._quarantine if not any(word in slot.range for word in pointers)]
        for slot in clean:
            self._quarantine.remove(slot)
            self._put_back(slot)
        return len(clean)

    def _take(self, size: int) -> Slot | None:
        """A slot of exactly *size* bytes, in no set yet: one that was freed, a new one, or a part of a larger one."""
        free = self._free.get(size)
        if free:
            return free.pop()
        if self._end - self._next < size:
            piece = self._more(size)
            if piece is None:
                return self._split(size)
            self._put_rest_back()
            self._pieces.add(piece.start)
            self._next, self._end = piece.start, piece.end
        slot = Slot(self._next, size)
        self._next = slot.end
        return slot

    def _put_rest_back(self) -> None:
        if self._next < self._end:
            self._put_back(Slot(self._next, self._end - self._next))

    def _put_back(self, slot: Slot) -> None:
        if slot in self._claimed:
            self._claimed.remove(slot)  # its piece is another session's
        else:
            self._free.setdefault(slot.size, []).append(slot)

    def _split(self, size: int) -> Slot | None:
        """The start of a free slot that is larger than *size*, free neighbours being one; the rest stays free."""
        runs: list[Slot] = []
        for slot in sorted((slot for free in self._free.values() for slot in free), key=lambda slot: slot.start):
            if runs and runs[-1].end == slot.start and slot.start not in self._pieces:
                runs[-1] = Slot(runs[-1].start, runs[-1].size + slot.size)
            else:
                runs.append(slot)
        self._free.clear()
        fitting = min((run for run in runs if run.size >= size), key=lambda run: run.size, default=None)
        for run in runs:
            if run is not fitting:
                self._put_back(run)
        if fitting is None:
            return None
        if fitting.size > size:
            self._put_back(Slot(offset(fitting.start, size), fitting.size - size))
        return Slot(fitting.start, size)


def _once(area: AddressRange) -> Callable[[int], AddressRange | None]:
    left = [area]
    return lambda size: left.pop() if left and left[0].size >= size else None


def reaches(area: AddressRange, target: int) -> bool:
    """Whether a rel32 anywhere in *area* reaches *target*, which is not cut to 64 bits."""
    return target - area.end >= -_S32 and target - area.start < _S32


def in_reach(one: AddressRange, other: AddressRange) -> bool:
    """Whether a rel32 in *one* reaches every byte of *other*, and back."""
    return max(one.end, other.end) - min(one.start, other.start) <= S32_REACH
