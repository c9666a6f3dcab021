"""What a probe definition means, as values: where, what to fetch, and on which condition.

Register names are those of ``struct pt_regs`` (``di``, ``ip``, ``flags``), as in the kernel's ``kprobe_events``;
:data:`gdb_kprobe.model.PT_REGS_NAMES` has the hardware name of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import VirtAddr

DEFAULT_GROUP = "kprobes"
MAX_EVENT_NAME = 63
"""Longest event or group name: the kernel's MAX_EVENT_NAME_LEN counts the terminating zero."""


class FetchType(StrEnum):
    """How a fetched value is cut to size and shown: unsigned, signed, or hexadecimal."""

    U8 = "u8"
    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    S8 = "s8"
    S16 = "s16"
    S32 = "s32"
    S64 = "s64"
    X8 = "x8"
    X16 = "x16"
    X32 = "x32"
    X64 = "x64"

    @property
    def bits(self) -> int:
        return int(self[1:])

    @property
    def is_signed(self) -> bool:
        return self.startswith("s")

    def extract(self, raw: int) -> int:
        """Return the number that the low bits of *raw* are in this type; negative only for a signed type."""
        value = raw & ((1 << self.bits) - 1)
        return value - (1 << self.bits) if self.is_signed and value >> (self.bits - 1) else value


@dataclass(frozen=True, slots=True)
class Location:
    """A symbol and a byte offset in it, or an absolute *address*.

    *module* is empty when the symbol may be anywhere. *offset* may be negative.
    """

    symbol: str = ""
    module: str = ""
    offset: int = 0
    address: VirtAddr | None = None

    def __str__(self) -> str:
        if self.address is not None:
            return f"{self.address:#x}"
        name = f"{self.module}:{self.symbol}" if self.module else self.symbol
        return f"{name}{self.offset:+d}" if self.offset else name


@dataclass(frozen=True, slots=True)
class FetchArg:
    """One value to fetch at a hit: the register *register* (pt_regs name), shown under *name*."""

    name: str
    register: str
    type: FetchType = FetchType.X64

    def __str__(self) -> str:
        suffix = "" if self.type is FetchType.X64 else f":{self.type}"
        return f"{self.name}=%{self.register}{suffix}"


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """A probe as it was asked for; *text* is the definition as it was typed."""

    name: str
    location: Location
    group: str = DEFAULT_GROUP
    args: tuple[FetchArg, ...] = ()
    condition: Condition | None = None
    text: str = ""

    def __str__(self) -> str:
        """The definition that says the same with every default written out, as ``kprobe_events`` lists it."""
        words = [f"p:{self.group}/{self.name}", str(self.location), *map(str, self.args)]
        if self.condition is not None:
            words += ["if", self.condition.text]
        return " ".join(words)


def default_name(location: Location) -> str:
    """Return the event name that the kernel generates for an unnamed probe at *location*.

    ``p_SYMBOL_OFFSET`` with the offset in decimal, or ``p_0xADDRESS``; what may not be in a name becomes ``_``; too
    long a name is cut. A negative offset, which the kernel does not have, is written ``mN``.
    """
    if location.address is not None:
        return f"p_{location.address:#x}"
    place = f"{location.module}:{location.symbol}" if location.module else location.symbol
    count = f"m{-location.offset}" if location.offset < 0 else f"{location.offset}"
    return re.sub(r"\W", "_", f"p_{place}_{count}", flags=re.ASCII)[:MAX_EVENT_NAME]
