"""Places of a live kernel to probe, found in its text: where the instructions of a function begin differs by kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.landing import is_landing_pad
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.ftrace import NOP
from gdb_kprobe.x86.decode import Insn, iter_insns

_ENTRY = 64
"""Bytes of a function that are looked at."""


def first_insns(kernel: LinuxGuest, symbol: str) -> Iterator[Insn]:
    """Yield the first instructions of a function, all of which every call executes, from where a probe on it goes."""
    place = kernel.resolve(Location(symbol))
    for insn in iter_insns(kernel.memory.read(place.start, _ENTRY), place.start):
        if not is_landing_pad(insn.raw) and insn.raw != NOP:
            yield insn


def entry(kernel: LinuxGuest, symbol: str) -> int:
    """The offset at which a probe on the function *symbol* is put."""
    return next(first_insns(kernel, symbol)).addr - kernel.resolve(Location(symbol)).start


def behind_jump(kernel: LinuxGuest, symbol: str) -> int:
    """The offset of the first instruction that a jump on the function *symbol* leaves as it is."""
    start = kernel.resolve(Location(symbol)).start
    jump = entry(kernel, symbol)
    return next(insn.addr - start for insn in first_insns(kernel, symbol) if insn.addr - start >= jump + JUMP_SIZE)


def spelled(kernel: LinuxGuest, text: str) -> str:
    """Put the offsets of this kernel in for each ``SYMBOL+entry`` and ``SYMBOL+behind`` in *text*.

    See :func:`entry` and :func:`behind_jump`.
    """
    offsets = {"entry": entry, "behind": behind_jump}
    return re.sub(
        r"\b(\w+)\+(entry|behind)\b", lambda found: f"{found[1]}+{offsets[found[2]](kernel, found[1]):#x}", text
    )
