"""Memory for the region from the guest's own page allocator: for a guest that nobody has prepared.

It is asked for whole blocks until some lie side by side in physical memory; the others are given back at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.linux.page_allocator import GFP_NOWARN, PageAllocator, blocks_of, find_page_allocator
from gdb_kprobe.model import PAGE_SIZE, PhysAddr, VirtAddr
from gdb_kprobe.session.guest_calls import guest_calls
from gdb_kprobe.session.linux_guest import LinuxGuest
from gdb_kprobe.target.protocols import Machine

_TRIES: Final = 8
"""How many times what is needed may be in our hands before it is said that there is not so much in one piece."""


def borrow(machine: Machine, guest: LinuxGuest, size: int) -> PhysAddr:
    """Have the guest allocate *size* bytes in one piece; nothing of ours may be armed.

    The machine runs for a moment: where its vCPUs are stopped may be another place afterwards.

    :raises GuestStateError: its allocator cannot be called; nothing was allocated.
    :raises RegionError: it has no such piece; nothing is allocated.
    """
    allocator = _allocator(guest)
    order, wanted = blocks_of(size)
    found: set[PhysAddr] = set()
    with guest_calls(machine, guest) as call, contextlib.ExitStack() as undo:

        def give_back(blocks: Iterable[PhysAddr]) -> None:
            for phys in blocks:
                call(allocator.free, allocator.address(phys), order)

        undo.callback(lambda: give_back(found))
        while len(found) < _TRIES * wanted:
            block = call(allocator.allocate, GFP_NOWARN, order)
            if not block:
                break
            found.add(guest.memory.translate(VirtAddr(block)))
            start = _run(found, wanted, PAGE_SIZE << order)
            if start is not None:
                undo.pop_all()
                give_back(found - set(_blocks(start, wanted, PAGE_SIZE << order)))
                return start
    block_mib = PAGE_SIZE << order >> 20
    pieces = f"of {len(found)} blocks of {block_mib} MiB no {wanted} lie side by side" if found else "it gave none"
    less = ", or ask for less ('region.size: 4M' in the profile is one block)" if wanted > 1 else ""
    raise RegionError(
        f"the guest has no {size >> 20} MiB of free memory in one piece: {pieces}",
        f"free memory in the guest, or boot it with more{less}",
    )


def give_back(machine: Machine, guest: LinuxGuest, phys: PhysAddr, size: int) -> None:
    """Have the guest free what :func:`borrow` got. Nobody may be using it, and nothing of ours may be armed.

    :raises GuestStateError: its allocator cannot be called now; the memory stays allocated.
    """
    allocator = _allocator(guest)
    order, count = blocks_of(size)
    with guest_calls(machine, guest) as call:
        for block in _blocks(phys, count, PAGE_SIZE << order):
            call(allocator.free, allocator.address(block), order)


def _allocator(guest: LinuxGuest) -> PageAllocator:
    return find_page_allocator(guest.memory, guest.kallsyms, guest.banner, guest.memory.levels)


def _run(blocks: set[PhysAddr], wanted: int, size: int) -> PhysAddr | None:
    """The start of *wanted* blocks that lie side by side."""
    return next((start for start in sorted(blocks) if blocks.issuperset(_blocks(start, wanted, size))), None)


def _blocks(start: PhysAddr, count: int, size: int) -> list[PhysAddr]:
    return [PhysAddr(start + index * size) for index in range(count)]
