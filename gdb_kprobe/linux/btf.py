"""The kernel's type information (BTF), read from the guest: member offsets, sizes and enumerators.

Format: Documentation/bpf/btf.rst. A type's id is its position, so one pass over all types is needed; it looks at two
words of each and keeps only where it is and, for what can be asked for by name, its name.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Collection, Iterator

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.strings import c_string
from gdb_kprobe.linux.types import Member
from gdb_kprobe.system.bounds import Steps, damaged, decodes
from gdb_kprobe.target.protocols import Memory

_MAGIC = 0xEB9F

# Kinds, include/uapi/linux/btf.h.
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT = 8, 9, 10, 11
_FUNC, _FLOAT, _TYPE_TAG, _ENUM64 = 12, 16, 18, 19
_TRANSPARENT = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})
_NAMED = frozenset({_STRUCT, _UNION, _ENUM, _ENUM64})

_WHAT = "the kernel's type information (BTF) is damaged"
_MOST_STEPS = 1 << 18
"""Types and members that are looked at for one question."""
_DEEPEST = 32
"""Anonymous structures in each other."""
_LARGEST = 1 << 20
"""Bytes of a structure that is read; the exception stacks of a CPU are some 100 KiB."""

# 32-bit words after the three that every type has: (fixed, for each of its vlen items), by kind.
_EXTRA = {
    _INT: (1, 0),
    _ARRAY: (3, 0),
    _STRUCT: (0, 3),
    _UNION: (0, 3),
    _ENUM: (0, 2),
    13: (0, 2),  # FUNC_PROTO
    14: (1, 0),  # VAR
    15: (0, 3),  # DATASEC
    17: (1, 0),  # DECL_TAG
    _ENUM64: (0, 3),
}


class Btf:
    """One BTF blob. Type names are looked up among structs and unions (``task_struct``) or enums."""

    def __init__(self, data: bytes) -> None:
        """Index *data*.

        :raises GuestStateError: it is not BTF.
        """
        try:
            magic, _version, _flags, header, type_start, type_size, str_start, str_size = struct.unpack_from(
                "<HBBIIIII", data
            )
        except struct.error:
            magic = header = type_start = type_size = str_start = str_size = 0
        if magic != _MAGIC or header + str_start + str_size > len(data) or type_size % 4:
            raise GuestStateError(
                "the kernel's type information (BTF) is damaged or cut off",
                "the kernel needs CONFIG_DEBUG_INFO_BTF, and must have been booted far enough",
            )
        self._strings = data[header + str_start : header + str_start + str_size]
        self._words = array("I", data[header + type_start : header + type_start + type_size])
        self._starts = array("I", [0])
        self._ids_of_name: dict[int, list[int]] = {}
        self._enums: list[int] = []
        # Looking for a string takes 0.1 ms: what was asked for once is kept.
        self._ids_of_type: dict[str, list[int]] = {}
        self._members: dict[tuple[str, str], Member | None] = {}
        self._index()

    def find_member(self, type_name: str, path: str) -> Member | None:
        """Return member *path* (``a.b``; anonymous structs need no name, an array means its first element) or None."""
        key = (type_name, path)
        if key not in self._members:
            self._members[key] = self._look_for(type_name, path)
        return self._members[key]

    @decodes(_WHAT)
    def _look_for(self, type_name: str, path: str) -> Member | None:
        steps = Steps(f"{_WHAT}: the search for {type_name}.{path}", _MOST_STEPS)
        for type_id in self._ids(type_name):
            found = self._resolve(type_id, path, steps)
            if found is not None:
                if found.offset + found.size > _LARGEST:
                    raise damaged(f"{_WHAT}: {type_name}.{path} has {found.size} bytes at {found.offset}")
                return found
        return None

    def member(self, type_name: str, path: str) -> Member:
        """Like :meth:`find_member`.

        :raises GuestStateError: this kernel has no such type or member.
        """
        found = self.find_member(type_name, path)
        if found is None:
            raise GuestStateError(
                f"the guest's kernel has no {type_name}.{path}",
                "its version or configuration has another layout than is known here",
            )
        return found

    def has_member(self, type_name: str, path: str) -> bool:
        """Say whether this kernel has that member: the way to tell layouts apart."""
        return self.find_member(type_name, path) is not None

    def offset_of(self, type_name: str, path: str) -> int:
        """Return a member's offset in bytes.

        :raises GuestStateError: this kernel has no such type or member.
        """
        return self.member(type_name, path).offset

    @decodes(_WHAT)
    def size_of(self, type_name: str) -> int:
        """Return the size in bytes of a struct or union.

        :raises GuestStateError: this kernel has no such type.
        """
        for type_id in self._ids(type_name):
            if self._kind(type_id) in (_STRUCT, _UNION):
                size = self._words[self._starts[type_id] + 2]
                if not 0 < size <= _LARGEST:
                    raise damaged(f"{_WHAT}: {type_name} has {size} bytes")
                return size
        raise GuestStateError(f"the guest's kernel has no type {type_name}", "its version or configuration lacks it")

    @decodes(_WHAT)
    def enum(self, type_name: str) -> dict[str, int]:
        """Return the enumerators of ``enum type_name``.

        :raises GuestStateError: this kernel has no such type.
        """
        for type_id in self._ids(type_name):
            if self._kind(type_id) in (_ENUM, _ENUM64):
                return dict(self._enumerators(type_id))
        raise GuestStateError(f"the guest's kernel has no enum {type_name}", "its version or configuration lacks it")

    @decodes(_WHAT)
    def enumerator(self, name: str) -> int | None:
        """Return the value of the enumerator *name* of whatever enum, also an anonymous one, or None."""
        wanted = self._string_offset(name)
        if wanted is None:
            return None
        for type_id in self._enums:
            step = 3 if self._kind(type_id) == _ENUM64 else 2
            start = self._starts[type_id] + 3
            if wanted in self._words[start : start + step * self._vlen(type_id) : step]:
                return dict(self._enumerators(type_id)).get(name)
        return None

    @decodes(_WHAT)
    def functions(self, names: Collection[str]) -> dict[str, int]:
        """Return the type ids of those of the functions *names* that it describes."""
        wanted = {at: name for name in names if (at := self._string_offset(name)) is not None}
        return {
            wanted[self._words[start]]: type_id
            for type_id, start in enumerate(self._starts)
            if self._words[start] in wanted and self._kind(type_id) == _FUNC
        }

    @decodes(_WHAT)
    def _index(self) -> None:
        words, starts = self._words, self._starts
        extra = [_EXTRA.get(kind, (0, 0)) for kind in range(32)]
        at = 0
        end = len(words)
        while at < end:
            info = words[at + 1]
            kind = info >> 24 & 0x1F
            if kind in _NAMED:
                if words[at]:
                    self._ids_of_name.setdefault(words[at], []).append(len(starts))
                if kind in (_ENUM, _ENUM64):
                    self._enums.append(len(starts))
            starts.append(at)
            fixed, each = extra[kind]
            at += 3 + fixed + each * (info & 0xFFFF)

    def _kind(self, type_id: int) -> int:
        return self._words[self._starts[type_id] + 1] >> 24 & 0x1F if type_id else 0

    def _vlen(self, type_id: int) -> int:
        return self._words[self._starts[type_id] + 1] & 0xFFFF

    def _string(self, at: int) -> str:
        if at >= len(self._strings):
            raise IndexError(f"string {at}")
        return c_string(self._strings, at)

    def _string_offset(self, name: str) -> int | None:
        # pahole and the linker's BTF pass store each string once.
        found = self._strings.find(b"\0" + name.encode() + b"\0")
        return None if found < 0 else found + 1

    def _ids(self, type_name: str) -> list[int]:
        if type_name not in self._ids_of_type:
            at = self._string_offset(type_name)
            self._ids_of_type[type_name] = [] if at is None else self._ids_of_name.get(at, [])
        return self._ids_of_type[type_name]

    def _strip(self, type_id: int, steps: Steps) -> int:
        """Follow typedefs and qualifiers."""
        while self._kind(type_id) in _TRANSPARENT:
            steps.take()
            type_id = self._words[self._starts[type_id] + 2]
        return type_id

    def _size(self, type_id: int, steps: Steps) -> int:
        count = 1
        while self._kind(type_id := self._strip(type_id, steps)) == _ARRAY:
            steps.take()
            start = self._starts[type_id]
            type_id, count = self._words[start + 3], min(count * self._words[start + 5], _LARGEST + 1)
        match self._kind(type_id):
            case kind if kind == _PTR:
                return 8 * count
            case kind if kind in (_INT, _STRUCT, _UNION, _ENUM, _ENUM64, _FLOAT):
                return self._words[self._starts[type_id] + 2] * count
        return 0

    def _enumerators(self, type_id: int) -> Iterator[tuple[str, int]]:
        words, at = self._words, self._starts[type_id] + 3
        signed = bool(words[at - 2] >> 31)
        wide = self._kind(type_id) == _ENUM64
        for _ in range(self._vlen(type_id)):
            value = words[at + 1] | (words[at + 2] << 32 if wide else 0)
            bits = 64 if wide else 32
            if signed and value >> bits - 1:
                value -= 1 << bits
            yield self._string(words[at]), value
            at += 3 if wide else 2

    def _resolve(self, type_id: int, path: str, steps: Steps) -> Member | None:
        offset = 0
        for name in path.split("."):
            found = self._direct(type_id, name, steps)
            if found is None:
                return None
            offset += found[0]
            type_id = found[1]
        return Member(offset, self._size(type_id, steps))

    def _direct(self, type_id: int, name: str, steps: Steps, depth: int = 0) -> tuple[int, int] | None:
        """Return (byte offset, type) of the member *name*, also inside anonymous members."""
        if depth > _DEEPEST:
            raise damaged(f"{_WHAT}: {name} is looked for in structures that contain themselves")
        type_id = self._strip(type_id, steps)
        while self._kind(type_id) == _ARRAY:
            steps.take()
            type_id = self._strip(self._words[self._starts[type_id] + 3], steps)
        if self._kind(type_id) not in (_STRUCT, _UNION):
            return None
        start = self._starts[type_id]
        # With the flag (bit 31) the upper 8 bits of an offset are a bit field's width.
        mask = 0xFF_FFFF if self._words[start + 1] >> 31 else 0xFFFF_FFFF
        for at in range(start + 3, start + 3 + 3 * self._vlen(type_id), 3):
            steps.take()
            name_at, member_type, bits = self._words[at : at + 3]
            offset = (bits & mask) // 8
            if name_at:
                if self._string(name_at) == name:
                    return offset, member_type
            else:
                inner = self._direct(member_type, name, steps, depth + 1)
                if inner is not None:
                    return offset + inner[0], inner[1]
        return None


def read_btf(memory: Memory, kallsyms: Kallsyms) -> Btf | None:
    """Read the BTF of the core kernel; ``None`` if it has none.

    :raises GuestStateError: it is damaged.
    """
    section = kallsyms.section("__start_BTF", "__stop_BTF")
    return _parsed(memory.read(section.start, section.size)) if section is not None and section.size else None


@functools.lru_cache(maxsize=1)
def _parsed(data: bytes) -> Btf:
    """A guest that is attached to again has, almost always, the kernel of the last time."""
    return Btf(data)
