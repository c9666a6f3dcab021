"""Backtraces as without probes: a frame that is in one of our slots, or at the gate, is shown where it really is.

A vCPU is never in a slot when the user has the prompt, but one may have been interrupted there: a timer that became due
while a hit was handled interrupts the slot's very first instruction. Then the frame under the interrupt's is ours. And
while a handler of the user's runs, its vCPU stands at the gate. The unwinder leads from such a frame to the same frame
at the original address, so that gdb's unwinding goes on as it should, and the filter shows the two as one.
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

Original = Callable[[int, int], tuple[VirtAddr, int] | None]
"""From RIP and RSP of a frame of ours to those that it stands for; ``None`` for all other frames."""
_MASK = 0xFFFF_FFFF_FFFF_FFFF


class _FrameId:
    def __init__(self, sp: gdb.Value, pc: gdb.Value) -> None:
        self.sp = sp
        self.pc = pc


class SlotUnwinder(Unwinder):
    """From a frame of ours to the frame that it stands for: all registers are the same but RIP and RSP."""

    def __init__(self, original: Original) -> None:
        super().__init__("kprobe slots")
        self._original = original

    def __call__(self, pending_frame: gdb.PendingFrame) -> gdb.UnwindInfo | None:
        rip, rsp = (pending_frame.read_register(name) for name in ("rip", "rsp"))
        original = self._original(int(rip) & _MASK, int(rsp) & _MASK)
        if original is None:
            return None
        info = pending_frame.create_unwind_info(_FrameId(rsp, rip))
        others = dict(zip(("rip", "rsp"), original, strict=True))
        for name in GENERAL_REGISTERS:
            value = pending_frame.read_register(name)
            info.add_saved_register(name, gdb.Value(others[name]).cast(value.type) if name in others else value)
        return info


class SlotFilter:
    """Shows a frame of ours and the one that it stands for as one frame."""

    def __init__(self, original: Original) -> None:
        self.name = "kprobe slots"
        self.priority = 100
        self.enabled = True
        self._original = original
        gdb.frame_filters[self.name] = self

    def filter(self, iterator: Iterator[_Decorator]) -> Iterator[_Decorator]:
        skip = False
        for frame in iterator:
            inferior = frame.inferior_frame()
            original = self._original(inferior.pc(), int(inferior.read_register("rsp")) & _MASK)
            if skip and original is None:
                skip = False
                continue
            skip = original is not None
            yield frame if original is None else _Shown(inferior, original[0])


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
