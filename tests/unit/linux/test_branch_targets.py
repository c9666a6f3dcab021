"""References of small pieces of text."""

from __future__ import annotations

from array import array

import pytest

from gdb_kprobe.linux.branch_targets import SortedAddresses, find_references
from gdb_kprobe.linux.text_tables import TextTables
from gdb_kprobe.model import AddressRange, VirtAddr

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
EMPTY = TextTables(*[array("Q")] * 7)


@pytest.mark.parametrize(
    ("code", "targets", "taken", "indirect"),
    [
        ("7403 90", [5], [], []),
        ("74fe", [0], [], []),  # one byte, signed
        ("0f8402000000", [8], [], []),
        ("e3f0", [-14], [], []),
        ("2ee801000000", [7], [], []),  # a prefix
        ("e9fbffffff", [0], [], []),
        ("55 b8740374eb c3", [], [], []),  # branches only as an immediate
        ("488d05f9ffffff", [0], [0], []),
        ("48c7c000000081", [0], [0], []),
        ("6803000081 c3", [3], [3], []),
        ("48b8 0000008100000000", [], [], []),  # no address of the text
        ("ffe0", [], [], [0]),
        ("90 ff24c500000000", [], [], [1]),
        ("ffd0", [], [], []),
        ("06 7402", [5], [], []),  # behind what is no instruction, every byte may be one
    ],
)
def test_references(code: str, targets: list[int], taken: list[int], indirect: list[int]) -> None:
    raw = bytes.fromhex(code)
    found = find_references([(ADDR, raw)], [ADDR], EMPTY)
    assert list(found.targets.addrs) == [ADDR + at for at in targets]
    assert list(found.taken.addrs) == [ADDR + at for at in taken]
    assert list(found.indirect.addrs) == [ADDR + at for at in indirect]


def test_decoding_begins_anew_at_each_symbol() -> None:
    raw = bytes.fromhex("b8 7402 cccc")  # alone, the first is mov eax, imm32
    assert list(find_references([(ADDR, raw)], [ADDR], EMPTY).targets.addrs) == []
    assert list(find_references([(ADDR, raw)], [ADDR, ADDR + 1], EMPTY).targets.addrs) == [ADDR + 5]


def test_a_jump_to_a_thunk_is_an_indirect_one() -> None:
    thunks = AddressRange(VirtAddr(ADDR + 0x100), VirtAddr(ADDR + 0x200))
    raw = bytes.fromhex("e9fb000000 e8f6000000")  # a call comes back
    found = find_references([(ADDR, raw)], [ADDR], EMPTY, thunks=thunks)
    assert list(found.indirect.addrs) == [ADDR]


def test_ranges_of_sorted_addresses() -> None:
    found = SortedAddresses([7, 3, 7])
    assert len(found) == 2
    assert [found.any_in(*bounds) for bounds in ((3, 4), (4, 7), (4, 8), (0, 3), (8, 99))] == [
        True,
        False,
        True,
        False,
        False,
    ]
