"""The guest's loaded modules, and their symbols."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.image import read_string
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.structs import Struct, for_each_struct, read_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.target.protocols import Memory

_ELF64_SYM = struct.Struct("<IBBHQQ")


class ModuleState(StrEnum):
    """``enum module_state`` (include/linux/module.h), in the words of ``/proc/modules``."""

    LIVE = "Live"
    COMING = "Loading"
    GOING = "Unloading"
    UNFORMED = "Unformed"


_STATES = (ModuleState.LIVE, ModuleState.COMING, ModuleState.GOING, ModuleState.UNFORMED)


@dataclass(frozen=True, slots=True)
class Module:
    """One ``struct module``. *ranges* is all of its memory, init parts (while it has any) included.

    *text* is its code without the init part, *init_text* the init part or None once it is freed. *raw* is the
    structure itself, for what the other readers need of it. *load* tells one load of a module from another at the same
    address: the number of its directory in sysfs (``kernfs_node.id``), which is not given twice; 0 before it has one,
    after it has lost it, and in kernels without sysfs.
    """

    name: str
    state: ModuleState
    base: VirtAddr
    ranges: tuple[AddressRange, ...]
    text: AddressRange
    init_text: AddressRange | None
    load: int
    raw: Struct = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes of memory, as in ``/proc/modules``."""
        return sum(window.size for window in self.ranges)


def read_modules(memory: Memory, types: Types, modules: VirtAddr) -> tuple[Module, ...]:
    """Read the list at symbol ``modules``, the last loaded first. Modules still being formed are left out.

    :raises GuestStateError: the list or the structures are not as known here.
    """
    found = (_read_module(memory, raw) for raw in for_each_struct(memory, types, "module", "list", modules))
    return tuple(module for module in found if module.state is not ModuleState.UNFORMED)


def _read_module(memory: Memory, raw: Struct) -> Module:
    state = raw.uint("state")
    if state >= len(_STATES):
        raise GuestStateError(f"struct module at {raw.addr:#x} has state {state}", "the guest's module list is damaged")
    # Linux kernel commit ac3b43283923 "module: replace module_layout with module_memory" (in v6.4)
    ranges, text, init_text = _memory_since_6_4(raw) if raw.has("mem") else _memory_before_6_4(raw)
    return Module(
        name=raw.string("name"),
        state=_STATES[state],
        base=text.start,
        ranges=ranges,
        text=text,
        init_text=init_text,
        load=_load(memory, raw),
        raw=raw,
    )


def _load(memory: Memory, raw: Struct) -> int:
    if not raw.has("mkobj") or not raw.types.has_member("kernfs_node", "id"):
        return 0
    directory = raw.pointer("mkobj.kobj.sd")
    if not directory:
        return 0
    member = raw.types.member("kernfs_node", "id")
    try:
        return int.from_bytes(memory.read(VirtAddr(directory + member.offset), member.size), "little")
    except UnmappedError:
        return 0


_Memory = tuple[tuple[AddressRange, ...], AddressRange, AddressRange | None]


def _memory_since_6_4(raw: Struct) -> _Memory:
    kinds = raw.types.enum("mod_mem_type")
    first, step = raw.types.offset_of("module", "mem"), raw.types.size_of("module_memory")
    parts: dict[int, AddressRange] = {}
    for index in range(raw.types.member("module", "mem").size // step):
        start = first + index * step
        part = Struct(raw.types, "module_memory", VirtAddr(raw.addr + start), raw.data[start : start + step])
        if part.uint("size"):
            parts[index] = _range(part.uint("base"), part.uint("size"))
    base = raw.uint("mem.base")
    return tuple(parts.values()), parts.get(kinds["MOD_TEXT"], _range(base, 0)), parts.get(kinds["MOD_INIT_TEXT"])


def _memory_before_6_4(raw: Struct) -> _Memory:
    core, init = raw.uint("core_layout.base"), raw.uint("init_layout.base")
    ranges = [_range(core, raw.uint("core_layout.size"))]
    init_text = None
    if raw.uint("init_layout.size"):
        ranges.append(_range(init, raw.uint("init_layout.size")))
        init_text = _range(init, raw.uint("init_layout.text_size"))
    return tuple(ranges), _range(core, raw.uint("core_layout.text_size")), init_text


def _range(start: int, size: int) -> AddressRange:
    return AddressRange(VirtAddr(start), VirtAddr(start + size))


def read_module_symbols(memory: Memory, module: Module) -> SymbolTable:
    """Read a module's symbols as ``/proc/kallsyms`` shows them: named ones only, upper case when exported.

    Exported means found in ``syms`` (not ``gpl_syms``) with this address: ``is_exported`` in kernel/module/kallsyms.c.

    :raises GuestStateError: this kernel has no such tables.
    """
    types = module.raw.types
    table = read_struct(memory, types, "mod_kallsyms", module.raw.pointer("kallsyms"))
    count = table.uint("num_symtab")
    symtab = memory.read(table.pointer("symtab"), count * _ELF64_SYM.size)
    letters = memory.read(table.pointer("typetab"), count).decode("latin-1")
    symbols = list(_ELF64_SYM.iter_unpack(symtab))
    names = _names(memory, table.pointer("strtab"), [symbol[0] for symbol in symbols])
    exported = dict(_exported(memory, module))
    shown = [index for index, name in enumerate(names) if name]
    return SymbolTable(
        names=[names[index] for index in shown],
        types="".join(
            [
                letters[index].upper() if exported.get(names[index]) == symbols[index][4] else letters[index].lower()
                for index in shown
            ]
        ),
        addrs=array("Q", [symbols[index][4] for index in shown]),
        ranges=module.ranges,
        module=module.name,
    )


def _names(memory: Memory, strtab: VirtAddr, offsets: list[int]) -> list[str]:
    if not offsets:
        return []
    # The size of the string table is not recorded: it goes at least to the name that begins last.
    last = max(offsets)
    data = memory.read(strtab, last) + read_string(memory, VirtAddr(strtab + last)).encode() + b"\0"
    return [data[at : data.index(b"\0", at)].decode("utf-8", "replace") for at in offsets]


def _exported(memory: Memory, module: Module) -> Iterator[tuple[str, int]]:
    """Yield name and address of each symbol in ``module.syms``; the members are relative to themselves (PREL32)."""
    count = module.raw.uint("num_syms")
    start = module.raw.pointer("syms")
    step = module.raw.types.size_of("kernel_symbol")
    data = memory.read(start, count * step)
    for at in range(0, count * step, step):
        entry = Struct(module.raw.types, "kernel_symbol", VirtAddr(start + at), data[at : at + step])
        name_member = module.raw.types.offset_of("kernel_symbol", "name_offset")
        name = read_string(memory, VirtAddr(entry.addr + name_member + entry.sint("name_offset")))
        yield name, entry.addr + entry.sint("value_offset")


def module_at(modules: tuple[Module, ...], addr: int) -> Module | None:
    """Return the module whose memory *addr* is in."""
    return next((module for module in modules if any(addr in window for window in module.ranges)), None)
