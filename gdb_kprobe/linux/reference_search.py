"""The references to a few places, without decoding all text.

However an instruction refers to an address, but for a branch of one byte: 4 bytes of it, its last ones, count from its
end to there, or are the low half of that address. A branch of one byte ends in its opcode and that byte. So one pass
finds all places where such bytes could be, whatever they are, and only the functions around those that lead to the
place in question are decoded. The same for indirect jumps, which have few opcodes. The answers are those of
:func:`~gdb_kprobe.linux.branch_targets.find_references`, after some tenths of a second instead of seconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.linux.arrays import np, npt
from gdb_kprobe.linux.branch_targets import References, Scan, Scanner, SortedAddresses, cuts, table_targets
from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86.encoding import MAX_LENGTH

_FIELD: Final = 4
_MASK: Final = (1 << 32) - 1
_BLOCK: Final = 1 << 18
"""Bytes of text that are looked at together: what is computed of them stays in the processor's cache."""
_INT3: Final = b"\xcc"
_SHORT_REACH: Final = 130
_SHORT_OPCODES: Final = (*range(0x70, 0x80), *range(0xE0, 0xE4), 0xEB)
"""jcc, loop, jrcxz, jmp with a displacement of one byte."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """Where in a run the 4 bytes are that may lead into *window*, and where in that they lead, sorted by the latter."""

    window: AddressRange
    places: npt.NDArray[np.uint32]
    leads: npt.NDArray[np.uint32]

    def between(self, start: int, end: int) -> list[int]:
        """The offsets of those that lead to *start* or above it, and below *end*."""
        bounds = np.array([start - self.window.start, end - self.window.start], np.uint32)
        first, last = np.searchsorted(self.leads, bounds)
        found: list[int] = self.places[first:last].tolist()
        return found


def _find_fields(addr: int, code: bytes, window: AddressRange) -> _Fields:
    """What of *code*, which is at *addr*, may lead into *window*. Addresses modulo 2**32 will do: it is checked."""
    places, leads = [], []
    for at in range(0, len(code) - _FIELD + 1, _BLOCK):
        block = code[at : at + _BLOCK + _FIELD - 1]
        # Overlapping: one at each byte.
        values = np.ndarray(len(block) - _FIELD + 1, "<u4", block, strides=(1,)).astype(np.uint32)
        ends = np.arange(at + _FIELD, at + _FIELD + len(values), dtype=np.uint32)
        to_window = np.uint32((addr - window.start) & _MASK)
        for lead in (values + (ends + to_window), values - np.uint32(window.start & _MASK)):
            inside = np.flatnonzero(lead < window.size)
            places.append((inside + at).astype(np.uint32))
            leads.append(lead[inside])
    if not places:
        empty = np.empty(0, np.uint32)
        return _Fields(window, empty, empty)
    all_leads = np.concatenate(leads)
    order = np.argsort(all_leads)
    return _Fields(window, np.concatenate(places)[order], all_leads[order])


def _find_short(code: bytes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Where in *code* a branch of one byte may be, and to which offset it leads, sorted by the latter."""
    data = np.frombuffer(code or _INT3, np.uint8)
    is_short = np.zeros(256, np.bool_)
    is_short[list(_SHORT_OPCODES)] = True
    at = np.flatnonzero(is_short[data[:-1]]).astype(np.int32)
    leads = at + 2 + data[at + 1].view(np.int8)
    order = np.argsort(leads, kind="stable")
    return at[order], leads[order]


def _find_indirect(code: bytes) -> npt.NDArray[np.int64]:
    """Where in *code* the opcode of an indirect jump may be: ``ff /4``, and ``ff /5``, which has a memory operand."""
    data = np.frombuffer(code or _INT3, np.uint8)
    at = np.flatnonzero(data[:-1] == 0xFF)
    modrm = data[at + 1]
    reg = modrm >> 3 & 7
    found: npt.NDArray[np.int64] = at[(reg == 4) | ((reg == 5) & (modrm < 0xC0))].astype(np.int64)
    return found


class Run:
    """One run of live text, *code* at *start*, of which what is asked for is decoded.

    :param starts: sorted addresses of all symbols; decoding begins anew at each.
    :param thunks: the kernel's ``__x86_indirect_thunk_*``: a jump there is an indirect one.
    """

    def __init__(self, start: VirtAddr, code: bytes, starts: Sequence[int], thunks: AddressRange | None) -> None:
        self.window = AddressRange(start, VirtAddr(start + len(code)))
        self._code = code
        self._cuts = cuts(self.window, starts)
        self._scanner = Scanner(thunks)
        self._scans: dict[int, Scan] = {}
        self._thunks = thunks
        self._own: _Fields | None = None
        self._short: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None = None
        self._jumps: npt.NDArray[np.int64] | None = None

    def fields_into(self, window: AddressRange) -> _Fields:
        """What may lead into *window*; what leads into the run itself is remembered."""
        if window != self.window:
            return _find_fields(self.window.start, self._code, window)
        if self._own is None:
            self._own = _find_fields(self.window.start, self._code, window)
        return self._own

    def short_into(self, start: int, end: int) -> list[int]:
        """The offsets of what may be branches of one byte to *start* or above it, below *end*."""
        if end <= self.window.start - _SHORT_REACH or start >= self.window.end + _SHORT_REACH:
            return []
        if self._short is None:
            self._short = _find_short(self._code)
        places, leads = self._short
        # Of the same type: else numpy converts all of them first.
        bounds = np.array([start - self.window.start, end - self.window.start], leads.dtype)
        first, last = np.searchsorted(leads, bounds)
        found: list[int] = places[first:last].tolist()
        return found

    def may_jump_indirectly(self, start: int, end: int) -> bool:
        """Whether an indirect jump may begin at *start* or above it, below *end*; if not, none does."""
        first, last = max(start, self.window.start), min(end, self.window.end)
        if first >= last:
            return False
        if self._jumps is None:
            self._jumps = np.sort(np.concatenate([_find_indirect(self._code), *self._into_thunks()]))
        # What is found of an instruction is not its first byte.
        low, high = first - self.window.start, last - self.window.start + MAX_LENGTH
        return bool(np.searchsorted(self._jumps, low) < np.searchsorted(self._jumps, high))

    def _into_thunks(self) -> Iterator[npt.NDArray[np.int64]]:
        """Where branches may be that lead to the thunks: each is an indirect jump."""
        if self._thunks is not None:
            yield _find_fields(self.window.start, self._code, self._thunks).places.astype(np.int64)
            yield np.array(self.short_into(self._thunks.start, self._thunks.end), np.int64)

    def scan_at(self, offset: int) -> Scan:
        """The references of the piece that has the byte at *offset*."""
        return self._scan(bisect_right(self._cuts, self.window.start + offset) - 1)

    def scans_within(self, start: int, end: int) -> Iterator[Scan]:
        """The references of the pieces that have a byte at *start* or above it, below *end*."""
        start, end = max(start, self.window.start), min(end, self.window.end)
        if start < end:
            first, last = bisect_right(self._cuts, start) - 1, bisect_left(self._cuts, end)
            yield from map(self._scan, range(first, last))

    def _scan(self, index: int) -> Scan:
        scan = self._scans.get(index)
        if scan is None:
            start, end = self._cuts[index], self._cuts[index + 1]
            self._scanner.scan(start, self._code[start - self.window.start : end - self.window.start])
            scan = self._scans[index] = self._scanner.take(AddressRange(VirtAddr(start), VirtAddr(end)))
        return scan


class OpaqueRun:
    """A run of text, *code* at *start*, that cannot be decoded: all that may be a reference is taken for one."""

    def __init__(self, start: VirtAddr, code: bytes) -> None:
        self._start = start
        self._code = code
        self._fields: dict[AddressRange, _Fields] = {}

    def leads(self, area: AddressRange, start: int, end: int) -> bool:
        """Whether anything may lead to *start* or above it, below *end*, both within *area*."""
        if area not in self._fields:
            self._fields[area] = _find_fields(self._start, self._code, area)
        return bool(self._fields[area].between(start, min(end, area.end)))


class ReferenceSearch(References):
    """What *runs*, which are all live text but for the *opaque* one, and the guest's *tables* refer to."""

    def __init__(
        self,
        runs: Iterable[Run],
        tables: TextTables,
        *,
        jump_tables: bool = True,
        opaque: Iterable[OpaqueRun] = (),
    ) -> None:
        self.jump_tables = jump_tables
        self._opaque = tuple(opaque)
        self._runs = tuple(runs)
        self._tables = SortedAddresses(table_targets(tables))
        windows = [run.window for run in self._runs]
        # The core kernel by itself; the modules, which are many, small and near to each other, all at once.
        self._areas = [*windows[:1], *_span(windows[1:])]
        self._fields: dict[tuple[AddressRange, AddressRange], _Fields] = {}

    def is_target(self, start: int, end: int) -> bool:
        if self._tables.any_in(start, end) or self._may_lead(start, end):
            return True
        return any(
            any(start <= addr < end for addr in scan.targets) or self._takes(scan, start, end)
            for scan in self._leading(start, end)
        )

    def is_taken(self, start: int, end: int) -> bool:
        return self._may_lead(start, end) or any(self._takes(scan, start, end) for scan in self._leading(start, end))

    def has_indirect_jump(self, start: int, end: int) -> bool:
        runs = (run for run in self._runs if run.may_jump_indirectly(start, end))
        pieces = (scan for run in runs for scan in run.scans_within(start, end))
        return any(start <= addr < end for scan in pieces for addr in scan.indirect)

    def _may_lead(self, start: int, end: int) -> bool:
        area = next((area for area in self._areas if start in area), None)
        return area is not None and any(run.leads(area, start, end) for run in self._opaque)

    def _takes(self, scan: Scan, start: int, end: int) -> bool:
        """Whether code that *scan* is of has such an address, which is of text."""
        return any(start <= addr < end and any(addr in run.window for run in self._runs) for addr in scan.taken)

    def _leading(self, start: int, end: int) -> Iterator[Scan]:
        """The pieces that may lead there, the nearest first."""
        for run in self._runs:
            for offset in run.short_into(start, end):
                yield run.scan_at(offset)
        area = next((area for area in self._areas if start in area), None)
        if area is None:
            return
        for run in self._runs:
            key = run.window, area
            fields = self._fields.get(key)
            if fields is None:
                fields = self._fields[key] = run.fields_into(area)
            for offset in fields.between(start, min(end, area.end)):
                yield run.scan_at(offset)


def _span(windows: Sequence[AddressRange]) -> list[AddressRange]:
    """The range from the first of *windows* to the last, if there is any."""
    if not windows:
        return []
    return [AddressRange(min(window.start for window in windows), max(window.end for window in windows))]
