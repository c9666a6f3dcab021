"""What can be known of the types of a kernel that has no BTF: those that its own memory proves.

Nothing is assumed of a version. A layout that Linux has had is taken only when all that the guest has of it agrees:
each entry of a table must name text, each ``ud2`` be one, each list come back to its head. What does not agree is not
known, and whatever needs it says so (:class:`~gdb_kprobe.errors.NeedsTypesError`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.image import KERNEL_IMAGE_END, MODULES_END
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import for_each_list_entry, read_pointer
from gdb_kprobe.linux.types import KnownTypes, Layout, Member
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.system.bounds import Steps, Visited, read_array
from gdb_kprobe.target.protocols import Memory
from gdb_kprobe.x86.decode import DecodeError, iter_insns

_MASK: Final = (1 << 64) - 1
_MOV_IMM32_TO_RIP: Final = b"\xc7\x05"
_INT_SIZE: Final = 4
_TRAPS: Final = (b"\x0f\x0b", b"\x0f\xb9", b"\x67\x0f\xb9", b"\x67\x48\x0f\xb9")
"""What BUG and WARN are: ``ud2``, or ``ud1`` with an operand (arch/x86/include/asm/bug.h)."""
_LOCK_PREFIXES: Final = (b"\xf0", b"\x3e")
"""``lock``, and the prefix that the kernel puts in its place while there is one CPU (``alternatives_smp_unlock``)."""
_AT_NOPS: Final = frozenset(b"\x0f\xe8\xe9\xcc")
"""First bytes: ftrace's nop, a tracer's call, and a jump or an int3 of a session that has borrowed it."""
_MODULES: Final = AddressRange(KERNEL_IMAGE_END, MODULES_END)
_FEWEST: Final = 3
"""Entries of a table that prove anything; a kernel has hundreds."""
_FEWEST_SORTED: Final = 16
_MOST_RECORDS: Final = 1 << 21


def prove_types(memory: Memory, kallsyms: Kallsyms) -> KnownTypes:
    """Find out what of the kernel's types is certain.

    A structure of which this kernel has nothing (an empty list, no such table) is taken as Linux has it, for nothing is
    read by it.
    """
    running = _running_state(memory, kallsyms)
    layouts = {name: functools.partial(_tried, prove) for name, prove in _Proofs(memory, kallsyms).all()}
    return KnownTypes(layouts, {} if running is None else {"system_states": {"SYSTEM_RUNNING": running}})


def _tried(prove: Callable[[], Layout | None]) -> Layout | None:
    """What *prove* proves. What leads to memory that is not mapped, or cannot be read, proves nothing."""
    try:
        return prove()
    except (UnmappedError, GuestStateError):
        return None


def _ints(size: int, **offsets: int) -> Layout:
    """A structure whose members are integers of 4 bytes."""
    return Layout(size, {name: Member(offset, _INT_SIZE) for name, offset in offsets.items()})


def _words(size: int, **offsets: int) -> Layout:
    """A structure whose members are words of 8 bytes; ``a__b`` is the member ``a.b``."""
    return Layout(size, {name.replace("__", "."): Member(offset, 8) for name, offset in offsets.items()})


# arch/x86/include/asm/extable.h, include/linux/jump_label.h, include/linux/static_call_types.h
_EX_TABLE: Final = _ints(12, insn=0, fixup=4)
_JUMP_ENTRY: Final = _ints(16, code=0, target=4)
_STATIC_CALL_SITE: Final = _ints(8, addr=0)
# include/asm-generic/bug.h: with CONFIG_DEBUG_BUGVERBOSE and without; with a format since v6.19.
_WITH_FORMAT: Final = _ints(16, bug_addr_disp=0)
_BUG_ENTRIES: Final = (_ints(8, bug_addr_disp=0), _ints(12, bug_addr_disp=0), _WITH_FORMAT)
# arch/x86/kernel/alternative.c
_SMP_ALT_MODULE: Final = _words(64, locks=16, locks_end=24, text=32, text_end=40, next=48, next__next=48)
# include/linux/kprobes.h
_BLACKLIST_ENTRY: Final = _words(32, list=0, list__next=0, start_addr=16, end_addr=24)
# include/linux/ftrace.h, kernel/trace/ftrace.c
_DYN_FTRACE: Final = _words(16, ip=0, flags=8)
_FTRACE_PAGE: Final = Layout(24, {"next": Member(0, 8), "records": Member(8, 8), "index": Member(16, 4)})


@dataclass(frozen=True, slots=True)
class _Proofs:
    memory: Memory
    kallsyms: Kallsyms

    def all(self) -> Iterator[tuple[str, Callable[[], Layout | None]]]:
        """The types, each with what proves one layout of it, or none."""
        yield "exception_table_entry", lambda: self._table("___ex_table", _EX_TABLE, self._is_ex_table)
        yield "jump_entry", lambda: self._table("___jump_table", _JUMP_ENTRY, self._are_code)
        yield "static_call_site", lambda: self._table("_static_call_sites", _STATIC_CALL_SITE, self._are_code)
        yield "bug_entry", self._bug_entry
        yield "smp_alt_module", self._smp_alt_module
        yield "kprobe_blacklist_entry", self._blacklist_entry
        yield "dyn_ftrace", self._dyn_ftrace
        yield "ftrace_page", self._ftrace_page

    def _table(self, name: str, layout: Layout, agrees: Callable[[list[list[int]]], bool]) -> Layout | None:
        """*layout*, if the section ``__start*name*`` has whole entries of that size, of whose members all *agrees*."""
        section = self.kallsyms.section(f"__start{name}", f"__stop{name}")
        if section is None or not section.size:
            return layout
        if section.size % layout.size or section.size < _FEWEST * layout.size:
            return None
        data = self.memory.read(section.start, section.size)
        columns = [_relative(section.start, data, layout.size, member.offset) for member in layout.members.values()]
        return layout if agrees(columns) else None

    def _is_code(self, addr: int) -> bool:
        """Whether *addr* is in the kernel's text or in its init text, which may be freed by now."""
        return any(addr in window for window in self._text())

    def _text(self) -> list[AddressRange]:
        live, init = (self.kallsyms.section(*names) for names in (("_stext", "_etext"), ("__init_begin", "__init_end")))
        if live is None:
            raise GuestStateError("the guest's kernel has no text between _stext and _etext", "its kallsyms is damaged")
        return [live] if init is None else [live, init]

    def _are_code(self, columns: list[list[int]]) -> bool:
        return all(self._is_code(addr) for column in columns for addr in column)

    def _is_ex_table(self, columns: list[list[int]]) -> bool:
        """It is sorted when the kernel is linked (scripts/sorttable.c): the kernel looks there by halves."""
        return self._are_code(columns) and columns[0] == sorted(columns[0]) and len(columns[0]) >= _FEWEST_SORTED

    def _bug_entry(self) -> Layout | None:
        name = "___bug_table"
        if not self._has(name):
            return _BUG_ENTRIES[0]
        proven = [
            layout
            for layout in _BUG_ENTRIES
            if self._table(name, layout, self._are_mostly_traps if layout is _WITH_FORMAT else self._are_traps)
        ]
        return proven[0] if len(proven) == 1 else None

    def _has(self, name: str) -> bool:
        section = self.kallsyms.section(f"__start{name}", f"__stop{name}")
        return section is not None and section.size > 0

    def _are_traps(self, columns: list[list[int]]) -> bool:
        live = self._text()[0]
        return all(self._is_trap(addr) if addr in live else self._is_code(addr) for addr in columns[0])

    def _are_mostly_traps(self, columns: list[list[int]]) -> bool:
        """The entry of a WARN with arguments names what loads them, in front of the trap (``__WARN_bug_entry``)."""
        live = self._text()[0]
        traps = [self._is_trap(addr) for addr in columns[0] if addr in live]
        return self._are_code(columns) and 2 * sum(traps) > len(traps)

    def _is_trap(self, addr: int) -> bool:
        return self.memory.read(VirtAddr(addr), 4).startswith(_TRAPS)

    def _smp_alt_module(self) -> Layout | None:
        """The kernel's own is on the list of them whenever there are any, and symbols have what it holds."""
        head = self.kallsyms.find("smp_alt_modules")
        if head is None or read_pointer(self.memory, head) == head:
            return _SMP_ALT_MODULE
        names = {"locks": "__smp_locks", "locks_end": "__smp_locks_end", "text": "_text", "text_end": "_etext"}
        symbols = {member: self.kallsyms.find(symbol) for member, symbol in names.items()}
        members = _SMP_ALT_MODULE.members
        try:
            for entry in for_each_list_entry(self.memory, head, members["next"].offset):
                held = {name: read_pointer(self.memory, VirtAddr(entry + members[name].offset)) for name in names}
                if held == symbols:
                    return _SMP_ALT_MODULE if self._are_locks(held["locks"], held["locks_end"]) else None
        except (UnmappedError, GuestStateError):
            pass
        return None

    def _are_locks(self, start: VirtAddr, end: VirtAddr) -> bool:
        data = read_array(self.memory, "the list of lock prefixes", start, (end - start) // _INT_SIZE, _INT_SIZE)
        places = _relative(start, data, _INT_SIZE, 0)
        live = self._text()[0]
        return all(
            self.memory.read(VirtAddr(addr), 1) in _LOCK_PREFIXES if addr in live else self._is_code(addr)
            for addr in places
        )

    def _blacklist_entry(self) -> Layout | None:
        """Each entry is of text that comes before its end (kernel/kprobes.c)."""
        head = self.kallsyms.find("kprobe_blacklist")
        if head is None:
            return _BLACKLIST_ENTRY
        places = [_BLACKLIST_ENTRY.members[name].offset for name in ("start_addr", "end_addr")]
        try:
            for entry in for_each_list_entry(self.memory, head, 0):
                start, end = (read_pointer(self.memory, VirtAddr(entry + place)) for place in places)
                if not start < end or not any(start in text and end - 1 in text for text in (*self._text(), _MODULES)):
                    return None
        except (UnmappedError, GuestStateError):
            return None
        return _BLACKLIST_ENTRY

    def _dyn_ftrace(self) -> Layout | None:
        return _DYN_FTRACE if self._is_ftrace() else None

    def _ftrace_page(self) -> Layout | None:
        return _FTRACE_PAGE if self._is_ftrace() else None

    def _is_ftrace(self) -> bool:
        """Whether the records are pages of pairs, each of them with the address of a nop, or of what may replace it."""
        pages = self.kallsyms.find("ftrace_pages_start")
        if pages is None:
            return True
        live = self._text()[0]
        text = self.memory.read(live.start, live.size)
        try:
            at = read_pointer(self.memory, pages)
            visited, left = Visited("the list ftrace_pages_start"), Steps("the list ftrace_pages_start", _MOST_RECORDS)
            while at:
                visited.visit(at)
                following, records, count = struct.unpack("<QQI", self.memory.read(at, 20))
                left.take(count)
                data = self.memory.read(VirtAddr(records), count * _DYN_FTRACE.size)
                ips = [ip for ip, _ in struct.iter_unpack("<QQ", data)]
                if ips != sorted(ips) or not all(
                    text[ip - live.start] in _AT_NOPS if ip in live else ip in _MODULES for ip in ips
                ):
                    return False
                at = VirtAddr(following)
        except (UnmappedError, GuestStateError):
            return False
        return True


def _relative(start: int, data: bytes, step: int, offset: int) -> list[int]:
    """What a self-relative member of each entry points to."""
    entry = struct.Struct(f"<{offset}xi{step - offset - _INT_SIZE}x")
    return [
        (start + index * step + offset + distance) & _MASK
        for index, (distance,) in enumerate(entry.iter_unpack(data[: len(data) // step * step]))
    ]


def _running_state(memory: Memory, kallsyms: Kallsyms) -> int | None:
    """The value of SYSTEM_RUNNING, the last one that ``kernel_init`` stores to ``system_state`` (init/main.c).

    What it stores before, if anything (SYSTEM_FREEING_INITMEM, since v5.16), is lower. None: it does not say.
    """
    variable, function = kallsyms.find("system_state"), kallsyms.find("kernel_init")
    found = None if function is None else kallsyms.symbol_at(function)
    if variable is None or function is None or found is None:
        return None
    values = []
    try:
        code = memory.read(function, kallsyms.end(found[0]) - function)
        for insn in iter_insns(code, function):
            raw = insn.raw
            if raw.startswith(_MOV_IMM32_TO_RIP) and len(raw) == 10:
                (distance, value) = struct.unpack("<iI", raw[2:])
                if insn.end + distance == variable:
                    values.append(value)
    except (DecodeError, UnmappedError):
        return None
    return max(values, default=None)
