"""Memory for the region from the guest's own page allocator: for a guest that nobody has prepared.

It is asked for blocks until enough of them lie side by side in physical memory; the others are given back at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.linux.page_allocator import GFP_NOWARN, PageAllocator, blocks_of, find_page_allocator
from gdb_kprobe.model import PAGE_SIZE, PhysAddr, VirtAddr, offset
from gdb_kprobe.session.guest_calls import guest_calls
from gdb_kprobe.session.linux_guest import LinuxGuest
from gdb_kprobe.target.protocols import Machine

_SEARCHED: Final = 8
"""Of the guest's memory one part in so many may be in our hands while we look for blocks that lie side by side."""
_MOST: Final = 2
"""Never more of it than one part in so many, whatever is asked for."""


def borrow(machine: Machine, guest: LinuxGuest, size: int) -> tuple[PhysAddr, int]:
    """Have the guest allocate *size* bytes in one piece, or as much as it has; nothing of ours may be armed.

    Returns where it is, and its size. The machine runs for a moment: where its vCPUs are stopped may be another place
    afterwards.

    :raises GuestStateError: its allocator cannot be called; nothing was allocated.
    :raises RegionError: it has not a single block; nothing is allocated.
    """
    allocator = _allocator(guest)
    order, wanted = blocks_of(size)
    block = PAGE_SIZE << order
    ram = guest.e820().ram // block
    most = min(max(2 * wanted, ram // _SEARCHED), ram // _MOST)
    found: set[PhysAddr] = set()
    kept: list[PhysAddr] = []
    with guest_calls(machine, guest) as call, contextlib.ExitStack() as undo:

        @undo.callback
        def give_others_back() -> None:
            # The highest first: it hands out again what it got last, so the next one finds them in order.
            for phys in sorted(found.difference(kept), reverse=True):
                call(allocator.free, allocator.address(phys), order)

        longest: list[PhysAddr] = []
        while len(longest) < wanted and len(found) < most:
            address = call(allocator.allocate, GFP_NOWARN, order)
            if not address:
                break
            found.add(guest.memory.translate(VirtAddr(address)))
            longest = longest_run(found, block)
        kept += longest[:wanted]
    if not kept:
        raise RegionError(
            f"the guest has no free block of {block >> 20} MiB for the region",
            "free memory in the guest, or boot it with more; 'region.size: 2M' in the profile is the smallest region",
        )
    return kept[0], block * len(kept)


def longest_run(blocks: Iterable[PhysAddr], size: int) -> list[PhysAddr]:
    """The most of *blocks*, each of *size* bytes, that lie side by side, in ascending order; the lowest of equals."""
    best: list[PhysAddr] = []
    run: list[PhysAddr] = []
    for start in sorted(blocks):
        run = [*run, start] if run and run[-1] + size == start else [start]
        best = max(best, run, key=len)
    return best


def give_back(machine: Machine, guest: LinuxGuest, phys: PhysAddr, size: int) -> None:
    """Have the guest free what :func:`borrow` got. Nobody may be using it, and nothing of ours may be armed.

    :raises GuestStateError: its allocator cannot be called now; the memory stays allocated.
    """
    allocator = _allocator(guest)
    order, count = blocks_of(size)
    with guest_calls(machine, guest) as call:
        for index in reversed(range(count)):
            call(allocator.free, allocator.address(offset(phys, index * (PAGE_SIZE << order))), order)


def _allocator(guest: LinuxGuest) -> PageAllocator:
    return find_page_allocator(guest.memory, guest.kallsyms, guest.banner, guest.memory.levels)
