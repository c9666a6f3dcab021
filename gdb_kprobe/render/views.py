"""What the render functions are given: plain values, already chosen and named by who calls."""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.model import Rung, VirtAddr


@dataclass(frozen=True, slots=True)
class PlaceView:
    """An address and, where one covers it, its symbol. *size* is that symbol's size, 0 when it is not known.

    *behind*: what is patched is so many bytes behind *addr*.
    """

    addr: VirtAddr
    symbol: str = ""
    offset: int = 0
    size: int = 0
    module: str = ""
    behind: int = 0


@dataclass(frozen=True, slots=True)
class InsnView:
    """One line of a listing; *note* says why the instruction is there."""

    addr: VirtAddr
    raw: bytes
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class DeclinedView:
    """A better rung that was passed over, why, and what the user can do about it."""

    rung: Rung
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class PlanView:
    """A probe that is ready to arm: *old* bytes at *place* become *new*, the slot at *slot* holds *listing*."""

    name: str
    place: PlaceView
    insn: str
    old: bytes
    new: bytes
    rung: Rung
    slot: VirtAddr
    listing: tuple[InsnView, ...] = ()
    declined: tuple[DeclinedView, ...] = ()


@dataclass(frozen=True, slots=True)
class HandlerView:
    """What a hit runs inside the guest: *program* is its eBPF, a line each, *listing* its code, if it has its own."""

    program: tuple[str, ...]
    listing: tuple[InsnView, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeView:
    """One probe of the list; *place* is None while it is not known (the guest is not up, the module not loaded).

    *is_saved*: a kprobe of the guest's own is on its jump. *redirected* is why the code there is not executed, if so.
    """

    name: str
    place: PlaceView | None
    rung: Rung | None = None
    hits: int = 0
    missed: int = 0
    is_enabled: bool = True
    is_gone: bool = False
    definition: str = ""
    is_saved: bool = False
    redirected: str = ""
    where: str = ""
    """The place as it was asked for."""


@dataclass(frozen=True, slots=True)
class ArgView:
    """One fetched value: *value* is the register's 64 bits, cut to size by *type* when it is shown."""

    name: str
    value: int
    type: FetchType = FetchType.X64


@dataclass(frozen=True, slots=True)
class HitView:
    """One hit; *time* is in seconds since tracing began, None when it is not to be shown."""

    name: str
    place: PlaceView
    cpu: int
    args: tuple[ArgView, ...] = ()
    time: float | None = None
