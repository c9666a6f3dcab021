"""The kprobes that the guest itself has registered, and which text is theirs.

``kprobe_table`` (kernel/kprobes.c) is a hash of all of them, by address, the disabled ones too. Code that decodes text
must see it without them, as the kernel's ``recover_probed_instruction`` does.

Whether a kprobe may become a jump is decided when it is registered, enabled or not: ``try_to_optimize_kprobe`` decodes
the instructions that the jump would displace, and copies them (``arch_prepare_optimized_kprobe``). Nothing is decoded
again when the jump is written, some ticks after the kprobe was enabled (``arch_optimize_kprobes``): the 4 bytes behind
the int3 are saved as they are then, and written back later. So all bytes that were copied belong to such a kprobe from
its registration on.

One whose text is gone (KPROBE_FLAG_GONE: a module was unloaded, init text was freed) stays in the table until it is
unregistered. It patches nothing any more, and what is at its address now is no business of its.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.image import MODULES_END, START_KERNEL_MAP
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import Struct, read_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, VirtAddr, offset
from gdb_kprobe.system.bounds import Steps, Visited, damaged
from gdb_kprobe.target.protocols import Memory

BUCKETS: Final = 64  # 1 << KPROBE_HASH_BITS
_TEXT: Final = AddressRange(START_KERNEL_MAP, MODULES_END)
_GONE: Final = 1  # KPROBE_FLAG_GONE
_OPTIMIZED: Final = 4  # KPROBE_FLAG_OPTIMIZED
_ON_FTRACE: Final = 8  # KPROBE_FLAG_FTRACE
_JMP_REL32: Final = b"\xe9"
_JMP_REL32_SIZE: Final = 5
_INT3_SIZE: Final = 1
MAX_RESERVED: Final = 4 + 15
"""MAX_OPTIMIZED_LENGTH, arch/x86/include/asm/kprobes.h: a jump's bytes but for one, and the longest instruction."""


@dataclass(frozen=True, slots=True)
class GuestKprobe:
    """One kprobe of the guest's own.

    *original* is what was at *addr* before its int3 or jump; empty where it patches nothing itself (ftrace calls it).
    *size*: bytes of text from *addr* on that it has patched, or may patch at any time. *leads_to* is where the jump
    goes, rel32, that was there when it was registered; ``None`` where another instruction was. *opaque*: what it has
    patched is not known, so that its function cannot be decoded.
    """

    addr: VirtAddr
    original: bytes = b""
    size: int = _INT3_SIZE
    leads_to: VirtAddr | None = None
    opaque: bool = False

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.addr, offset(self.addr, self.size))


class GuestKprobes:
    """All of them at one moment; or as many as can be read, and *unread* is why not all."""

    def __init__(self, kprobes: Iterable[GuestKprobe] = (), unread: GuestStateError | None = None) -> None:
        self._all = sorted(kprobes, key=lambda kprobe: kprobe.addr)
        self._addrs = [kprobe.addr for kprobe in self._all]
        self.unread = unread

    def check_all(self) -> None:
        """Before text is patched, or decoded: each of them must be known.

        :raises GuestStateError: there may be more than could be read.
        """
        if self.unread is not None:
            raise GuestStateError(self.unread.message, self.unread.hint)

    def __iter__(self) -> Iterator[GuestKprobe]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def at(self, addr: VirtAddr) -> GuestKprobe | None:
        """The one that is exactly at *addr*."""
        index = bisect_left(self._addrs, addr)
        return self._all[index] if index < len(self._addrs) and self._addrs[index] == addr else None

    def within(self, text: AddressRange) -> Iterator[GuestKprobe]:
        """Those to which a byte of *text* belongs, the lowest first."""
        if not self._all:
            return
        first = bisect_left(self._addrs, text.start - MAX_RESERVED + 1)
        for kprobe in self._all[first : bisect_left(self._addrs, text.end)]:
            if kprobe.range.overlaps(text):
                yield kprobe


def read_guest_kprobes(memory: Memory, kallsyms: Kallsyms, types: Types) -> GuestKprobes:
    """Read all of them, as they are now. Without CONFIG_KPROBES there are none."""
    if not types.has_member("kprobe", "hlist"):
        return GuestKprobes()
    link = types.offset_of("kprobe", "hlist")
    # An aggregate (kprobe_aggrprobe()), which is part of a struct optimized_kprobe, is known by its handler.
    aggregate = kallsyms.find("aggr_pre_handler") if types.has_member("optimized_kprobe", "optinsn") else None

    steps = Steps("kprobe_table")

    def read(bucket: int, node: VirtAddr) -> Iterator[GuestKprobe]:
        for probe in _chain(memory, types, node, link, steps):
            if not probe.uint("flags") & _GONE:
                yield _kprobe(memory, probe, aggregate)

    return read_table(memory, kallsyms, read)


def read_table(
    memory: Memory, kallsyms: Kallsyms, read: Callable[[int, VirtAddr], Iterable[GuestKprobe]]
) -> GuestKprobes:
    """What *read* finds from the first node of each list of ``kprobe_table`` on, which it is given with its number."""
    table = kallsyms.find("kprobe_table")
    if table is None:
        return GuestKprobes()
    found: list[GuestKprobe] = []
    unread: GuestStateError | None = None
    for bucket, head in enumerate(struct.unpack(f"<{BUCKETS}Q", memory.read(table, 8 * BUCKETS))):
        try:
            for kprobe in read(bucket, VirtAddr(head)) if head else ():
                found.append(kprobe)  # those in front of one that cannot be read are known
        except UnmappedError as error:
            unread = GuestStateError(
                f"a kprobe of the guest's own cannot be read: {error.message}",
                "remove the guest's own kprobes, also those that are disabled; or its memory is damaged",
            )
        except GuestStateError as error:
            unread = error
    return GuestKprobes(found, unread)


def _chain(memory: Memory, types: Types, node: VirtAddr, link: int, steps: Steps) -> Iterator[Struct]:
    visited = Visited("a chain of kprobe_table", steps)
    while node:
        visited.visit(node)
        probe = read_struct(memory, types, "kprobe", VirtAddr(node - link))
        yield probe
        node = probe.pointer("hlist.next")


def _kprobe(memory: Memory, probe: Struct, aggregate: VirtAddr | None) -> GuestKprobe:
    flags, addr = probe.uint("flags"), probe.pointer("addr")
    if addr not in _TEXT:
        raise damaged(f"the kprobe of the guest's own at {probe.addr:#x} is for {addr:#x}, where no kernel text can be")
    if flags & _ON_FTRACE:
        return GuestKprobe(addr)
    original = bytes((probe.uint("opcode") & 0xFF,))
    leads_to = _leads_to(memory, probe, addr) if original == _JMP_REL32 else None
    if aggregate is None or probe.pointer("pre_handler") != aggregate:
        return GuestKprobe(addr, original, leads_to=leads_to)
    optimized = VirtAddr(probe.addr - probe.types.offset_of("optimized_kprobe", "kp"))
    # 0: it was not prepared (arch_prepared_optinsn()), and stays an int3.
    prepared = read_struct(memory, probe.types, "optimized_kprobe", optimized).uint("optinsn.size")
    # The flag comes first: the bytes are saved when the jump is written, up to some ticks later.
    if prepared and flags & _OPTIMIZED and memory.read(addr, 1) == _JMP_REL32:
        member = probe.types.member("optimized_kprobe", "optinsn.copied_insn")
        if member.size >= MAX_RESERVED:
            raise damaged(f"optimized_kprobe.optinsn.copied_insn has {member.size} bytes")
        original += memory.read(offset(optimized, member.offset), member.size)
    return GuestKprobe(addr, original, min(max(prepared, len(original)), MAX_RESERVED), leads_to)


def _leads_to(memory: Memory, probe: Struct, addr: VirtAddr) -> VirtAddr | None:
    """Where the jump goes that the slot of *probe* has a copy of; its displacement counts from the original."""
    copy = memory.read(probe.pointer("ainsn.insn"), _JMP_REL32_SIZE)
    if not copy.startswith(_JMP_REL32):
        return None
    return offset(addr, _JMP_REL32_SIZE + int.from_bytes(copy[1:], "little", signed=True))
