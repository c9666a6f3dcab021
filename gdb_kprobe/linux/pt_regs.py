"""``struct pt_regs`` of x86-64: where an exception's entry code saves the interrupted registers.

The layout is ABI (arch/x86/include/uapi/asm/ptrace.h): user space sees it too, so it does not change.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

_ORDER: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss",
)  # fmt: skip

SIZE: Final = 8 * len(_ORDER)

OFFSETS: Final = {name: 8 * index for index, name in enumerate(_ORDER)}
"""Offset in bytes of each register, by hardware name."""

_STRUCT: Final = struct.Struct(f"<{len(_ORDER)}Q")


def unpack(data: bytes) -> dict[str, int]:
    """All registers of the :data:`SIZE` bytes of a ``struct pt_regs``, by hardware name."""
    return dict(zip(_ORDER, _STRUCT.unpack(data), strict=True))


def pack(registers: Mapping[str, int]) -> bytes:
    """The bytes of a ``struct pt_regs`` with these *registers*, by hardware name; there may be others beside them."""
    return _STRUCT.pack(*(registers[name] for name in _ORDER))
