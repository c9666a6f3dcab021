"""The register names of the language: those of ``struct pt_regs``, and help for who writes others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from gdb_kprobe.model import PT_REGS_NAMES


def pt_regs(hardware: Mapping[str, int]) -> dict[str, int]:
    """Return *hardware* (values by hardware name: ``rdi``, ``eflags``) by pt_regs name (``di``, ``flags``)."""
    return {name: hardware[raw] for name, raw in PT_REGS_NAMES.items() if raw in hardware}


def nearest_register(name: str) -> str:
    """Return the pt_regs name that the writer of *name* will have meant, or nothing.

    Knows the hardware names of all widths: ``rdi``, ``edi``, ``dil`` are ``di``; ``r8d`` is ``r8``.
    """
    name = name.lower()
    if name in PT_REGS_NAMES:
        return name
    if name in ("rflags", "eflags"):
        return "flags"
    for pattern in (r"[re]([a-d]x|[sb]p|[sd]i|ip)", r"(r\d+)[dwb]", r"([sb]p|[sd]i)l"):
        if (found := re.fullmatch(pattern, name)) and found[1] in PT_REGS_NAMES:
            return found[1]
    if re.fullmatch(r"[a-d][lh]", name):
        return f"{name[0]}x"
    return next(iter(difflib.get_close_matches(name, PT_REGS_NAMES, n=1)), "")
