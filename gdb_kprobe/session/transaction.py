"""Writes to the guest that either all happen, verified, or leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.errors import StaleTextError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.target.protocols import Memory


def apply(memory: Memory, patches: Sequence[CodePatch]) -> None:
    """Verify all old bytes, write in order, read each back; on an error undo what was written, in reverse order.

    :raises StaleTextError: a place holds something else than ``old``; nothing was written.
    :raises TargetError: a write did not take; what was written is undone.
    """
    for patch in patches:
        found = memory.read(patch.addr, len(patch.old))
        if found != patch.old:
            raise StaleTextError(patch.addr, patch.old, found)
    written: list[CodePatch] = []
    try:
        for patch in patches:
            written.append(patch)
            write_verified(memory, patch)
    except BaseException:
        for patch in reversed(written):
            memory.write(patch.addr, patch.old)
        raise


def write_verified(memory: Memory, patch: CodePatch) -> None:
    """Write ``new`` and read it back.

    :raises TargetError: the guest holds something else afterwards.
    """
    memory.write(patch.addr, patch.new)
    found = memory.read(patch.addr, len(patch.new))
    if found != patch.new:
        raise TargetError(
            f"wrote {patch.new.hex(' ')} at {patch.addr:#x}, but the guest holds {found.hex(' ')}",
            "is the page RAM? a ROM or device page cannot be probed",
        )
