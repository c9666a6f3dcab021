"""Writes to the guest that either all happen, verified, or leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.errors import StaleTextError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.target.protocols import Memory


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
