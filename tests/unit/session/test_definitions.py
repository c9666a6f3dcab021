"""The probes' definitions in the region: what is written is read again, whatever came between."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest

from gdb_kprobe.errors import RegionError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import PhysAddr, Rung, VirtAddr
from gdb_kprobe.session.counters import Counters
from gdb_kprobe.session.definitions import Definitions, adopt, forget_definitions, read_definitions, text_of
from gdb_kprobe.session.header import Header, Identity
from gdb_kprobe.session.probes import Probe

SIZE = 2 << 20
PHYS = PhysAddr(0x1000_0000)


@dataclass
class Memory:
    """The region's memory, which held something else before."""

    data: bytearray = field(default_factory=lambda: bytearray(b"\x5a" * SIZE))

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        assert PHYS <= addr <= addr + size <= PHYS + SIZE
        return bytes(self.data[addr - PHYS : addr - PHYS + size])

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        assert PHYS <= addr <= addr + len(data) <= PHYS + SIZE
        self.data[addr - PHYS : addr - PHYS + len(data)] = data

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Region:
    def __init__(self) -> None:
        identity = Identity(b"\1" * 20, VirtAddr(0), VirtAddr(0), PhysAddr(0), 0)
        self.memory = Memory()
        self.header = Header(SIZE, VirtAddr(0xFFFF_FFFF_C000_0000), PHYS, identity, bytes(16), VirtAddr(0))
        self.counters = Counters(self.memory, self.header)
        self.definitions = Definitions(self.memory, self.header)

    def probe(self, text: str, strategy: Rung | None = None) -> Probe:
        probe = Probe(parse_definition(text), strategy=strategy)
        probe.counter = self.counters.allocate()
        return probe

    def texts(self) -> list[str]:
        return [definition.text for definition in read_definitions(self.memory, self.header)]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("p vfs_read", "p vfs_read"),
        ("p:p_vfs_read_0 vfs_read", "p vfs_read"),
        ("p ext4:ext4_sync_fs+16", "p ext4:ext4_sync_fs+16"),
        ("p 0xffffffff81000010", "p 0xffffffff81000010"),
        ("p:open do_sys_openat2", "p:kprobes/open do_sys_openat2"),
        ("p vfs_read dfd=%di:s32 if dfd == -100", "p:kprobes/p_vfs_read_0 vfs_read dfd=%di:s32 if dfd == -100"),
    ],
)
def test_the_text_means_the_same(typed: str, kept: str) -> None:
    spec = parse_definition(typed)
    assert text_of(spec) == kept
    again = parse_definition(kept)
    assert (again.name, again.group, again.location, again.args) == (spec.name, spec.group, spec.location, spec.args)
    assert str(again.condition and again.condition.text) == str(spec.condition and spec.condition.text)


def test_memory_that_held_something_else_has_no_definitions() -> None:
    assert Region().texts() == []


def test_counts_rung_and_whether_it_is_enabled_come_back() -> None:
    region = Region()
    first, second = region.probe("p:a vfs_read", Rung.BOOSTED), region.probe("p:b vfs_write")
    for probe in (first, second):
        region.definitions.add(probe)
    first.count(hits=7, missed=2)
    assert second.counter is not None
    second.counter.enable(False)
    one, two = read_definitions(region.memory, region.header)
    assert (one.strategy, one.hits, one.missed, one.enabled, one.had_handler) == (Rung.BOOSTED, 7, 2, True, False)
    assert (two.strategy, two.hits, two.missed, two.enabled) == (None, 0, 0, False)
    carried = adopt(one, parse_definition(one.text), None)
    assert (carried.name, carried.hits, carried.missed, carried.enabled) == ("a", 7, 2, True)
    went_on = adopt(one, parse_definition(one.text), region.counters.at(one.counter))
    first.count(hits=1)  # somebody who was on the way to the old counter
    assert (carried.hits, went_on.hits) == (7, 8)


def test_a_handler_in_python_is_noted() -> None:
    region = Region()
    probe = region.probe("p vfs_read")
    probe.pre = lambda hit: None
    region.definitions.add(probe)
    assert [definition.had_handler for definition in read_definitions(region.memory, region.header)] == [True]


def test_counters_that_are_kept_are_not_given_out() -> None:
    region = Region()
    old = [region.counters.allocate().addr for _ in range(3)]
    fresh = Counters(region.memory, region.header)
    fresh.keep(old)
    assert fresh.allocate().addr not in old


def test_deleted_ones_are_gone_and_make_room() -> None:
    region = Region()
    probe = region.probe("p:kept vfs_read")
    region.definitions.add(probe)
    other = region.probe("p:other vfs_write")
    for _ in range(2 * region.header.definitions.size // 32):
        region.definitions.add(other)
        region.definitions.remove(other)
    assert region.texts() == ["p:kprobes/kept vfs_read"]
    region.definitions.remove(probe)
    region.definitions.remove(probe)
    assert region.texts() == []


def test_a_full_region_says_so_and_keeps_what_it_has() -> None:
    region = Region()
    counter = region.counters.allocate()
    probes = [Probe(parse_definition(f"p:n{number} vfs_read"), counter=counter) for number in range(10_000)]
    added = 0

    def add_all() -> None:
        nonlocal added
        for probe in probes:
            region.definitions.add(probe)
            added += 1

    with pytest.raises(RegionError, match="no room for the definition"):
        add_all()
    texts = region.texts()
    assert len(texts) == added > 1000
    assert texts[-1] == f"p:kprobes/n{added - 1} vfs_read"


def test_forgotten_ones_are_gone() -> None:
    region = Region()
    region.definitions.add(region.probe("p vfs_read"))
    forget_definitions(region.memory, region.header)
    assert region.texts() == []


@pytest.mark.parametrize(("at", "byte"), [(3, 9), (7, 0xFF), (12, 0xE9)], ids=["rung", "counter", "text"])
def test_an_entry_that_was_written_over_is_left_out(at: int, byte: int) -> None:
    region = Region()
    for name in ("a", "b"):
        region.definitions.add(region.probe(f"p:{name} vfs_read"))
    start = region.header.definitions.start - region.header.virt
    region.memory.data[start + at] = byte
    assert region.texts() == ["p:kprobes/b vfs_read"]
