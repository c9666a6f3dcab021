"""Find and decode the kernel's own compressed symbol table, ``kernel/kallsyms.c``, in guest memory.

The table has no symbols of its own before Linux 6.4, so it is found by its contents. In memory order:

========================  ========================================================================
up to 6.3                 since 6.4 (kernel commit 404bad70fcf7 "scripts/kallsyms: change the output order")
========================  ========================================================================
offsets                   num_syms
relative_base             names
num_syms                  markers
names                     token_table
markers                   token_index
seqs_of_names (6.2, 6.3)  offsets
token_table               relative_base
token_index               seqs_of_names
========================  ========================================================================

Each part begins at a multiple of 8. ``token_table`` is the only place with the ten digits as strings of their own, one
after the other; every other part is found from there, and each step is proved by another part: the token index by the
lengths of the tokens, the names by the markers, the addresses by the image's base.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.image import KernelImage
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.target.protocols import Memory

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_NAMES_PER_MARKER = 256
_CHUNK = 1 << 20
_LONGEST_TOKEN_TABLE = 1 << 14
_LONGEST_NAMES_AFTER_LAST_MARKER = 1 << 17
_SMALLEST_MARKER_STEP = 512
_LARGEST_MARKER_STEP = 1 << 14
_FEWEST_MARKERS = 8
"""A kernel has thousands of symbols; a table with less than 8 * 256 of them is none."""


@dataclass(frozen=True, slots=True)
class SymbolTable:
    """Parallel sequences, in the order of ``/proc/kallsyms``. *types* has one letter for each symbol.

    *module* is empty for the core kernel, and *ranges* are then the image; for a module they are its memory.
    """

    names: list[str]
    types: str
    addrs: array[int]
    ranges: tuple[AddressRange, ...]
    module: str = ""


class _Run:
    """One mapped run, read from its start as far as it is looked at."""

    def __init__(self, memory: Memory, window: AddressRange) -> None:
        self.memory = memory
        self.window = window
        self.data = bytearray()

    def read_to(self, end: int) -> bool:
        """Have the bytes up to offset *end*; False when the run is shorter."""
        missing = min(end, self.window.size) - len(self.data)
        if missing > 0:
            start = VirtAddr(self.window.start + len(self.data))
            self.data += self.memory.read(start, min(max(missing, _CHUNK), self.window.size - len(self.data)))
        return len(self.data) >= end

    def find_all(self, needle: bytes) -> Iterator[int]:
        """Yield the offset of each place where *needle* is."""
        at = 0
        while True:
            found = self.data.find(needle, at)
            if found >= 0:
                yield found
                at = found + 1
            elif len(self.data) < self.window.size:
                at = max(at, len(self.data) - len(needle) + 1)
                self.read_to(len(self.data) + 1)
            else:
                return

    def quad(self, at: int) -> int | None:
        """Return the 8 bytes at offset *at*, or None outside the run."""
        if at < 0 or not self.read_to(at + 8):
            return None
        return int(struct.unpack_from("<Q", self.data, at)[0])


def read_core_symbols(memory: Memory, image: KernelImage) -> SymbolTable:
    """Decode the symbol table of the core kernel.

    :raises GuestStateError: there is no such table, or a part of it is not as the format says; nothing is guessed.
    """
    # The table is constant data. Before the guest has write-protected that, it is wherever the image is.
    failure = "the digits of its token table are nowhere in the image"
    for window in (*image.rodata, *image.data):
        run = _Run(memory, window)
        for digits in run.find_all(_DIGITS):
            try:
                return _decode(run, digits, image)
            except _NotThisOneError as error:
                failure = str(error)
    raise GuestStateError(
        f"the kernel's symbol table (kallsyms) was not found in {image.base:#x}-{image.end:#x}: {failure}",
        "the kernel needs CONFIG_KALLSYMS; if it has it, it is of a version with an unknown layout",
    )


class _NotThisOneError(Exception):
    """The digits found do not belong to a symbol table, and why."""


def _decode(run: _Run, digits: int, image: KernelImage) -> SymbolTable:
    tokens, token_table, token_index = _find_tokens(run, digits)
    markers, marker_offsets = _find_markers(run.data, token_table)
    names, count = _find_names(run.data, markers, marker_offsets)
    joined = _expand(run.data, names, count, tokens)
    addrs = _find_addrs(run, image, after_index=token_index + 512, before_names=names - 8, count=count)
    return SymbolTable(
        names=[name[1:] for name in joined],
        types="".join([name[0] for name in joined]),
        addrs=addrs,
        ranges=(AddressRange(image.base, image.end),),
    )


def _find_tokens(run: _Run, digits: int) -> tuple[list[str], int, int]:
    """Return the 256 tokens and the offsets of the table and of its index, given where token ``"0"`` is."""
    # Where token 0 begins cannot be seen (what comes before it need not end in a zero byte), where token 1 does can.
    second = digits
    for _ in range(ord("0") - 1):
        second = run.data.rfind(b"\0", 0, second - 1) + 1
        if second <= 1:
            raise _NotThisOneError("no 48 strings before the digits")
    run.read_to(second + _LONGEST_TOKEN_TABLE)
    tokens = bytes(run.data[second : second + _LONGEST_TOKEN_TABLE]).split(b"\0", 255)
    if len(tokens) < 256:
        raise _NotThisOneError("no 256 strings around the digits")
    del tokens[255:]
    end = second + sum(len(token) + 1 for token in tokens)
    index_at = end + 7 & ~7
    if not run.read_to(index_at + 512):
        raise _NotThisOneError("the token index is not in the same run of pages as the token table")
    index = struct.unpack_from("<256H", run.data, index_at)
    start = second - index[1]
    expected = second - start
    for offset, token in zip(index[1:], tokens, strict=True):
        if offset != expected:
            raise _NotThisOneError("the token index does not fit the token table")
        expected += len(token) + 1
    if index[0] or start < 0:
        raise _NotThisOneError("the token index does not begin with the first token")
    tokens.insert(0, bytes(run.data[start : second - 1]))
    return [token.decode("latin-1") for token in tokens], start, index_at


def _find_markers(data: bytearray, token_table: int) -> tuple[int, array[int]]:
    """Return the offset of the markers before *token_table*, and their values: every 256th name's offset."""
    zero = token_table
    while True:
        zero = data.rfind(b"\0\0\0\0", 0, zero + 3)
        if zero < 0:
            raise _NotThisOneError("no markers before the token table")
        start = zero & ~7
        # Zeros of padding may come before the zero that is the first marker.
        for at in (start + 8, start):
            markers = _markers_at(data, at, token_table)
            if len(markers) >= _FEWEST_MARKERS:
                return at, markers


def _markers_at(data: bytearray, at: int, end: int) -> array[int]:
    markers = array("I", [0])
    if at + 8 > end or data[at : at + 4] != b"\0\0\0\0":
        return markers
    for (value,) in struct.iter_unpack("<I", data[at + 4 : at + 4 + (end - at - 4 & ~3)]):
        if not _SMALLEST_MARKER_STEP <= value - markers[-1] <= _LARGEST_MARKER_STEP:
            break
        markers.append(value)
    return markers


def _find_names(data: bytearray, markers: int, offsets: array[int]) -> tuple[int, int]:
    """Return the offset of the first name and the number of names."""
    most = len(offsets) * _NAMES_PER_MARKER
    top = markers - offsets[-1] - 8
    for at in range(top & ~7, max(-1, top - _LONGEST_NAMES_AFTER_LAST_MARKER), -8):
        (count,) = struct.unpack_from("<Q", data, at)
        if most - _NAMES_PER_MARKER < count <= most and _names_fit(data, at + 8, count, markers, offsets):
            return at + 8, count
    raise _NotThisOneError("no number of symbols before the names")


def _names_fit(data: bytearray, names: int, count: int, end: int, offsets: array[int]) -> bool:
    """Walk all names: each 256th must be where its marker says, and the last must end where the markers begin."""
    at = names
    for index in range(count):
        if not index % _NAMES_PER_MARKER and at - names != offsets[index // _NAMES_PER_MARKER]:
            return False
        size = data[at]
        if size & 0x80:
            # "Big" symbols: kernel commit 73bbb94466fd "kallsyms: support "big" kernel symbols" (in v6.1).
            at += 1
            size = size & 0x7F | data[at] << 7
        at += 1 + size
        if at > end:
            return False
    return at + 7 & ~7 == end & ~7


def _expand(data: bytearray, names: int, count: int, tokens: list[str]) -> list[str]:
    """Return the names, each with its type letter in front."""
    joined = []
    token = tokens.__getitem__
    join = "".join
    at = names
    for _ in range(count):
        size = data[at]
        if size & 0x80:
            at += 1
            size = size & 0x7F | data[at] << 7
        at += 1
        joined.append(join(map(token, data[at : at + size])))
        at += size
    return joined


def _find_addrs(run: _Run, image: KernelImage, *, after_index: int, before_names: int, count: int) -> array[int]:
    """Return the addresses of all symbols, whichever of the two layouts this is."""
    size = 4 * count + 7 & ~7
    newer = after_index + 7 & ~7
    older = before_names - 8 - size
    for offsets, relative_base in ((newer, newer + size), (older, older + size)):
        base = run.quad(relative_base)
        if base == image.base and offsets >= 0:
            return _decode_offsets(run.data[offsets : offsets + 4 * count], base)
    raise _NotThisOneError(f"no relative base of {image.base:#x} beside the symbol offsets")


def _decode_offsets(data: bytearray, base: int) -> array[int]:
    """Turn 32-bit offsets into addresses.

    With CONFIG_KALLSYMS_ABSOLUTE_PERCPU an offset from 0 is an absolute (per-CPU) value and a negative one counts down
    from *base* - 1. A kernel without it (since v6.15) counts up from *base*, unsigned.
    """
    offsets = array("i", bytes(data))
    if min(offsets) < 0:
        top = base - 1
        return array("Q", [offset if offset >= 0 else top - offset for offset in offsets])
    return array("Q", [base + offset for offset in offsets])
