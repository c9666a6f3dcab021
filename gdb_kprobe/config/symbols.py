"""The symbol file of a bare-metal guest: JSON or YAML, of which JSON is a subset.

Either the symbols alone, ``{NAME: ADDRESS, ...}``, or ``{"symbols": {NAME: ADDRESS, ...}, "text": {"address": ADDRESS,
"size": BYTES}}``, where *text* says what of it is code. Other keys on the top level are for other programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from gdb_kprobe.config.document import compose_file
from gdb_kprobe.errors import ConfigError
from gdb_kprobe.language.number import parse_number
from gdb_kprobe.model import AddressRange, VirtAddr


@dataclass(frozen=True, slots=True)
class SymbolFile:
    """Addresses by name; *text* is None when the file does not say where the code is."""

    symbols: dict[str, VirtAddr]
    text: AddressRange | None = None


def load_symbols(path: Path) -> SymbolFile:
    """Read the file *path*.

    :raises ConfigError: it cannot be read, or something in it is not a name, an address or a range.
    """
    root = _entries(path, compose_file(path), "a symbol file")
    if not isinstance(root.get("symbols"), yaml.MappingNode):
        return SymbolFile(_addresses(path, root))
    symbols = _addresses(path, _entries(path, root["symbols"], "'symbols'"))
    return SymbolFile(symbols, _range(path, root["text"]) if "text" in root else None)


def _entries(path: Path, node: yaml.Node | None, what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        line = 1 if node is None else node.start_mark.line + 1
        raise ConfigError(path, line, f"{what} must be a mapping of names to addresses", "write NAME: 0xADDRESS")
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            raise ConfigError(path, line, "a name must be a word", "write NAME: 0xADDRESS")
        if key.value in entries:
            raise ConfigError(path, line, f"'{key.value}' is there twice", "keep one")
        entries[key.value] = value
    return entries


def _addresses(path: Path, entries: dict[str, yaml.Node]) -> dict[str, VirtAddr]:
    return {name: VirtAddr(_number(path, name, node)) for name, node in entries.items()}


def _range(path: Path, node: yaml.Node) -> AddressRange:
    entries = _entries(path, node, "'text'")
    line = node.start_mark.line + 1
    if entries.keys() != {"address", "size"}:
        raise ConfigError(path, line, "'text' must have 'address' and 'size'", "write {address: 0x..., size: BYTES}")
    start, size = (_number(path, key, entries[key]) for key in ("address", "size"))
    if (start + size) >> 64:
        raise ConfigError(path, line, f"'text' goes beyond the last address: {start:#x} and {size:#x} bytes more")
    return AddressRange(VirtAddr(start), VirtAddr(start + size))


def _number(path: Path, name: str, node: yaml.Node) -> int:
    value = parse_number(node.value) if isinstance(node, yaml.ScalarNode) else None
    if value is None:
        line = node.start_mark.line + 1
        raise ConfigError(path, line, f"'{name}' is not an address", "write NAME: 0xADDRESS")
    return value
