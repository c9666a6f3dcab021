"""Backtraces as without probes: a frame that is in one of our slots is shown where it really is.

A vCPU is never in a slot when the user has the prompt, but one may have been interrupted there: a timer that became due
while a hit was handled interrupts the slot's very first instruction. Then the frame under the interrupt's is ours. The
unwinder leads from it to the same frame at the original address, so that gdb's unwinding goes on as it should, and the
filter shows the two as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gdb
from gdb.FrameDecorator import FrameDecorator
from gdb.unwinder import Unwinder, register_unwinder

from gdb_kprobe.model import GENERAL_REGISTERS, VirtAddr

if TYPE_CHECKING:
    from gdb.FrameDecorator import DAPFrameDecorator

    _Decorator = FrameDecorator | DAPFrameDecorator

Original = Callable[[int], VirtAddr | None]
"""The original address of an address in a slot; ``None`` for all others."""


class _FrameId:
    def __init__(self, sp: gdb.Value, pc: gdb.Value) -> None:
        self.sp = sp
        self.pc = pc


class SlotUnwinder(Unwinder):
    """From a frame in a slot to the frame that it stands for: all registers are the same but RIP."""

    def __init__(self, original: Original) -> None:
        super().__init__("kprobe slots")
        self._original = original

    def __call__(self, pending_frame: gdb.PendingFrame) -> gdb.UnwindInfo | None:
        rip = pending_frame.read_register("rip")
        original = self._original(int(rip) & 0xFFFF_FFFF_FFFF_FFFF)
        if original is None:
            return None
        info = pending_frame.create_unwind_info(_FrameId(pending_frame.read_register("rsp"), rip))
        for name in GENERAL_REGISTERS:
            value = pending_frame.read_register(name)
            info.add_saved_register(name, gdb.Value(original).cast(value.type) if name == "rip" else value)
        return info


class SlotFilter:
    """Shows a frame in a slot and the one that it stands for as one frame."""

    def __init__(self, original: Original) -> None:
        self.name = "kprobe slots"
        self.priority = 100
        self.enabled = True
        self._original = original
        gdb.frame_filters[self.name] = self

    def filter(self, iterator: Iterator[_Decorator]) -> Iterator[_Decorator]:
        skip = False
        for frame in iterator:
            original = self._original(frame.inferior_frame().pc())
            if skip and original is None:
                skip = False
                continue
            skip = original is not None
            yield frame if original is None else _Shown(frame.inferior_frame(), original)


class _Shown(FrameDecorator):
    def __init__(self, frame: gdb.Frame, original: VirtAddr) -> None:
        super().__init__(frame)
        self._real = frame.older()
        self._original = original

    def address(self) -> int:
        return self._original

    def function(self) -> str | None:
        return None if self._real is None else FrameDecorator(self._real).function()

    def filename(self) -> str | None:
        return None if self._real is None else FrameDecorator(self._real).filename()

    def line(self) -> int | None:
        return None if self._real is None else FrameDecorator(self._real).line()


def register(original: Original) -> None:
    """Make both known to gdb. Called once, by the plugin."""
    SlotFilter(original)
    register_unwinder(None, SlotUnwinder(original), replace=True)
