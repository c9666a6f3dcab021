"""Kernel structures in guest memory, read with the offsets that BTF gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.target.protocols import Memory

_LONGEST_LIST = 1 << 17


@dataclass(frozen=True, slots=True)
class Struct:
    """A copy of one structure: where it is, its type's name and its bytes."""

    types: Types
    type_name: str
    addr: VirtAddr
    data: bytes

    def has(self, path: str) -> bool:
        """Say whether this kernel's type has the member."""
        return self.types.has_member(self.type_name, path)

    def uint(self, path: str) -> int:
        """Return an integer or pointer member, unsigned.

        :raises GuestStateError: this kernel has no such member.
        """
        member = self.types.member(self.type_name, path)
        return int.from_bytes(self.data[member.offset : member.offset + member.size], "little")

    def sint(self, path: str) -> int:
        """Return an integer member, signed.

        :raises GuestStateError: this kernel has no such member.
        """
        member = self.types.member(self.type_name, path)
        return int.from_bytes(self.data[member.offset : member.offset + member.size], "little", signed=True)

    def pointer(self, path: str) -> VirtAddr:
        """Return a pointer member.

        :raises GuestStateError: this kernel has no such member.
        """
        return VirtAddr(self.uint(path))

    def string(self, path: str) -> str:
        """Return a character-array member up to its NUL.

        :raises GuestStateError: this kernel has no such member.
        """
        member = self.types.member(self.type_name, path)
        return self.data[member.offset : member.offset + member.size].partition(b"\0")[0].decode("utf-8", "replace")


def read_struct(memory: Memory, types: Types, type_name: str, addr: VirtAddr) -> Struct:
    """Read the whole ``struct`` (or ``union``) *type_name* at *addr*.

    :raises UnmappedError: it is not there.
    :raises GuestStateError: this kernel has no such type.
    """
    return Struct(types, type_name, addr, memory.read(addr, types.size_of(type_name)))


def read_pointer(memory: Memory, addr: VirtAddr) -> VirtAddr:
    """Read the 8-byte pointer at *addr*.

    :raises UnmappedError: it is not there.
    """
    return VirtAddr(int.from_bytes(memory.read(addr, 8), "little"))


def for_each_list_entry(memory: Memory, head: VirtAddr, member_offset: int) -> Iterator[VirtAddr]:
    """Yield the structures on the ``list_head`` at *head*, each having its list node at *member_offset*.

    :raises UnmappedError: the list leads to unmapped memory.
    :raises GuestStateError: it does not come back to its head.
    """
    node = read_pointer(memory, head)
    for _ in range(_LONGEST_LIST):
        if node == head:
            return
        yield VirtAddr(node - member_offset)
        node = read_pointer(memory, node)
    raise _endless(head)


def for_each_struct(memory: Memory, types: Types, type_name: str, member: str, head: VirtAddr) -> Iterator[Struct]:
    """Yield copies of the structures on the ``list_head`` at *head*, linked by their *member*; one read for each.

    :raises UnmappedError: the list leads to unmapped memory.
    :raises GuestStateError: it does not come back to its head, or this kernel has no such type.
    """
    offset = types.offset_of(type_name, member)
    node = read_pointer(memory, head)
    for _ in range(_LONGEST_LIST):
        if node == head:
            return
        found = read_struct(memory, types, type_name, VirtAddr(node - offset))
        yield found
        node = found.pointer(f"{member}.next")
    raise _endless(head)


def _endless(head: VirtAddr) -> GuestStateError:
    return GuestStateError(f"the list at {head:#x} has no end", "the guest's memory is damaged, or not yet initialized")
