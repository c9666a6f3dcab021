"""The ELF file made of symbols, read back by pyelftools."""

from __future__ import annotations

import io

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from gdb_kprobe.linux.symbol_file import symbol_file
from gdb_kprobe.model import AddressRange, Symbol, VirtAddr

TEXT = AddressRange(VirtAddr(0xFFFF_FFFF_8100_0000), VirtAddr(0xFFFF_FFFF_8200_0000))
MODULE = AddressRange(VirtAddr(0xFFFF_FFFF_C010_0000), VirtAddr(0xFFFF_FFFF_C010_2000))
DATA = AddressRange(VirtAddr(0xFFFF_FFFF_8200_0000), VirtAddr(0xFFFF_FFFF_8300_0000))

SYMBOLS = (
    Symbol("vfs_read", VirtAddr(0xFFFF_FFFF_8112_3450), "T"),
    Symbol("static_one", VirtAddr(0xFFFF_FFFF_8112_3460), "t"),
    Symbol("jiffies", VirtAddr(0xFFFF_FFFF_8200_5000), "D"),
    Symbol("lo_open", VirtAddr(0xFFFF_FFFF_C010_0010), "t", "loop"),
    Symbol("elsewhere", VirtAddr(0xFFFF_FFFF_FF00_0000), "T"),
)


def read_back() -> ELFFile:
    return ELFFile(io.BytesIO(symbol_file(SYMBOLS, (TEXT, MODULE), (DATA,))))


def symbol_table() -> SymbolTableSection:
    table = read_back().get_section_by_name(".symtab")
    assert isinstance(table, SymbolTableSection)
    return table


def test_symbols_have_name_address_kind_and_section() -> None:
    found = {
        entry.name: (entry["st_value"], entry["st_info"]["type"], entry["st_info"]["bind"], entry["st_shndx"])
        for entry in symbol_table().iter_symbols()
        if entry.name
    }
    assert found == {
        "vfs_read": (0xFFFF_FFFF_8112_3450, "STT_FUNC", "STB_GLOBAL", 1),
        "static_one": (0xFFFF_FFFF_8112_3460, "STT_FUNC", "STB_LOCAL", 1),
        "jiffies": (0xFFFF_FFFF_8200_5000, "STT_OBJECT", "STB_GLOBAL", 3),
        "lo_open": (0xFFFF_FFFF_C010_0010, "STT_FUNC", "STB_LOCAL", 2),
        "elsewhere": (0xFFFF_FFFF_FF00_0000, "STT_FUNC", "STB_GLOBAL", "SHN_ABS"),
    }


def test_local_symbols_come_first() -> None:
    table = symbol_table()
    binds = [entry["st_info"]["bind"] for entry in table.iter_symbols()]
    assert table["sh_info"] == binds.index("STB_GLOBAL")
    assert "STB_LOCAL" not in binds[table["sh_info"] :]


def test_sections_lie_where_the_kernel_does_and_hold_nothing() -> None:
    sections = [section for section in read_back().iter_sections() if section["sh_type"] == "SHT_NOBITS"]
    assert [(section["sh_addr"], section["sh_size"]) for section in sections] == [
        (window.start, window.size) for window in (TEXT, MODULE, DATA)
    ]
