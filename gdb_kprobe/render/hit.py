"""A hit as one line in the style of the kernel's trace file."""

from __future__ import annotations

import textwrap

from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.render.text import symbolic
from gdb_kprobe.render.views import HitView, PlaceView


def value(raw: int, type_: FetchType) -> str:
    """A fetched value as the kernel prints its type: ``u`` and ``s`` in decimal, ``x`` as ``0x...`` without padding."""
    number = type_.extract(raw)
    return f"{number:#x}" if type_.startswith("x") else f"{number}"


def place(view: PlaceView) -> str:
    """``vfs_read+0x0/0x370 [module]``; the bare address where no symbol covers it."""
    return symbolic(view.symbol, view.offset, view.size, view.module) if view.symbol else f"{view.addr:#x}"


def folded(line: str, width: int | None) -> str:
    """*line* in lines of *width* characters at the most (``None``: of any length), broken only between words."""
    if width is None or len(line) <= width:
        return line
    indent = " " * min(6, width // 4)
    return "\n".join(
        textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    )


def hit_line(hit: HitView) -> str:
    """``[001]    12.345678: open: (do_sys_openat2+0x0/0x140) dfd=0xffffff9c``, the time only where there is one."""
    time = "" if hit.time is None else f" {hit.time:12.6f}:"
    args = "".join(f" {arg.name}={value(arg.value, arg.type)}" for arg in hit.args)
    return f"[{hit.cpu:03d}]{time} {hit.name}: ({place(hit.place)}){args}"
