"""Writes to the guest that either all happen, verified, or leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Final

from gdb_kprobe.errors import StaleTextError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.model import PAGE_SIZE, VirtAddr
from gdb_kprobe.target.protocols import Memory

_MANY: Final = 4
"""Patches in a page that are applied at once."""


def apply(memory: Memory, patches: Sequence[CodePatch]) -> None:
    """Verify all old bytes, write in order, read each back; on an error undo what was written, in reverse order.

    :raises StaleTextError: a place holds something else than ``old``; nothing was written.
    :raises TargetError: a write did not take; what was written is undone.
    """
    verify(memory, patches)
    written: list[CodePatch] = []
    try:
        for patch in patches:
            written.append(patch)
            write_verified(memory, patch.addr, patch.new)
    except BaseException:
        for patch in reversed(written):
            memory.write(patch.addr, patch.old)
        raise


def apply_by_page(memory: Memory, patches: Iterable[CodePatch]) -> list[CodePatch]:
    """Apply those of *patches* whose old bytes are there; where many are in one page, it is read and written at once.

    Returns the others, of which nothing is written: :func:`apply` finds out what is wrong with each. Nothing need be:
    those in two pages are left, too.
    """
    pages: dict[int, list[CodePatch]] = {}
    left: list[CodePatch] = []
    for patch in patches:
        page = patch.addr & -PAGE_SIZE
        if patch.addr + len(patch.new) > page + PAGE_SIZE:
            left.append(patch)
        else:
            pages.setdefault(page, []).append(patch)
    for page, within in pages.items():
        # What lies between many is written, too; few are not worth that.
        left += within if len(within) < _MANY else _apply_within(memory, VirtAddr(page), within)
    return left


def _apply_within(memory: Memory, page: VirtAddr, patches: Sequence[CodePatch]) -> Sequence[CodePatch]:
    """The same of *patches* within *page*."""
    left = []
    try:
        before = memory.read(page, PAGE_SIZE)
    except TargetError:
        return patches
    text = bytearray(before)
    first, last = PAGE_SIZE, 0
    for patch in patches:
        old = patch.old
        start = patch.addr - page
        end = start + len(old)
        if text[start:end] != old:
            left.append(patch)
            continue
        text[start:end] = patch.new
        first = min(first, start)
        last = max(last, end)
    if first < last:
        try:
            write_verified(memory, VirtAddr(page + first), bytes(text[first:last]))
        except TargetError:
            with contextlib.suppress(TargetError):
                memory.write(VirtAddr(page + first), before[first:last])
            return patches
    return left


def verify(memory: Memory, patches: Sequence[CodePatch]) -> None:
    """Compare all old bytes, and write nothing.

    :raises StaleTextError: a place holds something else.
    """
    for patch in patches:
        found = memory.read(patch.addr, len(patch.old))
        if found != patch.old:
            raise StaleTextError(patch.addr, patch.old, found)


def holds(memory: Memory, addr: VirtAddr, data: bytes) -> bool:
    """Whether *data* is at *addr*; what is not mapped, or no RAM, holds nothing."""
    try:
        return memory.read(addr, len(data)) == data
    except TargetError:
        return False


def write_verified(memory: Memory, addr: VirtAddr, data: bytes) -> None:
    """Write *data*, over whatever is there, and read it back.

    :raises TargetError: the guest holds something else afterwards.
    """
    memory.write(addr, data)
    found = memory.read(addr, len(data))
    if found != data:
        raise TargetError(
            f"wrote {data.hex(' ')} at {addr:#x}, but the guest holds {found.hex(' ')}",
            "is the page RAM? a ROM or device page cannot be probed",
        )
