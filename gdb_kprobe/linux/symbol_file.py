"""A symbol file made of the guest's kallsyms: an ELF file with a symbol table and nothing else.

For a debugger that has no vmlinux: names in backtraces, disassembly and breakpoints. It has sections, but no contents:
code is read from the guest. Source of the format: System V ABI, "ELF-64 Object File Format".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from gdb_kprobe.model import AddressRange, Symbol

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")

_ET_EXEC, _EM_X86_64 = 2, 62
_SHT_SYMTAB, _SHT_STRTAB, _SHT_NOBITS = 2, 3, 8
_WRITE, _ALLOC, _EXECINSTR = 1, 2, 4
_SHN_ABS = 0xFFF1
_LOCAL, _GLOBAL = 0, 1
_OBJECT, _FUNC = 1, 2


def symbol_file(symbols: Iterable[Symbol], text: Iterable[AddressRange], data: Iterable[AddressRange]) -> bytes:
    """Return the ELF file with *symbols*; those outside of *text* and *data* become absolute."""
    sections = [(window, True) for window in text] + [(window, False) for window in data]
    strings = bytearray(b"\0")
    local: list[bytes] = [bytes(_SYMBOL.size)]
    other: list[bytes] = []
    for symbol in symbols:
        index = next((i for i, (window, _) in enumerate(sections, 1) if symbol.addr in window), _SHN_ABS)
        kind = _FUNC if symbol.is_text else _OBJECT
        binding = _LOCAL if symbol.type.islower() else _GLOBAL
        entry = _SYMBOL.pack(len(strings), binding << 4 | kind, 0, index, symbol.addr, 0)
        (local if binding == _LOCAL else other).append(entry)
        strings += symbol.name.encode() + b"\0"
    return _file(sections, b"".join(local + other), len(local), bytes(strings))


def _file(sections: list[tuple[AddressRange, bool]], symtab: bytes, locals_: int, strtab: bytes) -> bytes:
    names = bytearray(b"\0")

    def name(text: str) -> int:
        names.extend(text.encode() + b"\0")
        return len(names) - len(text) - 1

    headers = [bytes(_SECTION.size)]
    for window, is_text in sections:
        flags = _ALLOC | (_EXECINSTR if is_text else _WRITE)
        label = name(".text" if is_text else ".data")
        headers.append(_SECTION.pack(label, _SHT_NOBITS, flags, window.start, _HEADER.size, window.size, 0, 0, 16, 0))
    at = _HEADER.size
    count = len(sections) + 4
    headers.append(
        _SECTION.pack(name(".symtab"), _SHT_SYMTAB, 0, 0, at, len(symtab), count - 2, locals_, 8, _SYMBOL.size)
    )
    headers.append(_SECTION.pack(name(".strtab"), _SHT_STRTAB, 0, 0, at + len(symtab), len(strtab), 0, 0, 1, 0))
    own = name(".shstrtab")
    at += len(symtab) + len(strtab)
    headers.append(_SECTION.pack(own, _SHT_STRTAB, 0, 0, at, len(names), 0, 0, 1, 0))
    header = _HEADER.pack(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), _ET_EXEC, _EM_X86_64, 1, 0, 0, at + len(names), 0,
        _HEADER.size, 0, 0, _SECTION.size, count, count - 1,
    )  # fmt: skip
    return header + symtab + strtab + bytes(names) + b"".join(headers)
