"""Where execution can come from elsewhere: the branch targets of all live text, found in bulk.

A jump over several instructions must not hide an address that something else goes to. The branches of the function do
not show all: ``foo.cold`` jumps back into ``foo``, and the guest's tables name places (jump labels, exception fixups).
Only lengths and branches matter here, so the text is parsed, not disassembled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86.encoding import Encoding, EncodingError, parse

_HEAD: Final = 4
_INT3: Final = b"\xcc"
_MASK: Final = (1 << 64) - 1
_RIP_RELATIVE: Final = 0x05
_REX_W: Final = 8


class SortedAddresses:
    """Many addresses, and the question whether one of them is in a range."""

    __slots__ = ("addrs",)

    def __init__(self, addrs: Iterable[int]) -> None:
        self.addrs = array("Q", sorted(set(addrs)))

    def __len__(self) -> int:
        return len(self.addrs)

    def any_in(self, start: int, end: int) -> bool:
        """Whether one is at *start* or above it, and below *end*."""
        at = bisect_left(self.addrs, start)
        return at < len(self.addrs) and self.addrs[at] < end


class References(ABC):
    """What live text and the guest's tables say of where execution may go on.

    *jump_tables*: the kernel may have been compiled with them.
    """

    __slots__ = ()

    jump_tables: bool

    @abstractmethod
    def is_target(self, start: int, end: int) -> bool:
        """Whether a branch, a table or anything that :meth:`is_taken` leads to *start* or above it, below *end*."""

    @abstractmethod
    def is_taken(self, start: int, end: int) -> bool:
        """Whether code computes such an address with ``lea``, or loads it: it could go there by any way."""

    @abstractmethod
    def has_indirect_jump(self, start: int, end: int) -> bool:
        """Whether an indirect jump begins there."""

    def is_unresolved(self, function: AddressRange) -> bool:
        """Whether *function* has an indirect jump that may go to its own interior.

        A kernel compiled with retpolines has no jump tables (arch/x86/Makefile: ``-fno-jump-tables``); what is left are
        tail calls, and assembly that computes where to go from an address in its own text.
        """
        if not self.has_indirect_jump(function.start, function.end):
            return False
        return self.jump_tables or self.is_taken(function.start + 1, function.end)


@dataclass(frozen=True, slots=True)
class CodeReferences(References):
    """All of them, found at once: *targets* has *taken* as well."""

    targets: SortedAddresses
    taken: SortedAddresses
    indirect: SortedAddresses
    jump_tables: bool

    def is_target(self, start: int, end: int) -> bool:
        return self.targets.any_in(start, end)

    def is_taken(self, start: int, end: int) -> bool:
        return self.taken.any_in(start, end)

    def has_indirect_jump(self, start: int, end: int) -> bool:
        return self.indirect.any_in(start, end)


@dataclass(frozen=True, slots=True)
class _Reference:
    """Where in an instruction the number is from which a code address comes, and what it counts from.

    *size* 0: an indirect jump, which has none.
    """

    offset: int
    size: int
    relative: bool
    is_branch: bool
    is_jump: bool


class Scanner:
    """Collects the references of pieces of text.

    :param thunks: the kernel's ``__x86_indirect_thunk_*``: a jump there is an indirect one.
    """

    def __init__(self, thunks: AddressRange | None) -> None:
        self.targets: set[int] = set()
        self.taken: set[int] = set()
        self.indirect: set[int] = set()
        self._thunks = thunks
        self._heads: dict[bytes, tuple[int, _Reference | None]] = {}

    def take(self, window: AddressRange) -> Scan:
        """What was found since the last time, in the text of *window*; how instructions begin stays known."""
        found = Scan(window, frozenset(self.targets), frozenset(self.taken), frozenset(self.indirect))
        self.targets, self.taken, self.indirect = set(), set(), set()
        return found

    def scan(self, addr: int, code: bytes) -> None:
        """Find the references of *code*, of which the first byte is at *addr* and begins an instruction."""
        heads, at, end = self._heads, 0, len(code.rstrip(_INT3))
        while at < end:
            found = heads.get(code[at : at + _HEAD])
            if found is None:
                found = self._parse(code, at)
            if found is None or at + found[0] > len(code):
                self._scan_unknown(addr, code, at, end)
                return
            length, reference = found
            if reference is not None:
                self._note(addr, code, at, length, reference)
            at += length

    def _scan_unknown(self, addr: int, code: bytes, start: int, end: int) -> None:
        """From where decoding ended on, an instruction may begin at any byte: too many targets do no harm."""
        for at in range(start, end):
            found = self._parse(code, at)
            if found is not None and found[1] is not None:
                self._note(addr, code, at, found[0], found[1])

    def _parse(self, code: bytes, at: int) -> tuple[int, _Reference | None] | None:
        try:
            encoding = parse(code, at)
        except EncodingError:
            return None
        found = encoding.length, _reference(encoding)
        if encoding.head_size <= _HEAD:
            head = code[at : at + _HEAD]
            if len(head) == _HEAD:
                self._heads[head] = found
        return found

    def _note(self, addr: int, code: bytes, at: int, length: int, reference: _Reference) -> None:
        if not reference.size:
            self.indirect.add(addr + at)
            return
        field = at + reference.offset
        value = int.from_bytes(code[field : field + reference.size], "little", signed=True)
        if reference.relative:
            value += addr + at + length
        target = value & _MASK
        if not reference.is_branch:
            self.taken.add(target)
            return
        self.targets.add(target)
        if reference.is_jump and self._thunks is not None and target in self._thunks:
            self.indirect.add(addr + at)


def _reference(encoding: Encoding) -> _Reference | None:
    opcode = encoding.opcode
    if encoding.relative:
        is_jump = encoding.map == 1 or opcode != 0xE8
        return _Reference(encoding.imm_offset, encoding.imm_size, True, True, is_jump)
    if encoding.space or encoding.map:
        return None
    modrm = encoding.modrm
    if opcode == 0xFF and modrm is not None and (modrm >> 3 & 7 == 4 or (modrm >> 3 & 7 == 5 and modrm < 0xC0)):
        return _Reference(0, 0, False, True, True)  # jmp r/m, jmpf m
    if opcode == 0x8D and modrm is not None and modrm & 0xC7 == _RIP_RELATIVE:
        return _Reference(encoding.disp_offset, 4, True, False, False)  # lea r, [rip + d]
    wide = bool(encoding.rex & _REX_W)
    loads = opcode == 0x68 or (wide and (opcode == 0xC7 or 0xB8 <= opcode <= 0xBF))
    if loads and encoding.imm_size >= 4:
        return _Reference(encoding.imm_offset, encoding.imm_size, False, False, False)  # mov r/m, imm; push imm
    return None


@dataclass(frozen=True, slots=True)
class Scan:
    """What one run of text refers to; *window* is where it is."""

    window: AddressRange
    targets: frozenset[int]
    taken: frozenset[int]
    indirect: frozenset[int]


def cuts(window: AddressRange, starts: Sequence[int]) -> list[int]:
    """Where the pieces of *window* begin, which are cut at each of the sorted *starts*; last, where it ends."""
    return [window.start, *starts[bisect_left(starts, window.start + 1) : bisect_left(starts, window.end)], window.end]


def scan_text(start: VirtAddr, code: bytes, starts: Sequence[int], thunks: AddressRange | None = None) -> Scan:
    """Scan *code*, a run of live text at *start*.

    :param starts: sorted addresses of all symbols; decoding begins anew at each.
    :param thunks: the kernel's ``__x86_indirect_thunk_*``: a jump there is an indirect one.
    """
    scanner = Scanner(thunks)
    window = AddressRange(start, VirtAddr(start + len(code)))
    for at, end in pairwise(cuts(window, starts)):
        scanner.scan(at, code[at - start : end - start])
    return scanner.take(window)


def table_targets(tables: TextTables) -> set[int]:
    """Where the guest's *tables* say that execution may go on."""
    return set().union(tables.ex_fixups, tables.jump_targets, tables.jump_labels)


def combine(scans: Iterable[Scan], tables: TextTables, *, jump_tables: bool = True) -> CodeReferences:
    """What *scans* of all live text, and the guest's *tables*, refer to.

    :param jump_tables: the kernel may have been compiled with jump tables.
    """
    known = list(scans)
    found = set().union(*(scan.taken for scan in known))
    taken = {addr for addr in found if any(addr in scan.window for scan in known)}
    targets = taken.union(*(scan.targets for scan in known), table_targets(tables))
    indirect = set().union(*(scan.indirect for scan in known))
    return CodeReferences(SortedAddresses(targets), SortedAddresses(taken), SortedAddresses(indirect), jump_tables)


def find_references(
    windows: Iterable[tuple[VirtAddr, bytes]],
    starts: Sequence[int],
    tables: TextTables,
    *,
    thunks: AddressRange | None = None,
    jump_tables: bool = True,
) -> CodeReferences:
    """Scan all of *windows*, runs of live text with their addresses; see :func:`scan_text` and :func:`combine`."""
    return combine([scan_text(*window, starts, thunks) for window in windows], tables, jump_tables=jump_tables)
