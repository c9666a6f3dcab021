"""Choose the functions of a live kernel that a test probes, by what a workload was seen to execute and by live text.

No name of a function is known here: kernels change, and compilers inline.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.model import PAGE_SIZE, AddressRange, Symbol, VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, iter_insns
from gdb_kprobe.x86.families import Family, classify

_THUNK = "__x86_indirect_thunk"
"""With retpolines an indirect call is a call of one of these (arch/x86/lib/retpoline.S)."""
_SCHEDULER = re.compile(r"sched|_rq|rq_|_fair|wake|enqueue|dequeue|pick_")
_PADDING = frozenset((Family.NOP,))
_INT3 = b"\xcc"


class Kind(StrEnum):
    """What a function is an example of; of several, the first one here."""

    STRING = "string copy"
    """It has a string instruction."""
    INDIRECT = "indirect call"
    SCHEDULER = "scheduler"
    """By its name."""
    INTERRUPT = "interrupt"
    """It runs while the guest is in user mode all the time."""
    LOOP = "loop"
    """A part of it was executed more than twice as often as its entry."""
    SYSCALL = "system call"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the workload's *part* was seen to execute; *entries* is how often it was entered then."""

    symbol: Symbol
    range: AddressRange
    insns: tuple[Insn, ...]
    kind: Kind
    part: str
    entries: int

    def __str__(self) -> str:
        return str(self.symbol)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of a function to be chosen.

    It has at most *insns* instructions, of which at least *executed* run, all together at most *hits* times a window.
    With *rounds* each must run in each of so many rounds of the workload equally often, in every window, and the
    function not by itself: no interrupts, no scheduler.
    """

    insns: int = 250
    executed: int = 3
    hits: int = 20_000
    rounds: int = 0

    def admit(
        self, kind: Kind, interrupts: bool, executed: Mapping[VirtAddr, int], others: Iterable[Mapping[VirtAddr, int]]
    ) -> bool:
        """Whether a function is to be chosen that ran so in one window, and like that in the *others* of the part."""
        if len(executed) < self.executed or sum(executed.values()) > self.hits:
            return False
        if not self.rounds:
            return True
        by_itself = interrupts or kind in (Kind.SCHEDULER, Kind.INTERRUPT)
        steady = all(times % self.rounds == 0 for times in executed.values())
        return steady and not by_itself and all(other == executed for other in others)


def choose_functions(
    guest: LinuxGuest, windows: Mapping[str, Sequence[Counter[int]]], spin: str, limits: Limits, count: int | None
) -> tuple[Function, ...]:
    """Choose *count* functions (``None``: all) of all kinds, of each kind the ones first that were entered most often.

    *windows* are, for each part of the workload, one or more counts of the blocks that it entered, by address; the part
    *spin* makes no system calls.
    Fewer are returned when there are not so many.
    """
    by_kind: dict[Kind, list[Function]] = {kind: [] for kind in Kind}
    for function in _for_each_function(guest, windows, spin, limits):
        by_kind[function.kind].append(function)
    for found in by_kind.values():
        found.sort(key=lambda function: (-function.entries, function.range.start))
    # One of each kind in turn.
    turns = zip_longest(*by_kind.values())
    return tuple(function for turn in turns for function in turn if function is not None)[:count]


def _for_each_function(
    guest: LinuxGuest, windows: Mapping[str, Sequence[Counter[int]]], spin: str, limits: Limits
) -> Iterable[Function]:
    entered: dict[VirtAddr, list[str]] = {}
    for part, counts in windows.items():
        for addr in counts[0]:
            found = guest.kallsyms.symbol_at(addr)
            if found is not None and found[1] == 0:
                entered.setdefault(VirtAddr(addr), []).append(part)
    for start, parts in sorted(entered.items()):
        place = guest.place_of(start)
        insns = function_insns(guest, place.start, place.end)
        if place.symbol is None or not 1 < len(insns) <= limits.insns or _is_forbidden(guest, insns):
            continue
        interrupts = spin in parts
        runs = {part: executions(insns, windows[part][0]) for part in parts}
        others = {part: [executions(insns, blocks) for blocks in windows[part][1:]] for part in parts}
        kinds = {part: _kind_of(guest, place.symbol, insns, run, interrupts) for part, run in runs.items()}
        choices = [part for part in parts if limits.admit(kinds[part], interrupts, runs[part], others[part])]
        if not choices:
            continue
        # An interrupt's function is seen where nothing else is; else where it costs least.
        part = min(choices, key=lambda part: (interrupts and part != spin, sum(runs[part].values()), part))
        yield Function(
            symbol=place.symbol,
            range=AddressRange(place.start, insns[-1].end),
            insns=insns,
            kind=kinds[part],
            part=part,
            entries=windows[part][0][start],
        )


def function_insns(guest: LinuxGuest, start: VirtAddr, end: VirtAddr) -> tuple[Insn, ...]:
    """The instructions of a function, without the padding behind it; none when they cannot all be decoded."""
    try:
        insns = list(iter_insns(guest.memory.read(start, end - start), start))
    except DecodeError:
        return ()
    while insns and (insns[-1].raw == _INT3 or classify(insns[-1]) in _PADDING):
        insns.pop()
    return tuple(insns)


def executions(insns: Iterable[Insn], blocks: Mapping[int, int]) -> dict[VirtAddr, int]:
    """How often each instruction was executed, of those that were, when *blocks* is how often QEMU entered each block.

    A block goes on from one instruction to the next in the same page, up to a jump or a call. Where something faults
    within a block the figure is too high: it is an estimate.
    """
    executed: dict[VirtAddr, int] = {}
    running = 0
    page = 0
    for insn in insns:
        if insn.addr // PAGE_SIZE != page:
            running, page = 0, insn.addr // PAGE_SIZE
        running += blocks.get(insn.addr, 0)
        if running:
            executed[insn.addr] = running
        if insn.is_branch or insn.is_call or classify(insn) in (Family.RET, Family.JMP_INDIRECT):
            running = 0
    return executed


def _is_forbidden(guest: LinuxGuest, insns: tuple[Insn, ...]) -> bool:
    return all(guest.refusal_at(guest.place_of(insn.addr), insn.length) is not None for insn in insns)


def _kind_of(
    guest: LinuxGuest, symbol: Symbol, insns: tuple[Insn, ...], executed: Mapping[VirtAddr, int], interrupts: bool
) -> Kind:
    families = [classify(insn) for insn in insns if insn.addr in executed]
    if any(_is_string(insn) for insn in insns if insn.addr in executed):
        return Kind.STRING
    if Family.CALL_INDIRECT in families or any(_calls_thunk(guest, insn) for insn in insns if insn.addr in executed):
        return Kind.INDIRECT
    if _SCHEDULER.search(symbol.name):
        return Kind.SCHEDULER
    if interrupts:
        return Kind.INTERRUPT
    if max(executed.values()) > 2 * executed.get(insns[0].addr, 0):
        return Kind.LOOP
    return Kind.SYSCALL


def _is_string(insn: Insn) -> bool:
    return insn.opcode_map == 0 and insn.opcode in (0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF)


def _calls_thunk(guest: LinuxGuest, insn: Insn) -> bool:
    if not insn.is_call or insn.branch_target is None:
        return False
    found = guest.kallsyms.symbol_at(insn.branch_target)
    return found is not None and found[0].name.startswith(_THUNK)
