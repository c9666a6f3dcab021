"""The guest's live text by the piece, with what the guest says of it: for the survey, and for the windows of jumps."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from gdb_kprobe.guest.function_text import without_kprobes
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.linux.branch_targets import CodeReferences, cuts, find_references
from gdb_kprobe.linux.guest_kprobes import GuestKprobes
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.text import TextFacts
from gdb_kprobe.model import AddressRange, Reason, VirtAddr
from gdb_kprobe.target.protocols import Memory

_THUNK = "__x86_indirect_thunk_"
_THUNK_SIZE = 32
_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The text at one moment: afterwards the guest may run.

    *windows* are the runs of live text, without our own probes and without the guest's kprobes, which *kprobes* are.
    """

    facts: TextFacts
    windows: tuple[tuple[VirtAddr, bytes], ...]
    kprobes: GuestKprobes

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(len(code) for _, code in self.windows)

    @property
    def symbols(self) -> list[VirtAddr]:
        """The addresses of all symbols, sorted: there decoding begins."""
        return sorted({VirtAddr(addr) for table in self.facts.kallsyms.tables for addr in table.addrs})


def take_snapshot(memory: Memory, facts: TextFacts, kprobes: GuestKprobes, text: TextMap) -> Snapshot:
    """Read the text of a stopped guest; *text* knows what of it is ours."""
    windows = []
    for window in facts.text:
        for part in _without(window, facts.init):
            # Where both have patched a byte, the guest's kprobe came later.
            data = without_kprobes(part.start, memory.read(part.start, part.size), kprobes)
            windows.append((part.start, text.original(part.start, data)))
    return Snapshot(facts, tuple(windows), kprobes)


def pieces(snapshot: Snapshot) -> Iterator[Piece]:
    """The text, cut at every symbol."""
    addrs = snapshot.symbols
    for start, code in snapshot.windows:
        for at, end in pairwise(cuts(AddressRange(start, VirtAddr(start + len(code))), addrs)):
            yield piece_at(snapshot.facts, snapshot.kprobes, VirtAddr(at), code[at - start : end - start])


def piece_at(facts: TextFacts, kprobes: GuestKprobes, addr: VirtAddr, code: bytes) -> Piece:
    """What the guest says of *code* at *addr*, which is of one symbol."""
    window = AddressRange(addr, VirtAddr(addr + len(code)))
    sites: list[tuple[int, int, Reason]] = []
    ranges = [(path, Reason.BP_PATH) for path in facts.bp_path if path.overlaps(window)]
    ranges += [(entry.range, entry.reason) for entry in facts.forbidden.overlapping(window)]
    for where, reason in ranges:
        if where.start <= window.start and window.end <= where.end:
            if not sites:
                return Piece(addr, code, rule=reason)
            break
        sites.append((where.start, where.size, reason))
    found = facts.kallsyms.symbol_at(addr)
    rule = None if found is None else facts.rule_for_symbol(found[0].name)
    if rule is not None:
        return Piece(addr, code, rule=rule.reason)
    sites += [(site.addr, site.size, site.reason) for site in facts.sites_in(window)]
    sites += [(kprobe.addr, kprobe.size, Reason.GUEST_KPROBE) for kprobe in kprobes.within(window)]
    return Piece(addr, code, None, sites, _within(facts.tables.ex_table, window), _within(facts.fixups, window))


def _within(addrs: array[int], window: AddressRange) -> array[int]:
    """Those of the sorted *addrs* that are in *window*."""
    return addrs[bisect_left(addrs, window.start) : bisect_left(addrs, window.end)]


def read_references(snapshot: Snapshot) -> CodeReferences:
    """What goes where in all of the text. Takes seconds."""
    thunks = thunks_of(snapshot.facts.kallsyms)
    return find_references(
        snapshot.windows, snapshot.symbols, snapshot.facts.tables, thunks=thunks, jump_tables=thunks is None
    )


def thunks_of(kallsyms: Kallsyms) -> AddressRange | None:
    """Where the kernel's ``__x86_indirect_thunk_*`` are; ``None`` when it was compiled without retpolines.

    There is one for each register (arch/x86/lib/retpoline.S).
    """
    found = sorted(addr for name in _REGISTERS if (addr := kallsyms.find(_THUNK + name)) is not None)
    return AddressRange(found[0], VirtAddr(found[-1] + _THUNK_SIZE)) if found else None


def _without(window: AddressRange, holes: tuple[AddressRange, ...]) -> Iterator[AddressRange]:
    start = window.start
    for hole in sorted(holes):
        if hole.overlaps(AddressRange(start, window.end)):
            if start < hole.start:
                yield AddressRange(start, hole.start)
            start = min(hole.end, window.end)
    if start < window.end:
        yield AddressRange(start, window.end)
