"""The probes' definitions in the region: what is written is read again, whatever came between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import RegionError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import PhysAddr, Rung
from gdb_kprobe.region.definitions import forget_definitions, read_definitions, text_of
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.sites.probe_store import adopt
from tests.unit.region.conftest import again, plain_region


class Region:
    """A region with the definitions of some probes."""

    def __init__(self) -> None:
        self.region, self.memory = plain_region()
        self.header = self.region.header

    def probe(self, text: str, strategy: Rung | None = None) -> Probe:
        probe = Probe(parse_definition(text), strategy=strategy)
        probe.counter = self.region.counters.allocate()
        return probe

    def add(self, probe: Probe) -> None:
        assert probe.counter is not None
        self.region.definitions.add(probe.spec, probe.strategy, probe.counter.addr, has_handler=probe.needs_host)

    def texts(self) -> list[str]:
        return [definition.text for definition in read_definitions(self.memory, self.region.header)]


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
        region.add(probe)
    first.count(hits=7, missed=2)
    assert second.counter is not None
    second.counter.enable(False)
    one, two = read_definitions(region.memory, region.region.header)
    assert (one.strategy, one.hits, one.missed, one.enabled, one.had_handler) == (Rung.BOOSTED, 7, 2, True, False)
    assert (two.strategy, two.hits, two.missed, two.enabled) == (None, 0, 0, False)
    carried = adopt(one, parse_definition(one.text), None)
    assert (carried.name, carried.hits, carried.missed, carried.enabled) == ("a", 7, 2, True)
    went_on = adopt(one, parse_definition(one.text), region.region.counters.at(one.counter))
    first.count(hits=1)  # somebody who was on the way to the old counter
    assert (carried.hits, went_on.hits) == (7, 8)


def test_a_handler_in_python_is_noted() -> None:
    region = Region()
    probe = region.probe("p vfs_read")
    probe.pre = lambda hit: None
    region.add(probe)
    assert [definition.had_handler for definition in read_definitions(region.memory, region.region.header)] == [True]


def test_deleted_ones_are_gone_and_make_room() -> None:
    region = Region()
    probe = region.probe("p:kept vfs_read")
    region.add(probe)
    other = region.probe("p:other vfs_write")
    free = region.region.free
    for _ in range(10_000):
        region.add(other)
        region.region.definitions.remove(other.name)
    assert region.texts() == ["p:kprobes/kept vfs_read"]
    assert free - region.region.free < 0x4000
    region.region.definitions.remove(probe.name)
    region.region.definitions.remove(probe.name)
    assert region.texts() == []


def test_a_full_region_says_so_and_keeps_what_it_has() -> None:
    region = Region()
    counter = region.region.counters.allocate()
    specs = [parse_definition(f"p:n{number} vfs_read") for number in range(1000)]

    def add_all() -> None:
        for number in range(1 << 20):
            spec = parse_definition(f"p:n{number} vfs_read") if number >= len(specs) else specs[number]
            region.region.definitions.add(spec, None, counter.addr, has_handler=False)

    region.region.allocate(Kind.TABLE, region.region.free - 0x8000)
    with pytest.raises(RegionError, match="in a piece for definitions"):
        add_all()
    texts = region.texts()
    assert len(texts) > 500
    assert texts == [f"p:kprobes/n{number} vfs_read" for number in range(len(texts))]
    region.region.definitions.remove("n0")
    region.region.definitions.remove("n1")
    region.add(Probe(parse_definition("p:new vfs_read"), counter=counter))
    assert sorted(region.texts()) == sorted([*texts[2:], "p:kprobes/new vfs_read"]), "what is freed is room"


def test_one_that_is_longer_than_a_page_is_kept() -> None:
    region = Region()
    text = "p:long vfs_read " + " ".join(f"argument_of_a_long_name_{number}=%di" for number in range(128))
    assert 3900 < len(text) < 4096
    region.add(region.probe(text))
    [found] = read_definitions(region.memory, region.region.header)
    assert found.text == str(parse_definition(text))


def test_those_of_the_session_before_are_forgotten_when_another_goes_on() -> None:
    region = Region()
    region.add(region.probe("p vfs_read"))
    assert read_definitions(region.memory, again(region.memory).header) == ()


def test_forgotten_ones_are_gone() -> None:
    region = Region()
    region.add(region.probe("p vfs_read"))
    forget_definitions(region.memory, region.region.header)
    assert region.texts() == []


@pytest.mark.parametrize(("at", "byte"), [(3, 9), (7, 0xFF), (12, 0xE9)], ids=["rung", "counter", "text"])
def test_an_entry_that_was_written_over_is_left_out(at: int, byte: int) -> None:
    region = Region()
    for name in ("a", "b"):
        region.add(region.probe(f"p:{name} vfs_read"))
    [chunk] = (found for found in region.region.objects if found.kind == Kind.DEFINITIONS)
    region.memory.data[chunk.start + at] = byte
    assert region.texts() == ["p:kprobes/b vfs_read"]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11), st.integers(0, 40)), max_size=40))
def test_cut_off_at_any_write_all_others_are_there(acts: list[tuple[bool, int, int]]) -> None:
    """Probes come and go, with definitions of all lengths; after each write memory alone is asked."""
    region = Region()
    counter = region.region.counters.allocate()
    there: dict[str, str] = {}
    changing = ""
    memory = region.memory
    plain = memory.write_physical

    def write(addr: PhysAddr, data: bytes) -> None:
        plain(addr, data)
        assert set(there.values()) - {changing} <= set(region.texts()) <= set(there.values()) | {changing}

    memory.write_physical = write  # type: ignore[method-assign]  # each write is a moment to look at
    for is_new, number, length in acts:
        name = f"n{number}"
        if is_new and name not in there:
            spec = parse_definition(f"p:{name} vfs_read " + " ".join(f"a{index}=%di" for index in range(length)))
            changing = text_of(spec)
            region.region.definitions.add(spec, None, counter.addr, has_handler=False)
            there[name] = changing
        elif name in there:
            changing = there[name]
            region.region.definitions.remove(name)
            del there[name]
    assert sorted(region.texts()) == sorted(there.values())
