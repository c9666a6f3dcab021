"""Jumps of ours that kprobes of the guest's own have saved, as the instruction that they are on.

The guest refuses a kprobe of its own where an int3 of ours is (``__copy_instruction``). A jump it takes for the
original instruction (``arch_prepare_kprobe``): its slot has a copy of the jump, a hit emulates it and comes to our
detour, as it should, and when the kprobe goes the jump's first byte is written back. So from its registration on,
enabled or not, until it is unregistered, no byte of the jump may change, and what the jump led to then must stay. All
that the guest does meanwhile is right, and each hit is counted once by both.

Where not all kprobes of the guest's own can be read (:attr:`GuestKprobes.unread`), one of those may have saved any jump
that is in text. None of them is changed then, until all can be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Final

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.detour import Detour, Flags
from gdb_kprobe.kprobes.plan import Plan, can_handle
from gdb_kprobe.kprobes.window import JUMP_SIZE, Window
from gdb_kprobe.linux.guest_kprobes import GuestKprobe, GuestKprobes
from gdb_kprobe.model import AddressRange, Refusal, Rung, VirtAddr, offset
from gdb_kprobe.region.records import Record, RecordKind
from gdb_kprobe.session.sites.windows import executed
from gdb_kprobe.session.transaction import holds
from gdb_kprobe.target.protocols import Memory
from gdb_kprobe.x86.decode import DecodeError, decode
from gdb_kprobe.x86.encoding import MAX_LENGTH

_INT3: Final = b"\xcc"
_NAMED: Final = 5


def savers(kprobes: GuestKprobes, code: AddressRange) -> Iterator[GuestKprobe]:
    """Those of the guest's own *kprobes* that have saved a jump into *code*, which is our region's."""
    return (kprobe for kprobe in kprobes if kprobe.leads_to is not None and kprobe.leads_to in code)


def is_as_saved(memory: Memory, addr: VirtAddr, jump: bytes) -> bool:
    """Whether *jump* is at *addr*, but for its first byte, where an int3 of the guest's may be."""
    return holds(memory, addr, jump) or holds(memory, addr, _INT3 + jump[1:])


def why(place: object) -> str:
    """What the user is told of a kprobe of the guest's own at *place*."""
    return f"a kprobe of the guest's own is at {place}, and has saved our jump as the original instruction"


def why_perhaps(unread: GuestStateError) -> str:
    """What the user is told where *unread* is why nobody knows."""
    return f"a kprobe of the guest's own may have saved our jump as the original instruction, for {unread.message}"


def some(names: Iterable[str]) -> str:
    """*names* in a message, of which there may be thousands."""
    first, rest = (found := list(names))[:_NAMED], found[_NAMED:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


HINT: Final = "remove it in the guest, also if it is disabled ('echo -:NAME >>/sys/kernel/tracing/kprobe_events')"


def saved_records(memory: Memory, kprobes: GuestKprobes, code: AddressRange, records: Iterable[Record]) -> list[Record]:
    """Those of *records* whose jumps into *code* *kprobes* have saved, or may have, and that are still there."""
    saved = {kprobe.addr for kprobe in savers(kprobes, code)}
    return [
        record
        for record in records
        if record.kind is RecordKind.SITE
        and record.rung is Rung.OPTIMIZED
        and (record.patch.addr in saved or kprobes.unread is not None)
        and is_as_saved(memory, record.patch.addr, record.patch.new)
    ]


def plan_of(memory: Memory, record: Record) -> Plan | None:
    """The plan of the jump of *record*, which another session has put, without any handler; ``None`` if it is none.

    The detour that it has may do more.
    """
    start = record.patch.addr
    try:
        text, end = record.patch.old, 0
        with contextlib.suppress(UnmappedError):  # most often the window ends with what was displaced
            text += memory.read(offset(start, len(text)), MAX_LENGTH)
        while end < JUMP_SIZE:
            end += decode(text[end:], offset(start, end)).length
        insns = executed(start, text[:end])
        window = Window(start, offset(start, end), tuple(insn.addr for insn in insns[1:]))
        family = can_handle(insns[0])
    except DecodeError:
        return None
    if isinstance(family, Refusal):
        return None
    detour = Detour(window, insns, text[:end], Action(), Flags.PUSHF)
    code = detour.emit(record.slot.code)
    return Plan(insns[0], family, Rung.OPTIMIZED, record.slot, code, record.patch, (), detour)
