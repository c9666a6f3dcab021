"""A piece of text as a value: the bytes of one symbol, and what the guest says of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gdb_kprobe.model import Reason, VirtAddr


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one symbol, up to the next symbol, and what the guest says of it.

    *rule* refuses all of it. *sites* are (address, bytes, reason), of several at a place the one that counts first.
    *extable* are the addresses of instructions that may fault, *fixups* where the guest goes on after a fault, of this
    or other text: that is code, whatever it looks like.
    """

    addr: VirtAddr
    code: bytes
    rule: Reason | None = None
    sites: Sequence[tuple[int, int, Reason]] = ()
    extable: Collection[int] = ()
    fixups: Collection[int] = ()
