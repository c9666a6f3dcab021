"""The guest's loaded modules, and their symbols."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.image import read_c_string, read_string
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.linux.strings import c_string, letters
from gdb_kprobe.linux.structs import Struct, for_each_struct, read_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, ModuleLoad, VirtAddr
from gdb_kprobe.system.bounds import Steps, damaged, guest_range, read_array
from gdb_kprobe.target.protocols import Memory

_ELF64_SYM = struct.Struct("<IBBHQQ")
_MOST_TEXT = 64 << 20
"""Characters in all names of one module."""


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
    member, step = raw.types.member("module", "mem"), raw.types.size_of("module_memory")
    first = member.offset
    if first + member.size > len(raw.data):
        raise damaged("struct module ends before its member mem")
    parts: dict[int, AddressRange] = {}
    for index in range(member.size // step):
        start = first + index * step
        part = Struct(raw.types, "module_memory", VirtAddr(raw.addr + start), raw.data[start : start + step])
        if part.uint("size"):
            parts[index] = _range(raw, part.uint("base"), part.uint("size"))
    base = raw.uint("mem.base")
    text, init_text = (kinds.get(name) for name in ("MOD_TEXT", "MOD_INIT_TEXT"))
    if text is None or init_text is None:
        raise GuestStateError("enum mod_mem_type is not as known here", "the kernel's version has another layout")
    return tuple(parts.values()), parts.get(text, _range(raw, base, 0)), parts.get(init_text)


def _memory_before_6_4(raw: Struct) -> _Memory:
    core, init = raw.uint("core_layout.base"), raw.uint("init_layout.base")
    ranges = [_range(raw, core, raw.uint("core_layout.size"))]
    init_text = None
    if raw.uint("init_layout.size"):
        ranges.append(_range(raw, init, raw.uint("init_layout.size")))
        init_text = _range(raw, init, raw.uint("init_layout.text_size"))
    return tuple(ranges), _range(raw, core, raw.uint("core_layout.text_size")), init_text


def _range(raw: Struct, start: int, size: int) -> AddressRange:
    return guest_range(f"memory of the module at {raw.addr:#x}", start, start + size)


def load_of(module: Module) -> ModuleLoad:
    """What tells *module* from an earlier or later load of the same module."""
    return ModuleLoad(module.name, module.raw.addr, module.load)


def read_module_symbols(memory: Memory, module: Module) -> SymbolTable:
    """Read a module's symbols as ``/proc/kallsyms`` shows them: named ones only, upper case when exported.

    Exported means found in ``syms`` (not ``gpl_syms``) with this address: ``is_exported`` in kernel/module/kallsyms.c.

    :raises GuestStateError: this kernel has no such tables.
    """
    types = module.raw.types
    table = read_struct(memory, types, "mod_kallsyms", module.raw.pointer("kallsyms"))
    count = table.uint("num_symtab")
    what = f"the symbol table of module {module.name}"
    symtab = read_array(memory, what, table.pointer("symtab"), count, _ELF64_SYM.size)
    kinds = letters(read_array(memory, what, table.pointer("typetab"), count, 1))
    symbols = list(_ELF64_SYM.iter_unpack(symtab))
    names = _names(memory, what, table.pointer("strtab"), [symbol[0] for symbol in symbols])
    exported = dict(_exported(memory, module))
    shown = [index for index, name in enumerate(names) if name]
    return SymbolTable(
        names=[names[index] for index in shown],
        types="".join(
            [
                kinds[index].upper() if exported.get(names[index]) == symbols[index][4] else kinds[index].lower()
                for index in shown
            ]
        ),
        addrs=array("Q", [symbols[index][4] for index in shown]),
        ranges=module.ranges,
        module=module.name,
    )


def _names(memory: Memory, what: str, strtab: VirtAddr, offsets: list[int]) -> list[str]:
    if not offsets:
        return []
    # The size of the string table is not recorded: it goes at least to the name that begins last.
    last = max(offsets)
    data = read_array(memory, f"{what}: its names", strtab, last, 1) + read_c_string(memory, VirtAddr(strtab + last))
    # Offsets that share the end of a long name would have it copied for each.
    steps = Steps(f"{what}: the text of its names", _MOST_TEXT)
    names = []
    for at in offsets:
        names.append(c_string(data, at))
        steps.take(len(names[-1]))
    return names


def _exported(memory: Memory, module: Module) -> Iterator[tuple[str, int]]:
    """Yield name and address of each symbol in ``module.syms``; the members are relative to themselves (PREL32)."""
    count = module.raw.uint("num_syms")
    start = module.raw.pointer("syms")
    step = module.raw.types.size_of("kernel_symbol")
    data = read_array(memory, f"the list of what module {module.name} exports", start, count, step)
    for at in range(0, count * step, step):
        entry = Struct(module.raw.types, "kernel_symbol", VirtAddr(start + at), data[at : at + step])
        name_member = module.raw.types.offset_of("kernel_symbol", "name_offset")
        name = read_string(memory, VirtAddr(entry.addr + name_member + entry.sint("name_offset")))
        yield name, entry.addr + entry.sint("value_offset")


def module_at(modules: tuple[Module, ...], addr: int) -> Module | None:
    """Return the module whose memory *addr* is in."""
    return next((module for module in modules if any(addr in window for window in module.ranges)), None)
