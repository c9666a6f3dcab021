"""Bounds on what the guest's memory may have us do: it is data of another machine, which may be broken or hostile.

Each reader of this package follows pointers, counts and lengths that the guest has written. None of them is taken as
it is: a list is followed for a number of steps and never twice through the same node, an array has a most that no
kernel comes near, a range must not end before it begins. What breaks a bound is a :class:`GuestStateError` that names
what was read. (docs/internals/untrusted-guest.md)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Final, ParamSpec, TypeVar

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.target.protocols import Memory

_MOST_STEPS: Final = 1 << 17
_MOST_BYTES: Final = 64 << 20
HINT: Final = "the guest's memory is damaged, or not yet initialized"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def damaged(what: str) -> GuestStateError:
    """Return the error for *what* cannot be, the beginning of a sentence."""
    return GuestStateError(what, HINT)


@dataclass(slots=True)
class Steps:
    """What one question may cost yet: *left* steps, of *what*. Shared by lists that lie in lists."""

    what: str
    left: int = _MOST_STEPS

    def take(self, count: int = 1) -> None:
        """Make *count* of them.

        :raises GuestStateError: there are not so many left.
        """
        self.left -= count
        if self.left < 0:
            raise damaged(f"{self.what} has no end")


class Visited:
    """The nodes of one list, as it is followed."""

    def __init__(self, what: str, steps: Steps | None = None) -> None:
        """*what* names the list; *steps* are those of the question that it is followed for, if it is one of several."""
        self._what = what
        self._steps = Steps(what) if steps is None else steps
        self._nodes: set[int] = set()

    def visit(self, node: int) -> None:
        """Go to *node*.

        :raises GuestStateError: the list was there before, or is too long.
        """
        if node in self._nodes:
            raise damaged(f"{self._what} has no end: it comes back to {node:#x}")
        self._nodes.add(node)
        self._steps.take()


def read_array(memory: Memory, what: str, addr: VirtAddr, count: int, size: int, most: int = _MOST_BYTES) -> bytes:
    """Read *count* items of *size* bytes, *most* bytes at the most, at *addr*. *what* is the beginning of a sentence.

    :raises GuestStateError: there cannot be so many.
    :raises UnmappedError: a part of it is not mapped.
    """
    if count < 0 or size <= 0 or count * size > most:
        raise damaged(f"{what} at {addr:#x} has {count} entries of {size} bytes")
    return memory.read(addr, count * size)


def guest_range(what: str, start: int, end: int) -> AddressRange:
    """Return the range between two values of the guest's. *what* is the beginning of a sentence.

    :raises GuestStateError: it ends before it begins, or beyond the last address.
    """
    if not 0 <= start <= end <= 1 << 64:
        raise damaged(f"{what} goes from {start:#x} to {end:#x}")
    return AddressRange(VirtAddr(start), VirtAddr(end))


def decodes(what: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Have a function that decodes a copy of the guest's data tell an index that leads out of it as damage to *what*.

    For data whose parts refer to each other everywhere, so that a check of each would be most of the code.
    """

    def decorate(decode: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(decode)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return decode(*args, **kwargs)
            except (IndexError, ValueError, OverflowError) as error:
                raise damaged(f"{what}: a part of it leads out of it ({error})") from error

        return checked

    return decorate
