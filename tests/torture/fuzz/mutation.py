"""Changes of memory: what a broken guest, or a hostile one, might have there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PhysAddr
from tests.torture.fuzz.recording import Read

ESCAPES: Final = (
    b"\x1b[2J",
    b"\x1b]0;owned\x07",
    b"\x9b31m",
    b"\r\n",
    b"\x7f\x08",
    "\u202e".encode(),
    "\u200b".encode(),
)
_INTERESTING: Final = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
                       1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 0x1000,
                       0xFFFF_8000_0000_0000, 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_FFFF_F000)  # fmt: skip
_SIZES: Final = (1, 2, 4, 4, 8, 8, 8)


class Changeable(Protocol):
    """Memory of a guest that can be made another."""

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        """Read *size* bytes.

        :raises TargetError: there is no RAM there.
        """

    def change(self, addr: int, data: bytes) -> None:
        """Have the guest hold *data* at *addr*, if there is RAM."""


def mutate(memory: Changeable, chosen: random.Random, reads: Sequence[Read]) -> str:
    """Change *memory* in one to four places that were read; returns what was done."""
    done = [_one(memory, chosen, chosen.choice(reads), reads) for _ in range(chosen.choice((1, 1, 1, 2, 4)))]
    return "; ".join(done)


def _one(memory: Changeable, chosen: random.Random, read: Read, reads: Sequence[Read]) -> str:
    size = chosen.choice(_SIZES)
    at = read.phys + _offset(chosen, read.size, size)
    what = chosen.randrange(9)
    data = _current(memory, at, size)
    match what:
        case 0:
            bit = chosen.randrange(8 * size)
            data = (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(size, "little")
        case 1:
            data = chosen.randbytes(size)
        case 2 | 3:
            data = (chosen.choice(_INTERESTING) & (1 << 8 * size) - 1).to_bytes(size, "little")
        case 4:
            # A little more, or less.
            value = int.from_bytes(data, "little") + chosen.choice((-8, -1, 1, 8, 0x40, 0x1000))
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        case 5:
            # To itself: what is a list goes in a circle.
            at -= at - read.phys & 7
            virt = at if read.virt is None else read.virt + at - read.phys
            data = (virt - chosen.choice((0, 0, 8, 16))).to_bytes(8, "little")
        case 6:
            # Where another pointer leads, or to where something else was read.
            other = chosen.choice(reads)
            at -= at - read.phys & 7
            if other.virt is not None and chosen.randrange(2):
                data = other.virt.to_bytes(8, "little")
            else:
                data = _current(memory, other.phys + _offset(chosen, other.size, 8), 8)
        case 7:
            data = chosen.choice(ESCAPES)
        case _:
            # A string without an end, or a field of nothing.
            data = chosen.choice((b"A", b"\xff", b"\0")) * chosen.choice((16, 64, 512))
    memory.change(at, data)
    return f"physical {at:#x} = {data[:16].hex(' ')}{'...' if len(data) > 16 else ''}"


def _offset(chosen: random.Random, room: int, size: int) -> int:
    """Where in *room* bytes; most values are aligned, and most that matter are in front."""
    most = max(room - size, 0)
    if most > 512 and chosen.randrange(3) == 0:
        most = 512
    at = chosen.randint(0, most)
    return at if chosen.randrange(5) == 0 else at & -min(size, 8)


def _current(memory: Changeable, at: int, size: int) -> bytes:
    try:
        return memory.read_physical(PhysAddr(at), size)
    except TargetError:
        return bytes(size)
