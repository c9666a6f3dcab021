"""A hit as one line in the style of the kernel's trace file."""

from __future__ import annotations

import textwrap

from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.render.place import traced
from gdb_kprobe.session.probes import Hit


def value(raw: int, type_: FetchType) -> str:
    """A fetched value as the kernel prints its type: ``u`` and ``s`` in decimal, ``x`` as ``0x...`` without padding."""
    number = type_.extract(raw)
    return f"{number:#x}" if type_.startswith("x") else f"{number}"


def folded(line: str, width: int | None) -> str:
    """*line* in lines of *width* characters at the most (``None``: of any length), broken only between words."""
    if width is None or len(line) <= width:
        return line
    indent = " " * min(6, width // 4)
    return "\n".join(
        textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    )


def hit_line(hit: Hit, seconds: float) -> str:
    """``[001]    12.345678: open: (do_sys_openat2+0x0/0x140) dfd=0xffffff9c``, so many *seconds* after the begin."""
    assert hit.probe.place is not None
    args = "".join(f" {arg.name}={value(raw, arg.type)}" for arg, raw in hit.args)
    return f"[{hit.cpu - 1:03d}] {seconds:12.6f}: {hit.probe.name}: ({traced(hit.probe.place)}){args}"
