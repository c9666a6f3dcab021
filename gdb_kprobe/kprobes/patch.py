"""One write to the guest's memory, as a value that can be verified and undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gdb_kprobe.model import AddressRange, VirtAddr, offset

MAX_PATCH = 16
"""Bytes of text that one patch replaces, at the most."""


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


class TextMap:
    """Which bytes of the guest's text are ours, and what was there before.

    The question it answers is the kernel's ``recover_probed_instruction``: whoever decodes text must see the
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
