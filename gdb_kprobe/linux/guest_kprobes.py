"""The kprobes that the guest itself has registered, and what they have overwritten.

``kprobe_table`` (kernel/kprobes.c) is a hash of all of them, by address. Whoever decodes text must see it without them,
as the kernel's ``recover_probed_instruction`` does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.btf import Btf
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import Struct, read_struct
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.target.protocols import Memory

_BUCKETS: Final = 64  # 1 << KPROBE_HASH_BITS
_MOST: Final = 1 << 16
_OPTIMIZED: Final = 4  # KPROBE_FLAG_OPTIMIZED
_ON_FTRACE: Final = 8  # KPROBE_FLAG_FTRACE
_JMP_REL32: Final = b"\xe9"


@dataclass(frozen=True, slots=True)
class GuestKprobe:
    """*original* is what was at *addr* before the guest's int3 or jump; empty where it has patched nothing there."""

    addr: VirtAddr
    original: bytes


def read_guest_kprobes(memory: Memory, kallsyms: Kallsyms, btf: Btf) -> tuple[GuestKprobe, ...]:
    """Read all of them, as they are now. Without CONFIG_KPROBES there are none.

    :raises UnmappedError: the table leads to unmapped memory.
    :raises GuestStateError: a chain of it has no end.
    """
    table = kallsyms.find("kprobe_table")
    if table is None or not btf.has_member("kprobe", "hlist"):
        return ()
    link = btf.offset_of("kprobe", "hlist")
    heads = struct.unpack(f"<{_BUCKETS}Q", memory.read(table, 8 * _BUCKETS))
    return tuple(
        _kprobe(memory, probe) for head in heads if head for probe in _chain(memory, btf, VirtAddr(head), link)
    )


def _chain(memory: Memory, btf: Btf, node: VirtAddr, link: int) -> Iterator[Struct]:
    for _ in range(_MOST):
        probe = read_struct(memory, btf, "kprobe", VirtAddr(node - link))
        yield probe
        node = probe.pointer("hlist.next")
        if not node:
            return
    raise GuestStateError("a chain of kprobe_table has no end", "the guest's memory is damaged")


def _kprobe(memory: Memory, probe: Struct) -> GuestKprobe:
    flags = probe.uint("flags")
    if flags & _ON_FTRACE:
        return GuestKprobe(probe.pointer("addr"), b"")
    addr, original = probe.pointer("addr"), bytes((probe.uint("opcode"),))
    # The flag comes first: the bytes are saved when the jump is written, up to some ticks later.
    if flags & _OPTIMIZED and memory.read(addr, 1) == _JMP_REL32:
        member = probe.btf.member("optimized_kprobe", "optinsn.copied_insn")
        start = probe.addr - probe.btf.offset_of("optimized_kprobe", "kp") + member.offset
        original += memory.read(VirtAddr(start), member.size)
    return GuestKprobe(addr, original)
