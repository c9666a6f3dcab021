"""One write to the guest's memory, as a value that can be verified and undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gdb_kprobe.kprobes.slots import INT3
from gdb_kprobe.model import AddressRange, VirtAddr, offset

MAX_PATCH = 16
"""Bytes of text that one patch replaces, at the most."""

_NOP_DISP32 = bytes.fromhex("0f1f8400")  # nop dword ptr [rax + rax + disp32], up to its displacement
_DISP32_SIZE = 4


@dataclass(frozen=True, slots=True)
class CodePatch:
    """Replace *old* by *new* (equal lengths) at *addr*."""

    addr: VirtAddr
    old: bytes
    new: bytes

    def __post_init__(self) -> None:
        assert len(self.old) == len(self.new) > 0

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.addr, offset(self.addr, len(self.new)))

    @property
    def inverse(self) -> CodePatch:
        return CodePatch(self.addr, self.new, self.old)


def over(addr: VirtAddr, text: bytes, new: bytes) -> CodePatch:
    """Put *new* over *text*, which is whole instructions at *addr*, of which only the first is ever gone to.

    The rest is filled with int3, so that what decodes the text from the function's start, as the guest's own
    ``can_probe`` does, comes to the instruction behind *text* as before; and finds nothing in between that may be
    probed (``__copy_instruction`` refuses an int3). The fill is never executed.
    """
    rest = len(text) - len(new)
    assert rest >= 0
    if len(text) <= MAX_PATCH:
        return CodePatch(addr, text, new + INT3 * rest)
    # Too long for a record: the last 4 bytes stay, as the displacement of a nop.
    size = len(text) - _DISP32_SIZE
    return CodePatch(addr, text[:size], (new + INT3 * rest)[: size - len(_NOP_DISP32)] + _NOP_DISP32)


def is_fill(data: bytes) -> bool:
    """Whether *data* is what :func:`over` fills the rest of whole instructions with."""
    rest = data.lstrip(INT3)
    return not rest or rest == _NOP_DISP32


class TextMap:
    """Which bytes of the guest's text are ours, and what was there before.

    The question it answers is the kernel's ``recover_probed_instruction``: code that decodes text must see the
    original bytes, not our int3.
    """

    def __init__(self) -> None:
        self._patches: dict[VirtAddr, CodePatch] = {}

    def __iter__(self) -> Iterator[CodePatch]:
        return iter(tuple(self._patches.values()))

    def __len__(self) -> int:
        return len(self._patches)

    def at(self, addr: VirtAddr) -> CodePatch | None:
        return self._patches.get(addr)

    def add(self, patch: CodePatch) -> None:
        assert patch.addr not in self._patches, f"{patch.addr:#x} is patched twice"
        assert len(patch.old) <= MAX_PATCH, f"{len(patch.old)} bytes of text at {patch.addr:#x}"
        self._patches[patch.addr] = patch

    def remove(self, patch: CodePatch) -> None:
        assert self._patches.pop(patch.addr) == patch

    def original(self, addr: VirtAddr, current: bytes) -> bytes:
        """Return *current*, the bytes now at *addr*, as they were before our patches."""
        if len(self._patches) <= len(current):
            return recover(addr, current, self._patches.values())
        near = range(addr - MAX_PATCH + 1, addr + len(current))
        return recover(addr, current, [self._patches[VirtAddr(at)] for at in near if at in self._patches])


def recover(addr: VirtAddr, current: bytes, patches: Iterable[CodePatch]) -> bytes:
    """Undo *patches* in *current*, which was read at *addr*."""
    data = bytearray(current)
    for patch in patches:
        for index, byte in enumerate(patch.old):
            at = offset(patch.addr, index) - addr
            if 0 <= at < len(data):
                data[at] = byte
    return bytes(data)
