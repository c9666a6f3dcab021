"""Slots: wherever probes come and go, no two share a byte, and none is given out while somebody may be in it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gdb_kprobe.kprobes.slots import INT3, S32_REACH, SLOT_ALIGN, SLOT_HEADER, Slot, SlotAllocator, in_reach
from gdb_kprobe.model import AddressRange, VirtAddr

AREA = AddressRange(VirtAddr(0xFFFF_FFFF_FEE8_0000), VirtAddr(0xFFFF_FFFF_FEE8_1000))
TEXT = AddressRange(VirtAddr(0xFFFF_FFFF_8100_0000), VirtAddr(0xFFFF_FFFF_8100_000F))


class SlotLife(RuleBasedStateMachine):
    """Probes are added, refused, deleted; stacks are scanned. Checked against plain sets of addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotAllocator(AREA)
        self.used: list[Slot] = []
        self.waiting: list[Slot] = []

    @rule(size=st.integers(1, 200))
    def allocate(self, size: int) -> None:
        slot = self.slots.allocate(size, TEXT)
        if slot is None:
            needed = -(-(size + SLOT_HEADER) // SLOT_ALIGN) * SLOT_ALIGN
            taken = {at for slot in self.used + self.waiting for at in range(slot.start, slot.end, SLOT_ALIGN)}
            free = "".join(" " if at in taken else "x" for at in range(AREA.start, AREA.end, SLOT_ALIGN))
            assert "x" * (needed // SLOT_ALIGN) not in free, "there was room"
            return
        assert slot.end - slot.code >= size
        assert slot.start % SLOT_ALIGN == 0
        assert not any(slot.range.overlaps(other.range) for other in self.used + self.waiting)
        self.used.append(slot)

    @precondition(lambda self: self.used)
    @rule(pick=st.randoms(use_true_random=False))
    def discard(self, pick: random.Random) -> None:
        self.slots.discard(self.used.pop(pick.randrange(len(self.used))))

    @precondition(lambda self: self.used)
    @rule(pick=st.randoms(use_true_random=False))
    def free(self, pick: random.Random) -> None:
        slot = self.used.pop(pick.randrange(len(self.used)))
        self.slots.free(slot)
        self.waiting.append(slot)

    @rule(words=st.lists(st.integers(AREA.start, AREA.end - 1), max_size=4))
    def release(self, words: list[int]) -> None:
        clean = [slot for slot in self.waiting if not any(slot.start <= word < slot.end for word in words)]
        assert self.slots.release(words) == len(clean)
        self.waiting = [slot for slot in self.waiting if slot not in clean]

    @invariant()
    def all_are_inside_and_counted(self) -> None:
        taken = self.used + self.waiting
        assert all(AREA.start <= slot.start and slot.end <= AREA.end for slot in taken)
        assert self.slots.used == sum(slot.size for slot in taken)
        assert set(self.slots.quarantined) == set(self.waiting)


TestSlotLife = SlotLife.TestCase
TestSlotLife.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@given(st.lists(st.integers(1, 100), max_size=80))
def test_all_freed_and_released_is_empty_and_gives_the_same_room_again(sizes: list[int]) -> None:
    slots = SlotAllocator(AREA)
    first = [slot for size in sizes if (slot := slots.allocate(size, TEXT)) is not None]
    for slot in first:
        slots.free(slot)
    assert slots.release([]) == len(first)
    assert (slots.used, slots.quarantined) == (0, ())
    again = [slot for size in sizes if (slot := slots.allocate(size, TEXT)) is not None]
    assert [slot.size for slot in again] == [slot.size for slot in first]
    whole = SlotAllocator(AREA)
    slot = whole.allocate(AREA.size - SLOT_HEADER, TEXT)
    assert slot is not None
    whole.discard(slot)
    assert whole.allocate(1, TEXT) is not None, "a large one that is free serves for a small one"


def test_more_is_asked_for_when_it_is_needed_and_nothing_of_a_piece_is_lost() -> None:
    pieces = [AddressRange(AREA.start, VirtAddr(AREA.start + 256)), AddressRange(VirtAddr(AREA.end - 256), AREA.end)]
    asked: list[int] = []

    def more(size: int) -> AddressRange | None:
        asked.append(size)
        return pieces.pop() if pieces else None

    slots = SlotAllocator(AREA, more)
    assert asked == []
    taken = [slots.allocate(128 - SLOT_HEADER, TEXT), slots.allocate(192 - SLOT_HEADER, TEXT)]
    assert asked == [128, 192]
    assert [slot and slot.start for slot in taken] == [AREA.end - 256, AREA.start]
    rest = [slots.allocate(1, TEXT) for _ in range(4)]
    assert sum(slot is not None for slot in rest) == 3, "two at the end of one piece, one at the end of the other"


def test_a_claimed_slot_is_not_given_out_again() -> None:
    slots = SlotAllocator(AREA)
    slot = Slot(VirtAddr(AREA.start - 0x1000), 64)
    slots.claim(slot)
    assert slots.is_claimed(AddressRange(slot.start, AREA.end))
    slots.free(slot)
    assert slots.release([slot.code]) == 0
    assert slots.is_claimed(slot.range)
    assert slots.release([]) == 1
    assert not slots.is_claimed(slot.range)
    assert slots.allocate(1, TEXT) != slot


def test_a_quarantined_slot_is_not_handed_out() -> None:
    slots = SlotAllocator(AddressRange(AREA.start, VirtAddr(AREA.start + SLOT_ALIGN)))
    slot = slots.allocate(1, TEXT)
    assert slot is not None
    slots.free(slot)
    assert slots.allocate(1, TEXT) is None
    assert slots.release([slot.end - 1]) == 0
    assert slots.allocate(1, TEXT) is None
    assert slots.release([slot.end, slot.start - 1]) == 1
    assert slots.allocate(1, TEXT) == slot


def test_a_slot_that_nobody_entered_is_there_again_at_once() -> None:
    slots = SlotAllocator(AREA)
    slot = slots.allocate(1, TEXT)
    assert slot is not None
    slots.discard(slot)
    assert slots.allocate(1, TEXT) == slot


@given(st.integers(-(1 << 32), 1 << 32), st.integers(1, 15))
def test_no_slot_is_out_of_reach_of_the_text(distance: int, length: int) -> None:
    start = VirtAddr(AREA.start + distance)
    text = AddressRange(start, VirtAddr(start + length))
    slot = SlotAllocator(AREA).allocate(16, text)
    furthest = max(
        abs(one - other) for one in (AREA.start, AREA.start + SLOT_ALIGN) for other in (text.start, text.end)
    )
    if slot is None:
        assert furthest > S32_REACH - 0x1000
    else:
        assert in_reach(slot.range, text)
        assert furthest < 1 << 31


def test_out_of_reach_takes_no_slot() -> None:
    slots = SlotAllocator(AREA)
    far = AddressRange(VirtAddr(0x1000), VirtAddr(0x1001))
    slot = slots.allocate(1, TEXT)
    assert slot is not None
    slots.discard(slot)
    assert slots.allocate(1, far) is None
    assert slots.used == 0
    assert slots.allocate(1, TEXT) == slot


def test_a_slot_says_whose_it_is_and_ends_in_int3() -> None:
    slot = Slot(AREA.start, 64)
    image = slot.image(VirtAddr(0xFFFF_FFFF_8100_0000), b"\x90\xc3")
    assert image == bytes.fromhex("00000081ffffffff 90c3") + INT3 * 54
    assert slot.code == AREA.start + 8


def test_no_slot_is_in_two_pieces() -> None:
    """Whether somebody is in a piece is asked of each by itself."""
    border = VirtAddr(AREA.start + 1024)
    pieces = [AddressRange(border, AREA.end), AddressRange(AREA.start, border)]
    slots = SlotAllocator(AREA, lambda size: pieces.pop() if pieces else None)
    taken = list(iter(lambda: slots.allocate(1, TEXT), None))
    for slot in taken:
        slots.discard(slot)
    large = [slot for slot in (slots.allocate(900, TEXT) for _ in range(4)) if slot is not None]
    assert len(large) == 4
    assert not any(slot.start < border < slot.end for slot in large)
