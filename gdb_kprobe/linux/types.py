"""What is known of the kernel's types, wherever it is known from: its BTF, its vmlinux, or proofs in its memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from gdb_kprobe.errors import GuestStateError, NeedsTypesError


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member is in its outermost structure, in bytes, and the size of its type."""

    offset: int
    size: int


class Types(Protocol):
    """The structures and enumerations of one kernel, by name (``task_struct``, without ``struct``).

    All methods raise :class:`~gdb_kprobe.errors.NeedsTypesError` where nothing is known of the type; that a kernel
    lacks it, or one of its members, is told only where it is known.
    """

    def member(self, type_name: str, path: str) -> Member:
        """Return member *path* (``a.b``; anonymous structs need no name, an array means its first element).

        :raises GuestStateError: this kernel has no such type or member.
        """

    def has_member(self, type_name: str, path: str) -> bool:
        """Say whether this kernel has that member: the way to tell layouts apart."""

    def offset_of(self, type_name: str, path: str) -> int:
        """Return a member's offset in bytes.

        :raises GuestStateError: this kernel has no such type or member.
        """

    def size_of(self, type_name: str) -> int:
        """Return the size in bytes of a struct or union.

        :raises GuestStateError: this kernel has no such type.
        """

    def enum(self, type_name: str) -> dict[str, int]:
        """Return the enumerators of ``enum type_name``.

        :raises GuestStateError: this kernel has no such type.
        """

    def enumerator(self, name: str) -> int | None:
        """Return the value of the enumerator *name* of whatever enum, also an anonymous one, or None."""

    def functions(self, names: Collection[str]) -> dict[str, int]:
        """Return the type ids of those of the functions *names* whose types are known."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A structure's *size* in bytes, and its members: those that are known, each with its offset and its size."""

    size: int
    members: Mapping[str, Member]


class KnownTypes:
    """The few types of a kernel that has no BTF of which something was proven."""

    def __init__(
        self, layouts: Mapping[str, Callable[[], Layout | None]], enums: Mapping[str, Mapping[str, int]]
    ) -> None:
        """*layouts* prove a structure's layout, complete as far as the readers in this package ask; each is asked once.

        One that proves none gives None.
        """
        self._proofs = dict(layouts)
        self._layouts: dict[str, Layout | None] = {}
        self._enums = {name: dict(values) for name, values in enums.items()}

    def member(self, type_name: str, path: str) -> Member:
        found = self._layout(type_name).members.get(path)
        if found is None:
            raise GuestStateError(f"the guest's kernel has no {type_name}.{path}", "its version has another layout")
        return found

    def has_member(self, type_name: str, path: str) -> bool:
        return path in self._layout(type_name).members

    def offset_of(self, type_name: str, path: str) -> int:
        return self.member(type_name, path).offset

    def size_of(self, type_name: str) -> int:
        return self._layout(type_name).size

    def enum(self, type_name: str) -> dict[str, int]:
        if type_name not in self._enums:
            raise NeedsTypesError(f"enum {type_name}")
        return dict(self._enums[type_name])

    def enumerator(self, name: str) -> int | None:
        raise NeedsTypesError(f"the enumerator {name}")

    def functions(self, names: Collection[str]) -> dict[str, int]:
        raise NeedsTypesError("the types of functions")

    def _layout(self, type_name: str) -> Layout:
        if type_name not in self._layouts:
            prove = self._proofs.get(type_name)
            self._layouts[type_name] = None if prove is None else prove()
        found = self._layouts[type_name]
        if found is None:
            raise NeedsTypesError(f"struct {type_name}")
        return found
