"""Many counters in one reading, and what changed between two."""

from __future__ import annotations

import contextlib
import struct

import pytest

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import PhysAddr, VirtAddr
from gdb_kprobe.region.counters import SIZE as COUNTER_SIZE
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import (
    Change,
    Count,
    Reading,
    Statistics,
    changes,
    fastest,
    read_counts,
    statistics,
    sum_of,
)

SIZE = 16 << 20
PHYS = PhysAddr(0x1000_0000)
VIRT = VirtAddr(0xFFFF_FFFF_FE00_0000)


class Memory:
    """The region's counters, and which pieces of them were read."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.reads: list[tuple[int, int]] = []

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        self.reads.append((addr, size))
        return b"".join(struct.pack("<Q", self.words.get(at, 0)) for at in range(addr, addr + size, 8))

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        raise AssertionError("counters are only read")

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def probe(memory: Memory, name: str, number: int | None, hits: int = 0, missed: int = 0) -> Probe:
    """A probe whose counter is the region's *number*th and says that; without one, the host counts."""
    made = Probe(parse_definition(f"p:{name} vfs_read"))
    if number is not None:
        at = COUNTER_SIZE * number
        made.counter = Counter(memory, VirtAddr(VIRT + at), PhysAddr(PHYS + at))
        memory.words |= {PHYS + at: hits, PHYS + at + 8: missed}
    return made


def test_all_counters_are_one_read_in_any_order() -> None:
    memory = Memory()
    probes = [probe(memory, "c", 9, 2**63 + 5, 7), probe(memory, "a", 3, 23), probe(memory, "b", 4, 0, 2)]
    found = read_counts(memory, probes).counts
    assert found == {"c": Count(2**63 + 5, 7), "a": Count(23, 0), "b": Count(0, 2)}
    assert memory.reads == [(PHYS + COUNTER_SIZE * 3, COUNTER_SIZE * 7)]


def test_what_the_host_has_counted_is_added() -> None:
    memory = Memory()
    mixed = probe(memory, "mixed", 0, 10, 1)
    mixed.seen, mixed.failures = 5, 2
    assert read_counts(memory, [mixed]).counts == {"mixed": Count(15, 3)}


def test_probes_that_the_host_counts_need_no_memory() -> None:
    memory = Memory()
    alone = probe(memory, "alone", None)
    alone.seen, alone.failures = 5, 2
    assert read_counts(memory, [alone]).counts == {"alone": Count(5, 2)}
    assert memory.reads == []


def test_a_rate_is_what_was_counted_in_the_seconds_between() -> None:
    before = Reading(10.0, {"a": Count(100, 1), "gone": Count(7, 7)})
    after = Reading(10.5, {"a": Count(150, 3), "new": Count(4, 0)})
    assert changes(before, after) == {
        "a": Change(Count(150, 3), 50, 2, 100.0),
        "new": Change(Count(4, 0), 4, 0, 8.0),
    }


def test_without_an_earlier_reading_there_are_only_totals() -> None:
    assert changes(None, Reading(1.0, {"a": Count(5, 2)})) == {"a": Change(Count(5, 2), 0, 0, 0.0)}


FOUND = {
    "b": Change(Count(5, 0)),
    "total": Change(Count(900, 1), 1, 1, 2.0),
    "fast": Change(Count(70, 2), 60, 0, 120.0),
    "a": Change(Count(5, 0)),
    "hit": Change(Count(6, 0)),
}


def test_the_fastest_come_first_then_the_most_frequent_then_by_name() -> None:
    assert fastest(FOUND, None) == ["fast", "total", "hit", "a", "b"]
    assert fastest(FOUND, 2) == ["fast", "total"]
    assert fastest(FOUND, 9) == fastest(FOUND, None)


def test_the_sum_is_of_all_that_is_counted() -> None:
    assert sum_of(FOUND.values()) == Change(Count(986, 3), 61, 1, 122.0)
    assert sum_of([]) == Change(Count(0, 0))


def test_no_time_between_two_readings_is_no_rate() -> None:
    reading = Reading(10.0, {"a": Count(100, 1)})
    assert changes(reading, reading) == {"a": Change(Count(100, 1), 0, 0, 0.0)}


@pytest.mark.parametrize("after", [Count(99, 1), Count(100, 0)])
def test_a_count_that_went_down_is_another_guests(after: Count) -> None:
    with pytest.raises(KprobeError, match="a had 100 hits"):
        changes(Reading(1.0, {"a": Count(100, 1)}), Reading(2.0, {"a": after}))


def test_statistics_show_the_fastest_and_sum_up_all() -> None:
    memory = Memory()
    probes = [probe(memory, name, None) for name in ("slow", "fast")]
    before = Reading(10.0, {"slow": Count(1, 0), "fast": Count(1, 0)})
    after = Reading(12.0, {"slow": Count(2, 0), "fast": Count(9, 1)})
    found = statistics(probes, before, after, 1)
    assert found == Statistics(((probes[1], Change(Count(9, 1), 8, 1, 4.0)),), 2, Change(Count(11, 1), 9, 1, 4.5), 2.0)
    assert statistics(probes, None, after, None) == Statistics(
        ((probes[1], Change(Count(9, 1))), (probes[0], Change(Count(2, 0)))), 2, Change(Count(11, 1))
    )
