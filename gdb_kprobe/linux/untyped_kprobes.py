"""The kprobes that a guest has registered whose types are not known: where they are, but not what they have replaced.

Where a kprobe is decides in which list of ``kprobe_table`` it is (``hash_ptr``, include/linux/hash.h): so the table
itself proves that a word of it is an address. All else of a ``struct kprobe`` depends on version and configuration.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Final

from gdb_kprobe.errors import NeedsTypesError, UnmappedError
from gdb_kprobe.linux.guest_kprobes import BUCKETS, MAX_RESERVED, GuestKprobe, GuestKprobes, read_table
from gdb_kprobe.linux.image import MODULES_END, START_KERNEL_MAP
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.model import AddressRange, VirtAddr, offset
from gdb_kprobe.system.bounds import Steps, Visited
from gdb_kprobe.target.protocols import Memory

_ADDR: Final = 40
"""Bytes to the address in a ``struct kprobe``: behind its links and the number of missed hits."""
_GOLDEN_RATIO: Final = 0x61C8_8646_80B5_83EB
_JUMP_SIZE: Final = 5
_TEXT: Final = AddressRange(START_KERNEL_MAP, MODULES_END)
_PATCHED: Final = (b"\xcc", b"\xe9")


def read_untyped_kprobes(memory: Memory, kallsyms: Kallsyms, is_ftrace_nop: Callable[[VirtAddr], bool]) -> GuestKprobes:
    """Read where all of them are, as they are now. What cannot be proven to be one is :attr:`GuestKprobes.unread`.

    :param is_ftrace_nop: whether the guest's ftrace calls a kprobe there: nothing is patched for it.
    """

    steps = Steps("kprobe_table")

    def read(bucket: int, node: VirtAddr) -> Iterator[GuestKprobe]:
        try:
            for addr in _chain(memory, bucket, node, steps):
                kprobe = _kprobe(memory, addr, is_ftrace_nop(addr))
                if kprobe is not None:
                    yield kprobe
        except UnmappedError as error:
            raise NeedsTypesError("a kprobe of the guest's own") from error

    return read_table(memory, kallsyms, read)


def _chain(memory: Memory, bucket: int, node: int, steps: Steps) -> Iterator[VirtAddr]:
    visited = Visited("a chain of kprobe_table", steps)
    while node:
        visited.visit(node)
        following, addr = struct.unpack(f"<Q{_ADDR - 8}xQ", memory.read(VirtAddr(node), _ADDR + 8))
        if _bucket(addr) != bucket or not _TEXT.start <= addr < _TEXT.end:
            raise NeedsTypesError("a kprobe of the guest's own")
        yield VirtAddr(addr)
        node = following


def _bucket(addr: int) -> int:
    return (addr * _GOLDEN_RATIO & (1 << 64) - 1) >> 64 - (BUCKETS - 1).bit_length()


def _kprobe(memory: Memory, addr: VirtAddr, on_ftrace: bool) -> GuestKprobe | None:
    """The one at *addr*; ``None`` when its text is gone, which nothing else of it tells."""
    if on_ftrace:
        return GuestKprobe(addr)
    try:
        first = memory.read(addr, 1)
    except UnmappedError:
        return None
    if first not in _PATCHED:
        # Not armed now.
        return GuestKprobe(addr, first, MAX_RESERVED)
    leads_to = None
    with contextlib.suppress(UnmappedError):
        # Where the four bytes are those of a jump of ours, the kprobe is on it and has saved it.
        distance = int.from_bytes(memory.read(offset(addr, 1), _JUMP_SIZE - 1), "little", signed=True)
        leads_to = offset(addr, _JUMP_SIZE + distance)
    return GuestKprobe(addr, size=MAX_RESERVED, leads_to=leads_to, opaque=True)
