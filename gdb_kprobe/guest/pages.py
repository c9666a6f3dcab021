"""Memory for the region from the guest's own page allocator: for a guest that nobody has prepared.

It is asked for blocks until enough of them lie side by side in physical memory; the others are given back at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestStateError, RegionError
from gdb_kprobe.guest.calls import guest_calls
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.page_allocator import GFP, PageAllocator, blocks_of, find_page_allocator
from gdb_kprobe.model import PAGE_SIZE, PhysAddr, VirtAddr, offset
from gdb_kprobe.target.protocols import Machine

_SEARCHED: Final = 8
"""Of the guest's memory one part in so many may be in our hands while we look for blocks that lie side by side."""
_SECONDS: Final = 3.0
"""No longer do we look."""
_MOST: Final = 2
"""Never more of it than one part in so many, whatever is asked for."""


@dataclass(frozen=True, slots=True)
class Lent:
    """*size* bytes at *start*, in blocks of *order* as the guest's allocator counts."""

    start: PhysAddr
    size: int
    order: int

    def blocks(self) -> list[PhysAddr]:
        """Where each block is."""
        return [offset(self.start, at) for at in range(0, self.size, PAGE_SIZE << self.order)]


def borrow_pages(machine: Machine, guest: LinuxGuest, size: int) -> Lent:
    """Have the guest allocate *size* bytes in one piece, or as much as it has; nothing of ours may be armed.

    The machine runs for a moment: where its vCPUs are stopped may be another place afterwards.

    :raises GuestStateError: its allocator cannot be called, and nothing was allocated; or it did not come back.
    :raises RegionError: it has not a single block; nothing is allocated.
    """
    allocator = _allocator(guest)
    order, wanted = blocks_of(size)
    block = PAGE_SIZE << order
    ram = guest.e820().ram // block
    most = min(max(2 * wanted, ram // _SEARCHED), ram // _MOST)
    deadline = time.monotonic() + _SECONDS
    found: set[PhysAddr] = set()
    kept: list[PhysAddr] = []
    with guest_calls(machine, guest) as call, contextlib.ExitStack() as undo:

        @undo.callback
        def give_others_back() -> None:
            # The highest first: it hands out again what it got last, so the next one finds them in order.
            for phys in sorted(found.difference(kept), reverse=True):
                call(allocator.free, allocator.address(phys), order)

        longest: list[PhysAddr] = []
        while len(longest) < wanted and len(found) < most and time.monotonic() < deadline:
            address = call(allocator.allocate, GFP, order)
            if not address:
                break
            mapped = guest.memory.walk(VirtAddr(address))
            if mapped is None or allocator.address(mapped.phys) != address:
                call(allocator.free, address, order)
                raise GuestStateError(
                    f"the guest's page allocator gave {address:#x}, which is not in the direct map at "
                    f"{allocator.direct_map:#x}",
                    "this kernel is not known well enough: reserve the region's memory ('source: reserved')",
                )
            found.add(mapped.phys)
            longest = longest_run(found, block)
        kept += longest[:wanted]
    if not kept:
        raise RegionError(
            f"the guest has no free block of {block >> 20} MiB for the region",
            "free memory in the guest, or boot it with more; 'region.size: 2M' in the profile is the smallest region",
        )
    return Lent(kept[0], block * len(kept), order)


def longest_run(blocks: Iterable[PhysAddr], size: int) -> list[PhysAddr]:
    """The most of *blocks*, each of *size* bytes, that lie side by side, in ascending order; the lowest of equals."""
    best: list[PhysAddr] = []
    run: list[PhysAddr] = []
    for start in sorted(blocks):
        run = [*run, start] if run and run[-1] + size == start else [start]
        best = max(best, run, key=len)
    return best


@contextlib.contextmanager
def giving_back(machine: Machine, guest: LinuxGuest, lent: Lent) -> Iterator[Callable[[], None]]:
    """Bring the guest to where it can take *lent* back; yields what does it, to be called when nobody uses it.

    :raises GuestStateError: its allocator cannot be called now; the memory stays allocated.
    """
    allocator = _allocator(guest)
    with guest_calls(machine, guest) as call:

        def give_back() -> None:
            for block in reversed(lent.blocks()):
                call(allocator.free, allocator.address(block), lent.order)

        yield give_back


def _allocator(guest: LinuxGuest) -> PageAllocator:
    return find_page_allocator(guest.memory, guest.kallsyms, guest.banner, guest.memory.levels)
