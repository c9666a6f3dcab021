"""Find and decode the kernel's own compressed symbol table, ``kernel/kallsyms.c``, in guest memory.

The table has no symbols of its own before Linux 6.4, so it is found by its contents. In memory order:

========================  ==============================  ==========================
up to 6.3                 6.4 to 6.19                     since 7.0
========================  ==============================  ==========================
offsets                   num_syms                        num_syms
relative_base             names                           names
num_syms                  markers                         markers
names                     token_table                     token_table
markers                   token_index                     token_index
seqs_of_names (6.2, 6.3)  offsets                         offsets, place-relative
token_table               relative_base                   seqs_of_names
token_index               seqs_of_names
========================  ==============================  ==========================

The order changed with kernel commit 404bad70fcf7 "scripts/kallsyms: change the output order". Each part begins at a
multiple of 8, since 7.0 of 4; ``num_syms`` has 4 bytes, so that the names follow at once there. ``token_table`` is the
only place with the ten digits as strings of their own, one after the other; every other part is found from there, and
each step is proved by another part: the token index by the lengths of the tokens, the names by the markers, the
addresses by the image's base.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, count, pairwise

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.image import KernelImage
from gdb_kprobe.linux.strings import showable
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.system.bounds import Steps
from gdb_kprobe.target.protocols import Memory

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_NAMES_PER_MARKER = 256
_CHUNK = 1 << 20
_LONGEST_TOKEN_TABLE = 1 << 14
_LONGEST_NAME = 512 + 2
"""KSYM_NAME_LEN (include/linux/kallsyms.h), since 6.1 made for Rust's, and the two bytes of its length: no name of
tokens is longer than the name."""
_SMALLEST_MARKER_STEP = 2 * _NAMES_PER_MARKER
_LARGEST_MARKER_STEP = _LONGEST_NAME * _NAMES_PER_MARKER
_MOST_BYTES = 256 << 20
"""Of one run that are searched."""
_MOST_STEPS = 1 << 24
"""Places that are looked at for parts of the table: seconds. A kernel's takes some 100,000."""
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

    def __init__(self, memory: Memory, window: AddressRange, steps: Steps) -> None:
        self.memory = memory
        self.window = AddressRange(window.start, min(window.end, VirtAddr(window.start + _MOST_BYTES)))
        self.data = bytearray()
        self.steps = steps

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
    furthest: _NotThisOneError | None = None
    steps = Steps("the search for the kernel's symbol table (kallsyms)", _MOST_STEPS)
    for window in (*image.rodata, *image.data):
        run = _Run(memory, window, steps)
        for digits in run.find_all(_DIGITS):
            try:
                return _decode(run, digits, image)
            except _NotThisOneError as error:
                if furthest is None or error.part > furthest.part:
                    furthest = error
    failure = furthest or "the digits of its token table are nowhere in the image"
    raise GuestStateError(
        f"the kernel's symbol table (kallsyms) was not found in {image.base:#x}-{image.end:#x}: {failure}",
        "the kernel needs CONFIG_KALLSYMS; if it has it, it is of a version with an unknown layout",
    )


class _Part(IntEnum):
    """The parts of a table, in the order in which they are looked for."""

    TOKENS = 1
    INDEX = 2
    MARKERS = 3
    NAMES = 4
    ADDRESSES = 5


class _NotThisOneError(Exception):
    """The digits found do not belong to a symbol table: *part* is what was missed, all before it were found."""

    def __init__(self, part: _Part, message: str) -> None:
        super().__init__(message)
        self.part = part


def _decode(run: _Run, digits: int, image: KernelImage) -> SymbolTable:
    tokens, token_table, token_index = _find_tokens(run, digits)
    names, count = _find_names(run.data, token_table, run.steps)
    # The token table is behind the names, with the markers between the two.
    plain, types = _expand(bytes(run.data[names:token_table]), count, tuple(tokens))
    addrs = _find_addrs(run, image, _Around(names, token_index + 512), plain)
    return SymbolTable(
        names=plain,
        types=types,
        addrs=addrs,
        ranges=(AddressRange(image.base, image.end),),
    )


def _find_tokens(run: _Run, digits: int) -> tuple[list[str], int, int]:
    """Return the 256 tokens and the offsets of the table and of its index, given where token ``"0"`` is."""
    # Where token 0 begins cannot be seen (what comes before it need not end in a zero byte), where token 1 does can.
    second = digits
    run.steps.take(_LONGEST_TOKEN_TABLE)
    for _ in range(ord("0") - 1):
        second = run.data.rfind(b"\0", max(0, digits - _LONGEST_TOKEN_TABLE), second - 1) + 1
        if second <= 1:
            raise _NotThisOneError(_Part.TOKENS, "no 48 strings before the digits")
    run.read_to(second + _LONGEST_TOKEN_TABLE)
    tokens = bytes(run.data[second : second + _LONGEST_TOKEN_TABLE]).split(b"\0", 255)
    if len(tokens) < 256:
        raise _NotThisOneError(_Part.TOKENS, "no 256 strings around the digits")
    del tokens[255:]
    end = second + sum(len(token) + 1 for token in tokens)
    failures = []
    for index_at in dict.fromkeys((end + 3 & ~3, end + 7 & ~7)):
        if not run.read_to(index_at + 512):
            raise _NotThisOneError(_Part.INDEX, "the token index is not in the same run of pages as the token table")
        index = struct.unpack_from("<256H", run.data, index_at)
        if index[0] or not 0 < index[1] <= second:
            failures.append(_NotThisOneError(_Part.TOKENS, "the token index does not begin with the first token"))
        elif list(index[1:]) != list(accumulate((len(token) + 1 for token in tokens[:-1]), initial=index[1])):
            failures.append(_NotThisOneError(_Part.INDEX, "the token index does not fit the token table"))
        else:
            start = second - index[1]
            first = bytes(run.data[start : second - 1])
            return [showable(token) for token in (first, *tokens)], start, index_at
    raise max(failures, key=lambda failure: failure.part)


def _find_names(data: bytearray, token_table: int, steps: Steps) -> tuple[int, int]:
    """Return the offset of the first name and the number of names, given the offset of the token table behind them."""
    found = False
    for markers, offsets in _find_markers(data, token_table, steps):
        found = True
        # Whatever is behind the markers may look like one more.
        most = len(offsets) * _NAMES_PER_MARKER
        top = markers - offsets[-1]
        for at in range(top & ~3, max(3, top - 2 * _LARGEST_MARKER_STEP), -4):
            count = int.from_bytes(data[at - 4 : at], "little") or int.from_bytes(
                data[max(at - 8, 0) : at - 4], "little"
            )
            fewest = most - 2 * _NAMES_PER_MARKER
            if fewest < count <= most and _names_fit(data, at, count, markers, offsets, steps):
                return at, count
        steps.take(_LARGEST_MARKER_STEP // 2)
    if found:
        raise _NotThisOneError(_Part.NAMES, "no number of symbols before the names")
    raise _NotThisOneError(_Part.MARKERS, "no markers before the token table")


def _find_markers(data: bytearray, token_table: int, steps: Steps) -> Iterator[tuple[int, array[int]]]:
    """Yield what may be the markers before *token_table*, the nearest first: their offset, and their values.

    Markers are the offset of every 256th name.
    """
    at = token_table + 3
    while (at := data.rfind(b"\0\0\0\0", 0, at + 3)) >= 0:
        # The first marker is a zero of 4 bytes; zero bytes may be before it, and, of the next marker, behind it.
        at &= ~3
        for start in (at, at + 4):
            markers = _markers_at(data, start, token_table)
            steps.take(1 + len(markers))
            if len(markers) >= _FEWEST_MARKERS:
                yield start, markers


def _markers_at(data: bytearray, at: int, end: int) -> array[int]:
    """What may be markers from offset *at* on, at most to *end*."""
    markers = array("I")
    while at + 4 <= end:
        value = int.from_bytes(data[at : at + 4], "little")
        if not (_SMALLEST_MARKER_STEP <= value - markers[-1] <= _LARGEST_MARKER_STEP if markers else value == 0):
            break
        markers.append(value)
        at += 4
    return markers


def _names_fit(data: bytearray, names: int, count: int, end: int, offsets: array[int], steps: Steps) -> bool:
    """Walk all names: each 256th must be where its marker says, and the last must end where the markers begin."""
    at = names
    for index in range(count):
        if not index % _NAMES_PER_MARKER:
            steps.take(_NAMES_PER_MARKER)
            if at - names != offsets[index // _NAMES_PER_MARKER]:
                return False
        size = data[at]
        if size & 0x80:
            # "Big" symbols: kernel commit 73bbb94466fd "kallsyms: support "big" kernel symbols" (in v6.1).
            at += 1
            size = size & 0x7F | data[at] << 7
        at += 1 + size
        # An empty name has no letter for its type.
        if not size or at > end:
            return False
    return end - at < 8 and not any(data[at:end])


@functools.lru_cache(maxsize=1)
def _expand(data: bytes, count: int, tokens: tuple[str, ...]) -> tuple[list[str], str]:
    """Return the names, and their type letters.

    They are kept: a guest that is attached to again has, almost always, the kernel of the last time.
    """
    joined = []
    token = tokens.__getitem__
    join = "".join
    at = 0
    for _ in range(count):
        size = data[at]
        if size & 0x80:
            at += 1
            size = size & 0x7F | data[at] << 7
        at += 1
        joined.append(join(map(token, data[at : at + size])))
        at += size
    # Tokens may be empty, and so may what they make.
    return [name[1:] for name in joined], "".join([name[:1] or "?" for name in joined])


@dataclass(frozen=True, slots=True)
class _Around:
    """Where, in a run, the first name is and where the token index ends: the addresses are before, or behind."""

    names: int
    index_end: int


def _find_addrs(run: _Run, image: KernelImage, around: _Around, names: list[str]) -> array[int]:
    """Return the addresses of all symbols, whichever of the layouts this is."""
    count = len(names)
    size = 4 * count
    newer = around.index_end + 7 & ~7
    older = around.names - 16 - (size + 7 & ~7)
    for offsets in (newer, older):
        base = run.quad(offsets + (size + 7 & ~7))
        if base == image.base and offsets >= 0:
            return _decode_offsets(run.data[offsets : offsets + size], base)
    if run.read_to(around.index_end + size):
        place = run.window.start + around.index_end
        addrs = _decode_places(run.data[around.index_end : around.index_end + size], place)
        if _fit(addrs, names, image):
            return addrs
    raise _NotThisOneError(
        _Part.ADDRESSES, f"no relative base of {image.base:#x} beside the symbol offsets, which are not place-relative"
    )


def _decode_offsets(data: bytearray, base: int) -> array[int]:
    """Turn 32-bit offsets into addresses.

    With CONFIG_KALLSYMS_ABSOLUTE_PERCPU an offset from 0 is an absolute (per-CPU) value and a negative one counts down
    from *base* - 1. A kernel without it (since v6.15) counts up from *base*, unsigned.
    """
    offsets = array("i", bytes(data))
    if min(offsets) < 0:
        top = base - 1
        return _addrs([offset if offset >= 0 else top - offset for offset in offsets])
    return _addrs([base + offset for offset in offsets])


def _decode_places(data: bytearray, place: int) -> array[int]:
    """Turn 32-bit offsets, each from where it is itself, into addresses; the first one is at *place*.

    ``kallsyms_sym_address()`` since v7.0.
    """
    return _addrs([at + offset for at, offset in zip(count(place, 4), array("i", bytes(data)))])


def _addrs(addrs: list[int]) -> array[int]:
    try:
        return array("Q", addrs)
    except OverflowError as error:
        raise _NotThisOneError(_Part.ADDRESSES, "a symbol's address is beyond the last one") from error


def _fit(addrs: array[int], names: list[str], image: KernelImage) -> bool:
    """Whether *addrs* are in order, as kallsyms lists them, and ``_text`` is at the image's base."""
    if any(after < before for before, after in pairwise(addrs)):
        return False
    return any(name == "_text" and addr == image.base for name, addr in zip(names, addrs, strict=True))
