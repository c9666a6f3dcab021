"""Where out-of-line code goes: slots in the region's code pages.

Bounds in, address out: the caller says how much code and from where it must be reachable, never which page. A freed
slot is quarantined: a task may have been preempted in it. It is given out again only after a scan of all stacks found
no pointer into it (:meth:`SlotAllocator.release`).

Layout of a slot, so that it says by itself what it belongs to::

    +0   original address of the instruction, 8 bytes
    +8   code, then int3 up to the slot's end
"""

from __future__ import annotations

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
    """Hands out slots of the code area *area*."""

    def __init__(self, area: AddressRange) -> None:
        self.area = area
        self._next = area.start
        self._free: dict[int, list[Slot]] = {}
        self._used: set[Slot] = set()
        self._quarantine: set[Slot] = set()

    @property
    def used(self) -> int:
        """Bytes in slots that are in use or quarantined."""
        return sum(slot.size for slot in self._used | self._quarantine)

    @property
    def high_water(self) -> VirtAddr:
        """End of all that was ever given out."""
        return self._next

    def allocate(self, code_size: int, near: AddressRange | None = None) -> Slot | None:
        """Return a slot for *code_size* bytes with every byte of *near* (if any) in s32 reach of it, or ``None``."""
        size = -(-(code_size + SLOT_HEADER) // SLOT_ALIGN) * SLOT_ALIGN
        free = self._free.get(size)
        slot = free.pop() if free else Slot(self._next, size)
        if slot.end > self.area.end or (near is not None and not in_reach(slot.range, near)):
            if free is not None and slot.start != self._next:
                free.append(slot)
            return None
        if slot.start == self._next:
            self._next = slot.end
        self._used.add(slot)
        return slot

    def claim(self, slot: Slot) -> None:
        """Have *slot*, which another session gave out and which is below :attr:`area`, in use."""
        assert slot.end <= self.area.start
        self._used.add(slot)

    def discard(self, slot: Slot) -> None:
        """Give back a slot that no CPU can ever have entered."""
        self._used.remove(slot)
        self._free.setdefault(slot.size, []).append(slot)

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
            self._free.setdefault(slot.size, []).append(slot)
        return len(clean)


def reaches(area: AddressRange, target: int) -> bool:
    """Whether a rel32 anywhere in *area* reaches *target*, which is not cut to 64 bits."""
    return target - area.end >= -_S32 and target - area.start < _S32


def in_reach(one: AddressRange, other: AddressRange) -> bool:
    """Whether a rel32 in *one* reaches every byte of *other*, and back."""
    return max(one.end, other.end) - min(one.start, other.start) <= S32_REACH
