"""Kernel structures in guest memory, read with the offsets that BTF gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.linux.strings import c_string
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.system.bounds import Steps, Visited, damaged
from gdb_kprobe.target.protocols import Memory

_WORD = 8


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
        return int.from_bytes(self._integer(path), "little")

    def sint(self, path: str) -> int:
        """Return an integer member, signed.

        :raises GuestStateError: this kernel has no such member.
        """
        return int.from_bytes(self._integer(path), "little", signed=True)

    def pointer(self, path: str) -> VirtAddr:
        """Return a pointer member.

        :raises GuestStateError: this kernel has no such member.
        """
        return VirtAddr(self.uint(path))

    def string(self, path: str) -> str:
        """Return a character-array member up to its NUL, as it can be shown.

        :raises GuestStateError: this kernel has no such member.
        """
        return c_string(self._bytes(path))

    def _integer(self, path: str) -> bytes:
        data = self._bytes(path)
        if len(data) > _WORD:
            raise damaged(f"the type of {self.type_name}.{path} is an integer of {len(data)} bytes")
        return data

    def _bytes(self, path: str) -> bytes:
        member = self.types.member(self.type_name, path)
        end = member.offset + member.size
        if end > len(self.data):
            raise damaged(f"{self.type_name}.{path} ends at {end}, beyond the {len(self.data)} bytes of its structure")
        return self.data[member.offset : end]


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


def for_each_list_entry(
    memory: Memory, head: VirtAddr, member_offset: int, steps: Steps | None = None
) -> Iterator[VirtAddr]:
    """Yield the structures on the ``list_head`` at *head*, each having its list node at *member_offset*.

    *steps* are those of the question that the list is one of several for.

    :raises UnmappedError: the list leads to unmapped memory.
    :raises GuestStateError: it does not come back to its head.
    """
    visited = Visited(f"the list at {head:#x}", steps)
    node = read_pointer(memory, head)
    while node != head:
        visited.visit(node)
        yield VirtAddr(node - member_offset)
        node = read_pointer(memory, node)


def for_each_struct(memory: Memory, types: Types, type_name: str, member: str, head: VirtAddr) -> Iterator[Struct]:
    """Yield copies of the structures on the ``list_head`` at *head*, linked by their *member*; one read for each.

    :raises UnmappedError: the list leads to unmapped memory.
    :raises GuestStateError: it does not come back to its head, or this kernel has no such type.
    """
    offset = types.offset_of(type_name, member)
    visited = Visited(f"the {type_name} list at {head:#x}")
    node = read_pointer(memory, head)
    while node != head:
        visited.visit(node)
        found = read_struct(memory, types, type_name, VirtAddr(node - offset))
        yield found
        node = found.pointer(f"{member}.next")
