"""A search for the references to a place says what decoding all text says."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.linux.branch_targets import find_references
from gdb_kprobe.linux.reference_search import OpaqueRun, ReferenceSearch, Run
from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, VirtAddr

CORE, MODULE = VirtAddr(0xFFFF_FFFF_8100_0000), VirtAddr(0xFFFF_FFFF_C000_0000)
THUNKS = AddressRange(VirtAddr(CORE + 0x40), VirtAddr(CORE + 0x60))
EMPTY = TextTables(*[array("Q")] * 7)
FIELD = {
    "call": "e8",
    "jmp": "e9",
    "jcc": "0f85",
    "lea": "488d05",
    "mov": "48c7c0",
    "push": "68",
    "movabs": "48b8",
    "jmp8": "eb",
    "jcc8": "73",
    "no reference": "b8",
    "indirect": "ffe0",
    "nothing": "06",
}


def encoded(kind: str, addr: int, target: int) -> bytes:
    """One instruction at *addr* that refers to *target* as well as its *kind* can."""
    opcode = bytes.fromhex(FIELD[kind])
    size = {"jmp8": 1, "jcc8": 1, "movabs": 8, "indirect": 0, "nothing": 0}.get(kind, 4)
    value = target if kind in ("mov", "push", "movabs", "no reference") else target - (addr + len(opcode) + size)
    return opcode + (value % (1 << 8 * size)).to_bytes(size, "little")


@st.composite
def texts(draw: st.DrawFn) -> tuple[tuple[tuple[VirtAddr, bytes], ...], list[int]]:
    """Two runs of text that refer to themselves and to each other, with bytes that are none; and where symbols are."""
    targets = st.builds(int.__add__, st.sampled_from([CORE, MODULE]), st.integers(-0x20, 0x120))
    pieces = st.one_of(st.tuples(st.sampled_from(sorted(FIELD)), targets), st.binary(min_size=1, max_size=4))
    windows, starts = [], []
    for start in (CORE, MODULE):
        code = b""
        for piece in draw(st.lists(pieces, max_size=30)):
            if draw(st.booleans()):
                starts.append(start + len(code) + draw(st.integers(0, 2)))
            code += piece if isinstance(piece, bytes) else encoded(piece[0], start + len(code), piece[1])
        windows.append((start, code))
    return tuple(windows), sorted({*starts, CORE, MODULE})


@given(texts(), st.booleans(), st.lists(st.integers(0, 0x100)))
def test_a_search_says_what_decoding_all_text_says(
    text: tuple[tuple[tuple[VirtAddr, bytes], ...], list[int]], jump_tables: bool, fixups: list[int]
) -> None:
    windows, starts = text
    tables = replace(EMPTY, ex_fixups=array("Q", [CORE + at for at in fixups]))
    expected = find_references(windows, starts, tables, thunks=THUNKS, jump_tables=jump_tables)
    runs = [Run(start, code, starts, THUNKS) for start, code in windows]
    search = ReferenceSearch(runs, tables, jump_tables=jump_tables)
    for start, code in windows:
        for at in range(start, start + len(code)):
            for end in range(at + 1, min(at + 6, start + len(code) + 1)):
                where = hex(at), end - at
                assert search.is_target(at, end) == expected.is_target(at, end), where
                assert search.is_taken(at, end) == expected.is_taken(at, end), where
                assert search.has_indirect_jump(at, end) == expected.has_indirect_jump(at, end), where
                function = AddressRange(VirtAddr(at), VirtAddr(end))
                assert search.is_unresolved(function) == expected.is_unresolved(function), where


@given(texts())
def test_of_text_that_cannot_be_decoded_no_reference_is_missed(
    text: tuple[tuple[tuple[VirtAddr, bytes], ...], list[int]],
) -> None:
    windows, starts = text
    expected = find_references(windows, starts, EMPTY, thunks=THUNKS)
    (start, code), opaque = windows
    search = ReferenceSearch([Run(start, code, starts, THUNKS)], EMPTY, opaque=[OpaqueRun(*opaque)])
    for at in range(start, start + len(code)):
        for end in range(at + 1, min(at + 6, start + len(code) + 1)):
            assert search.is_target(at, end) or not expected.is_target(at, end), (hex(at), end - at)
            assert search.is_taken(at, end) or not expected.is_taken(at, end), (hex(at), end - at)


@pytest.mark.parametrize("kind", ["call", "jmp", "jcc", "lea", "mov", "push", "movabs"])
@pytest.mark.parametrize("distance", [1 << 18, (1 << 18) + 3, (1 << 19) - 2])
def test_it_is_found_from_afar_and_across_what_is_looked_at_together(kind: str, distance: int) -> None:
    reference = encoded(kind, CORE + distance, CORE + 1)
    run = Run(CORE, bytes(distance) + reference, [CORE, CORE + distance], None)
    search = ReferenceSearch([run], EMPTY)
    assert [at for at in range(CORE, CORE + 8) if search.is_target(at, at + 1)] == [CORE + 1]


@pytest.mark.parametrize(("at", "target"), [(0, 129), (126, 0)])
def test_a_short_branch_is_found_at_its_farthest(at: int, target: int) -> None:
    code = bytearray(b"\x90" * 0x100)
    code[at : at + 2] = encoded("jmp8", CORE + at, CORE + target)
    search = ReferenceSearch([Run(CORE, bytes(code), range(CORE, CORE + 0x100, 2), None)], EMPTY)
    assert [place - CORE for place in range(CORE, CORE + 0x100) if search.is_target(place, place + 1)] == [target]
