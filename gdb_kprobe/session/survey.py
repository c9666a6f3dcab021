"""Every instruction of the running guest's live text, classified (``kprobe check --all``)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.survey import Piece, Survey, Surveyor
from gdb_kprobe.linux.text import TextFacts
from gdb_kprobe.model import AddressRange, Boost, Reason, VirtAddr
from gdb_kprobe.session.function_text import kprobes_in, without_kprobes
from gdb_kprobe.session.linux_guest import LinuxGuest

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done, about a hundred times."""

_STEPS = 100


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a survey needs, read at one moment: afterwards the guest may run.

    *windows* are the runs of live text, without our own probes and without the guest's kprobes, which *kprobes* are.
    """

    facts: TextFacts
    windows: tuple[tuple[VirtAddr, bytes], ...]
    kprobes: dict[VirtAddr, bytes]

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(len(code) for _, code in self.windows)


def take_snapshot(guest: LinuxGuest, text: TextMap) -> Snapshot:
    """Read the text of the stopped *guest*; *text* knows what of it is ours."""
    facts, kprobes = guest.text_facts(), dict(guest.own_kprobes())
    windows = []
    for window in facts.text:
        for part in _without(window, facts.init):
            data = text.original(part.start, guest.memory.read(part.start, part.size))
            windows.append((part.start, without_kprobes(part.start, data, kprobes)))
    return Snapshot(facts, tuple(windows), kprobes)


def survey(
    guest: LinuxGuest, snapshot: Snapshot, area: AddressRange, boost: Boost, progress: Progress = lambda done, of: None
) -> Survey:
    """Classify all of *snapshot*; *area* is where the slots are. Pure computation: it takes seconds, and no guest."""
    surveyor = Surveyor(area, guest.boost_rules, by_kernel_rules=boost is Boost.KERNEL)
    done, told = 0, 0
    for piece in pieces(guest, snapshot):
        surveyor.count(piece)
        done += len(piece.code)
        if done - told >= snapshot.size // _STEPS:
            progress(done, snapshot.size)
            told = done
    progress(done, snapshot.size)
    return surveyor.survey


def pieces(guest: LinuxGuest, snapshot: Snapshot) -> Iterator[Piece]:
    """The text, cut at every symbol: there decoding begins."""
    addrs = sorted({addr for table in guest.kallsyms.tables for addr in table.addrs})
    for start, code in snapshot.windows:
        end = start + len(code)
        cuts = [*addrs[bisect_left(addrs, start + 1) : bisect_left(addrs, end)], end]
        at: int = start
        for cut in cuts:
            yield _piece(snapshot, VirtAddr(at), code[at - start : cut - start])
            at = cut


def _piece(snapshot: Snapshot, addr: VirtAddr, code: bytes) -> Piece:
    facts = snapshot.facts
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
    kprobes = snapshot.kprobes
    sites += [(at, max(len(kprobes[at]), 1), Reason.GUEST_KPROBE) for at in kprobes_in(kprobes, window)]
    table = facts.tables.ex_table
    return Piece(addr, code, None, sites, table[bisect_left(table, addr) : bisect_left(table, window.end)])


def _without(window: AddressRange, holes: tuple[AddressRange, ...]) -> Iterator[AddressRange]:
    start = window.start
    for hole in sorted(holes):
        if hole.overlaps(AddressRange(start, window.end)):
            if start < hole.start:
                yield AddressRange(start, hole.start)
            start = min(hole.end, window.end)
    if start < window.end:
        yield AddressRange(start, window.end)
