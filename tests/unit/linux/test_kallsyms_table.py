"""The decoder against an encoder written from the format of scripts/kallsyms.c, in every layout."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux import kallsyms_table
from gdb_kprobe.linux.image import KernelImage
from gdb_kprobe.linux.kallsyms_table import SymbolTable, read_core_symbols
from gdb_kprobe.model import AddressRange, VirtAddr

BASE = 0xFFFF_FFFF_9A00_0000
SIZE = 4 << 20
RODATA = BASE + (1 << 20)

# Token 0 is compound, as in real tables; the digits and letters stand for themselves.
TOKENS = [b"sys_", b"__x64_", *(bytes([code]) for code in range(2, 256))]


def symbols(count: int = 4000, *, big: int = 0, percpu: bool = True) -> list[tuple[str, str, int]]:
    """As /proc/kallsyms lists them, with *big* names of 300 tokens, as Rust's may have, at the end."""
    rng = random.Random(count)
    found = [("A", f"percpu_{number}", 0x40 * number) for number in range(20)] if percpu else []
    found.append(("T", "_text", BASE))
    addr = BASE
    for number in range(count - 21):
        letter = rng.choice("TtDdRrBb")
        found.append((letter, f"{'__x64_' * (number % 2)}sys_{'long_name_' * (number % 9)}{number}", addr))
        addr += rng.choice((0, 16, 48, 256))
    return found + [("t", "z" * 300 + str(number), addr) for number in range(big)]


def encode(name: str) -> bytes:
    data = name.encode().replace(b"__x64_", b"\1").replace(b"sys_", b"\0")
    return bytes([len(data)]) + data if len(data) < 128 else bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data


def aligned(data: bytes, to: int = 8) -> bytes:
    return data + bytes(-len(data) % to)


def parts(entries: list[tuple[str, str, int]], *, percpu: bool = True, to: int = 8) -> dict[str, bytes]:
    """All parts that do not depend on where they are."""
    names, markers = b"", []
    for index, (letter, name, _) in enumerate(entries):
        if index % 256 == 0:
            markers.append(len(names))
        names += encode(letter + name)
    starts = [sum(len(token) + 1 for token in TOKENS[:index]) for index in range(256)]
    contents = {
        "num_syms": struct.pack("<I", len(entries)),
        "names": names,
        "markers": struct.pack(f"<{len(markers)}I", *markers),
        "seqs": random.Random(1).randbytes(3 * len(entries)),
        "token_table": b"".join(token + b"\0" for token in TOKENS),
        "token_index": struct.pack("<256H", *starts),
        "relative_base": struct.pack("<Q", BASE),
        # What follows is not of the table: something is needed where its layout has nothing.
        "addrs": struct.pack(f"<{len(entries)}Q", *(addr for _, _, addr in entries)),
        "offsets": struct.pack(
            f"<{len(entries)}I",
            *(
                (addr if addr < BASE and percpu else BASE - 1 - addr if percpu else addr - BASE) & 0xFFFF_FFFF
                for _, _, addr in entries
            ),
        ),
    }
    return {name: aligned(data, to) for name, data in contents.items()}


def laid_out(contents: dict[str, bytes], order: tuple[str, ...], start: int) -> bytes:
    """The table in memory at *start*."""
    data = b""
    for name in order:
        if name == "places":
            addrs = [addr for (addr,) in struct.iter_unpack("<Q", contents["addrs"])]
            places = range(start + len(data), start + len(data) + 4 * len(addrs), 4)
            data += struct.pack(f"<{len(addrs)}i", *(addr - place for addr, place in zip(addrs, places, strict=True)))
        else:
            data += contents[name]
    return data


OLD = ("offsets", "relative_base", "num_syms", "names", "markers", "token_table", "token_index")
OLD_WITH_SEQS = ("offsets", "relative_base", "num_syms", "names", "markers", "seqs", "token_table", "token_index")
NEW = ("num_syms", "names", "markers", "token_table", "token_index", "offsets", "relative_base", "seqs")
NEWEST = ("num_syms", "names", "markers", "token_table", "token_index", "places", "seqs")
LAYOUTS = pytest.mark.parametrize(
    "order", [OLD, OLD_WITH_SEQS, NEW, NEWEST], ids=["to 6.1", "6.2 and 6.3", "from 6.4", "from 7.0"]
)


def made(
    order: tuple[str, ...], count: int = 4000, *, big: int = 0
) -> tuple[list[tuple[str, str, int]], dict[str, bytes]]:
    """Symbols, and the parts of their table as the kernels of this layout have them."""
    newest = order == NEWEST
    expected = symbols(count, big=big, percpu=not newest)
    return expected, parts(expected, to=4 if newest else 8)


def image(size: int, *, writable: bool = False) -> KernelImage:
    end = VirtAddr(RODATA + size)
    window = AddressRange(VirtAddr(RODATA), end)
    text = (AddressRange(VirtAddr(BASE), VirtAddr(RODATA)),)
    return KernelImage(VirtAddr(BASE), end, text, () if writable else (window,), (window,) if writable else ())


def read(memory: Any, contents: dict[str, bytes], order: tuple[str, ...], *, writable: bool = False) -> SymbolTable:
    # Something of each kind that might be mistaken for the table stands before it.
    before = aligned(bytes(0x2000) + b"\0".join(b"%d" % digit for digit in range(10)) + b"\0" + b"text\0" * 50)
    data = before + laid_out(contents, order, RODATA + len(before)) + bytes(0x1000)
    data += bytes(-len(data) % 0x1000)
    memory.add(RODATA, data)
    return read_core_symbols(memory, image(len(data), writable=writable))


def decoded(table: SymbolTable) -> list[tuple[str, str, int]]:
    return list(zip(table.types, table.names, table.addrs, strict=True))


@LAYOUTS
def test_every_symbol_comes_back(memory: Any, order: tuple[str, ...]) -> None:
    expected, contents = made(order)
    assert decoded(read(memory, contents, order)) == expected


@LAYOUTS
@pytest.mark.parametrize("count", [2561, 2816, 2817])
def test_the_last_marker_may_stand_for_one_name_or_for_256(memory: Any, order: tuple[str, ...], count: int) -> None:
    expected, contents = made(order, count if order != NEWEST else count + 20)
    assert len(expected) == count
    assert decoded(read(memory, contents, order)) == expected


@LAYOUTS
@pytest.mark.parametrize("modulo", range(8))
def test_the_names_may_end_anywhere_before_the_next_part(memory: Any, order: tuple[str, ...], modulo: int) -> None:
    expected, _ = made(order, 2200)
    expected = [*expected, ("t", "z" * (modulo + 1), expected[-1][2])]
    assert decoded(read(memory, parts(expected, to=4 if order == NEWEST else 8), order)) == expected


@LAYOUTS
def test_names_of_128_tokens_and_more_have_a_two_byte_length(memory: Any, order: tuple[str, ...]) -> None:
    expected, contents = made(order, big=1)
    assert decoded(read(memory, contents, order)) == expected


@LAYOUTS
def test_names_between_two_markers_may_all_be_long(memory: Any, order: tuple[str, ...]) -> None:
    expected, contents = made(order, big=700)
    assert decoded(read(memory, contents, order)) == expected


def test_what_follows_the_markers_may_look_like_one_more(memory: Any) -> None:
    expected, contents = made(OLD_WITH_SEQS, 4096)  # 16 markers: no padding
    (last,) = struct.unpack_from("<I", contents["markers"], 4 * 15)
    contents = damaged(contents, "seqs", 0, struct.pack("<I", last + 3000))
    assert decoded(read(memory, contents, OLD_WITH_SEQS)) == expected


@pytest.mark.parametrize("order", [OLD, NEW], ids=["to 6.1", "from 6.4"])
def test_without_absolute_percpu_offsets_count_up_from_the_base(memory: Any, order: tuple[str, ...]) -> None:
    expected = symbols(percpu=False)
    assert decoded(read(memory, parts(expected, percpu=False), order)) == expected


@LAYOUTS
def test_table_is_found_before_the_guest_has_write_protected_it(memory: Any, order: tuple[str, ...]) -> None:
    expected, contents = made(order)
    assert decoded(read(memory, contents, order, writable=True)) == expected


@LAYOUTS
def test_memory_is_read_only_as_far_as_the_table_reaches(memory: Any, order: tuple[str, ...]) -> None:
    expected, contents = made(order)
    data = aligned(laid_out(contents, order, RODATA))
    memory.add(RODATA, data + bytes((3 << 20) - len(data)))  # the image claims more than there is
    assert decoded(read_core_symbols(memory, image(64 << 20))) == expected


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


def test_addresses_of_the_newest_layout_must_be_in_order_and_begin_with_the_image(memory: Any) -> None:
    expected, contents = made(NEWEST)
    shifted = {**contents, "addrs": struct.pack(f"<{len(expected)}Q", *(addr + 16 for _, _, addr in expected))}
    with pytest.raises(GuestStateError, match=r"no relative base of .* which are not place-relative"):
        read(memory, shifted, NEWEST)


def test_what_is_told_is_of_the_candidate_that_came_furthest(memory: Any) -> None:
    """Behind the table, of which only the relative base is wrong, are digits that belong to nothing."""
    contents = damaged(parts(symbols()), "relative_base", 0, b"\1")
    contents["decoy"] = b"text\0" * 60 + b"\0".join(b"%d" % digit for digit in range(10)) + bytes(100)
    with pytest.raises(GuestStateError, match="no relative base"):
        read(memory, contents, (*NEW, "decoy"))


def test_image_without_a_table_says_what_the_kernel_needs(memory: Any) -> None:
    memory.add(RODATA, bytes(0x4000))
    with pytest.raises(GuestStateError, match="the kernel needs CONFIG_KALLSYMS"):
        read_core_symbols(memory, image(0x4000))


def test_an_attach_does_not_import_numpy() -> None:
    """Its library starts threads, and what they are started in takes signals: gdb's Ctrl-C went there and was lost."""
    code = "import sys; import gdb_kprobe.session.attach; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_name_with_control_characters_is_shown_escaped(memory: Any) -> None:
    expected, _ = made(OLD)
    evil = ("t", "evil\x1b[2J\\", expected[-1][2])
    table = read(memory, parts([*expected, evil]), OLD)
    assert decoded(table) == [*expected, ("t", r"evil\x1b[2J\\", expected[-1][2])]


def test_a_name_of_no_tokens_is_none(memory: Any) -> None:
    """It has no letter for its type."""
    _, contents = made(OLD)
    first = contents["names"][0]
    # The tokens of the first name are names of no tokens now: all that is behind is where its markers say.
    contents = damaged(contents, "names", 0, bytes(first + 1))
    with pytest.raises(GuestStateError, match="no number of symbols before the names"):
        read(memory, contents, OLD)


def test_of_tokens_that_are_empty_no_name_is_made() -> None:
    names, types = kallsyms_table._expand(b"\1\0\2\1\0", 2, ("", "tx", *("",) * 254))
    assert (names, types) == (["", "x"], "?t")


@pytest.mark.parametrize("order", [OLD, NEW], ids=["to 6.1", "from 6.4"])
def test_an_address_beyond_the_last_one_is_none(memory: Any, order: tuple[str, ...]) -> None:
    contents = damaged(parts(symbols(percpu=False), percpu=False), "offsets", 40, struct.pack("<I", 0x7FFF_FFFF))
    with pytest.raises(GuestStateError, match="a symbol's address is beyond the last one"):
        read(memory, contents, order)


@pytest.mark.parametrize(
    "block",
    [
        b"".join(b"%d\0" % digit for digit in range(10)) + b"x\0" * 300,
        # Each 8 words are markers, and each of these may have names before it.
        struct.pack("<8I", *range(0, 8 * 1000, 1000)),
    ],
    ids=["token tables", "markers"],
)
def test_the_search_ends_whatever_looks_like_a_part(memory: Any, block: bytes) -> None:
    _, contents = made(OLD)
    junk = (block * (SIZE // len(block) + 1))[:SIZE]
    tokens = contents["token_table"] + contents["token_index"]
    data = aligned(junk + bytes(-len(junk) % 8) + tokens, 0x1000)
    memory.add(RODATA, data)
    started = time.process_time()
    with pytest.raises(GuestStateError, match="kallsyms"):
        read_core_symbols(memory, image(len(data)))
    assert time.process_time() - started < 20
