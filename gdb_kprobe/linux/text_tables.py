"""The tables in which the guest lists places of its text: those that it patches itself, and those that may fault.

Each is read for the core kernel, between two symbols of the linker script, and for each module, from a pointer and a
count in its ``struct module``. Their entries hold addresses relative to themselves.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.modules import Module
from gdb_kprobe.linux.structs import for_each_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange
from gdb_kprobe.system.bounds import damaged, guest_range, read_array
from gdb_kprobe.target.protocols import Memory

_INT_SIZE = 4


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a table is: the entry's type and its relative member, the section's symbols, the members of a module."""

    type_name: str
    members: tuple[str, ...]
    start: str
    stop: str
    module_start: str
    module_count: str


_EX_TABLE = _Table(
    "exception_table_entry", ("insn", "fixup"), "__start___ex_table", "__stop___ex_table", "extable", "num_exentries"
)
_JUMP_TABLE = _Table(
    "jump_entry", ("code", "target"), "__start___jump_table", "__stop___jump_table", "jump_entries", "num_jump_entries"
)
_STATIC_CALLS = _Table(
    "static_call_site",
    ("addr",),
    "__start_static_call_sites",
    "__stop_static_call_sites",
    "static_call_sites",
    "num_static_call_sites",
)
_BUG_TABLE = _Table(
    "bug_entry", ("bug_addr_disp",), "__start___bug_table", "__stop___bug_table", "bug_table", "num_bugs"
)


@dataclass(frozen=True, slots=True)
class TextTables:
    """Sorted addresses of places in text (of the two pairs, the second is in the order of the first).

    ======================  ==================================================================================
    *ex_table*              instructions that may fault; *ex_fixups* are where they then go on
    *jump_labels*           2- or 5-byte nops and jumps that static keys switch; *jump_targets* are where they go
    *static_calls*          5-byte calls and jumps that are redirected
    *bugs*                  ``ud2`` of BUG and WARN
    *locks*                 lock prefixes that are patched when a second CPU comes or the last but one goes
    ======================  ==================================================================================
    """

    ex_table: array[int]
    ex_fixups: array[int]
    jump_labels: array[int]
    jump_targets: array[int]
    static_calls: array[int]
    bugs: array[int]
    locks: array[int]


def read_text_tables(memory: Memory, kallsyms: Kallsyms, types: Types, modules: tuple[Module, ...]) -> TextTables:
    """Read all tables of the core kernel and of *modules*. A table that this kernel does not have is empty.

    :raises GuestStateError: a table is there, but its entries are not as known here.
    """

    def read(table: _Table) -> list[array[int]]:
        rows: list[tuple[int, ...]] = []
        for section, inside in _sections(kallsyms, types, modules, table):
            columns = [_relative_column(memory, types, section, table.type_name, member) for member in table.members]
            found = zip(*columns, strict=True)
            rows += [row for row in found if any(row[0] in window for window in inside)]
        rows.sort()
        return [array("Q", [row[index] for row in rows]) for index in range(len(table.members))]

    ex_table, ex_fixups = read(_EX_TABLE)
    jump_labels, jump_targets = read(_JUMP_TABLE)
    (static_calls,) = read(_STATIC_CALLS)
    (bugs,) = read(_BUG_TABLE)
    locks = array("Q", sorted(_lock_prefixes(memory, kallsyms, types)))
    return TextTables(ex_table, ex_fixups, jump_labels, jump_targets, static_calls, bugs, locks)


def _sections(
    kallsyms: Kallsyms, types: Types, modules: tuple[Module, ...], table: _Table
) -> Iterator[tuple[AddressRange, tuple[AddressRange, ...]]]:
    """Yield where each copy of *table* is, and the memory of the kernel or module that it speaks of.

    A module's tables keep the entries for its init text when that is freed: another module may be there by now.
    """
    core = kallsyms.section(table.start, table.stop)
    if core is not None and core.size:
        yield core, kallsyms.tables[0].ranges
    if not modules or not types.has_member("module", table.module_count):
        return
    for module in modules:
        count = module.raw.uint(table.module_count)
        if count:
            start = module.raw.pointer(table.module_start)
            section = guest_range(
                f"{table.module_start} of module {module.name}", start, start + count * types.size_of(table.type_name)
            )
            yield section, module.ranges


def _relative_column(
    memory: Memory, types: Types, section: AddressRange, type_name: str, member_name: str
) -> Iterator[int]:
    """Yield what a self-relative 32-bit member of each entry in *section* points to."""
    member, step = types.member(type_name, member_name), types.size_of(type_name)
    if member.offset + _INT_SIZE > step:
        raise damaged(f"{type_name}.{member_name} ends beyond the {step} bytes of its structure")
    data = read_array(memory, f"the table of {type_name}s", section.start, section.size // step, step)
    entry = struct.Struct(f"<{member.offset}xi{step - member.offset - _INT_SIZE}x")
    at = section.start + member.offset
    for index, (distance,) in enumerate(entry.iter_unpack(data)):
        yield (at + index * step + distance) & 0xFFFF_FFFF_FFFF_FFFF


def _lock_prefixes(memory: Memory, kallsyms: Kallsyms, types: Types) -> Iterator[int]:
    """Yield the places in ``smp_alt_modules``, the list of what the kernel may still patch.

    The section's own symbols do not help: after boot it is freed where no further CPU is possible.
    """
    head = kallsyms.find("smp_alt_modules")
    if head is None or not types.has_member("smp_alt_module", "locks"):
        return
    for entry in for_each_struct(memory, types, "smp_alt_module", "next", head):
        start, end = entry.uint("locks"), entry.uint("locks_end")
        locks = guest_range(f"the list of lock prefixes at {entry.addr:#x}", start, end)
        what = "the list of lock prefixes"
        data = read_array(memory, what, locks.start, locks.size // _INT_SIZE, _INT_SIZE)
        for index, (distance,) in enumerate(struct.iter_unpack("<i", data)):
            yield (start + 4 * index + distance) & 0xFFFF_FFFF_FFFF_FFFF
