"""Which of the blocks that a guest gives become the region."""

from __future__ import annotations

import pytest

from gdb_kprobe.guest.pages import Lent, longest_run
from gdb_kprobe.model import PhysAddr


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([], []),
        ([7], [7]),
        ([7, 5, 3], [3]),
        ([4, 1, 9, 2, 8], [1, 2]),
        ([9, 1, 3, 8, 7], [7, 8, 9]),
    ],
)
def test_the_longest_run_is_found_in_whatever_order_they_come(blocks: list[int], found: list[int]) -> None:
    size = 4 << 20
    assert longest_run([PhysAddr(block * size) for block in blocks], size) == [block * size for block in found]


@pytest.mark.parametrize(
    ("size", "order", "starts"), [(2, 9, [16]), (4, 9, [16, 18]), (4, 10, [16]), (12, 10, [16, 20, 24])]
)
def test_what_is_lent_is_given_back_in_the_blocks_that_it_came_in(size: int, order: int, starts: list[int]) -> None:
    lent = Lent(PhysAddr(16 << 20), size << 20, order)
    assert lent.blocks() == [start << 20 for start in starts]
