"""The decoder against an encoder written from the format of scripts/kallsyms.c, in every layout."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.image import KernelImage
from gdb_kprobe.linux.kallsyms_table import SymbolTable, read_core_symbols
from gdb_kprobe.model import AddressRange, VirtAddr

BASE = 0xFFFF_FFFF_9A00_0000
SIZE = 4 << 20
RODATA = BASE + (1 << 20)

# Token 0 is compound, as in real tables; the digits and letters stand for themselves.
TOKENS = [b"sys_", b"__x64_", *(bytes([code]) for code in range(2, 256))]


def symbols(count: int = 4000, *, big: bool = False) -> list[tuple[str, str, int]]:
    rng = random.Random(count)
    found = [("A", f"percpu_{number}", 0x40 * number) for number in range(20)]
    addr = BASE
    for number in range(count - 20):
        letter = rng.choice("TtDdRrBb")
        found.append((letter, f"{'__x64_' * (number % 2)}sys_{'long_name_' * (number % 9)}{number}", addr))
        addr += rng.choice((0, 16, 48, 256))
    if big:
        found.append(("t", "z" * 300, addr))
    return found


def encode(name: str) -> bytes:
    data = name.encode().replace(b"__x64_", b"\1").replace(b"sys_", b"\0")
    return bytes([len(data)]) + data if len(data) < 128 else bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data


def aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def parts(entries: list[tuple[str, str, int]], *, percpu: bool = True) -> dict[str, bytes]:
    names, markers = b"", []
    for index, (letter, name, _) in enumerate(entries):
        if index % 256 == 0:
            markers.append(len(names))
        names += encode(letter + name)
    offsets = [addr if addr < BASE and percpu else BASE - 1 - addr if percpu else addr - BASE for _, _, addr in entries]
    starts = [sum(len(token) + 1 for token in TOKENS[:index]) for index in range(256)]
    return {
        "num_syms": aligned(struct.pack("<I", len(entries))),
        "names": aligned(names),
        "markers": aligned(struct.pack(f"<{len(markers)}I", *markers)),
        "seqs": aligned(random.Random(1).randbytes(3 * len(entries))),
        "token_table": aligned(b"".join(token + b"\0" for token in TOKENS)),
        "token_index": aligned(struct.pack("<256H", *starts)),
        "offsets": aligned(struct.pack(f"<{len(offsets)}i", *offsets)),
        "relative_base": struct.pack("<Q", BASE),
    }


OLD = ("offsets", "relative_base", "num_syms", "names", "markers", "token_table", "token_index")
OLD_WITH_SEQS = ("offsets", "relative_base", "num_syms", "names", "markers", "seqs", "token_table", "token_index")
NEW = ("num_syms", "names", "markers", "token_table", "token_index", "offsets", "relative_base", "seqs")
LAYOUTS = pytest.mark.parametrize("order", [OLD, OLD_WITH_SEQS, NEW], ids=["to 6.1", "6.2 and 6.3", "from 6.4"])


def image(size: int, *, writable: bool = False) -> KernelImage:
    end = VirtAddr(RODATA + size)
    window = AddressRange(VirtAddr(RODATA), end)
    text = (AddressRange(VirtAddr(BASE), VirtAddr(RODATA)),)
    return KernelImage(VirtAddr(BASE), end, text, () if writable else (window,), (window,) if writable else ())


def read(memory: Any, contents: dict[str, bytes], order: tuple[str, ...], *, writable: bool = False) -> SymbolTable:
    # Something of each kind that might be mistaken for the table stands before it.
    before = aligned(bytes(0x2000) + b"\0".join(b"%d" % digit for digit in range(10)) + b"\0" + b"text\0" * 50)
    data = before + b"".join(contents[name] for name in order) + bytes(0x1000)
    data += bytes(-len(data) % 0x1000)
    memory.add(RODATA, data)
    return read_core_symbols(memory, image(len(data), writable=writable))


def decoded(table: SymbolTable) -> list[tuple[str, str, int]]:
    return list(zip(table.types, table.names, table.addrs, strict=True))


@LAYOUTS
def test_every_symbol_comes_back(memory: Any, order: tuple[str, ...]) -> None:
    expected = symbols()
    assert decoded(read(memory, parts(expected), order)) == expected


@LAYOUTS
@pytest.mark.parametrize("count", [2561, 2816, 2817])
def test_the_last_marker_may_stand_for_one_name_or_for_256(memory: Any, order: tuple[str, ...], count: int) -> None:
    expected = symbols(count)
    assert decoded(read(memory, parts(expected), order)) == expected


@LAYOUTS
def test_names_of_128_tokens_and_more_have_a_two_byte_length(memory: Any, order: tuple[str, ...]) -> None:
    expected = symbols(big=True)
    assert decoded(read(memory, parts(expected), order)) == expected


@LAYOUTS
def test_without_absolute_percpu_offsets_count_up_from_the_base(memory: Any, order: tuple[str, ...]) -> None:
    expected = symbols()[20:]
    assert decoded(read(memory, parts(expected, percpu=False), order)) == expected


def test_table_is_found_before_the_guest_has_write_protected_it(memory: Any) -> None:
    expected = symbols()
    assert decoded(read(memory, parts(expected), NEW, writable=True)) == expected


def test_memory_is_read_only_as_far_as_the_table_reaches(memory: Any) -> None:
    contents = parts(symbols())
    data = aligned(b"".join(contents[name] for name in NEW))
    memory.add(RODATA, data + bytes((3 << 20) - len(data)))  # the image claims more than there is
    assert decoded(read_core_symbols(memory, image(64 << 20))) == symbols()


def damaged(contents: dict[str, bytes], name: str, at: int, value: bytes) -> dict[str, bytes]:
    data = bytearray(contents[name])
    data[at : at + len(value)] = value
    return {**contents, name: bytes(data)}


@pytest.mark.parametrize(
    ("name", "at", "value", "why"),
    [
        ("token_index", 400, b"\xff\xff", "token index does not fit"),
        ("token_index", 0, b"\1", "token index does not begin"),
        ("markers", 0, b"\1", "no markers"),
        ("markers", 8, b"\1\2", "no number of symbols|no markers"),
        ("num_syms", 0, b"\1\0\0\0", "no number of symbols"),
        ("names", 0, b"\7", "no number of symbols"),
        ("relative_base", 0, b"\1", "no relative base"),
    ],
)
def test_damage_is_told_and_nothing_guessed(memory: Any, name: str, at: int, value: bytes, why: str) -> None:
    with pytest.raises(GuestStateError, match=rf"kallsyms.*({why}).*\n.*CONFIG_KALLSYMS"):
        read(memory, damaged(parts(symbols()), name, at, value), NEW)


def test_image_without_a_table_says_what_the_kernel_needs(memory: Any) -> None:
    memory.add(RODATA, bytes(0x4000))
    with pytest.raises(GuestStateError, match="the kernel needs CONFIG_KALLSYMS"):
        read_core_symbols(memory, image(0x4000))
