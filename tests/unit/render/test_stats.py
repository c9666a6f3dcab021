"""Counts and rates of probes, as a table and as data."""

from __future__ import annotations

from gdb_kprobe.guest.guest import Place
from gdb_kprobe.language.spec import Location, ProbeSpec
from gdb_kprobe.model import Symbol, VirtAddr, offset
from gdb_kprobe.render.stats import as_data, stats
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import Change, Count, Statistics

START = VirtAddr(0xFFFF_FFFF_8123_4560)
OPEN = Place(START, START, offset(START, 0x140), Symbol("do_sys_openat2", START, "T"))
_EXT4 = VirtAddr(0xFFFF_FFFF_C000_1230)
SYNC = Place(offset(_EXT4, 4), _EXT4, offset(_EXT4, 0x80), Symbol("ext4_sync_fs", _EXT4, "t", "ext4"))


def row(name: str, place: Place | None, hits: int, missed: int = 0, new: Change | None = None) -> tuple[Probe, Change]:
    change = Change(Count(hits, missed)) if new is None else Change(Count(hits, missed), new.hits, new.missed, new.rate)
    return Probe(ProbeSpec(name, Location(name)), place=place), change


def new(hits: int, missed: int, rate: float) -> Change:
    return Change(Count(0, 0), hits, missed, rate)


def test_totals_have_no_rates() -> None:
    rows = (row("open", OPEN, 2300, missed=1), row("sync", SYNC, 7), row("later", None, 0))
    assert stats(Statistics(rows, 3, Change(Count(2307, 1)))).splitlines() == [
        "hits  missed  probe       symbol                   flags",
        "2300       1  open        do_sys_openat2+0x0",
        "   7       0  sync        ext4_sync_fs+0x4 [ext4]",
        "   0       0  later                                [PENDING]",
        "2307       1  total of 3",
    ]


def test_with_an_interval_there_are_rates_and_its_length() -> None:
    rows = (row("sync", SYNC, 70, new=new(60, 0, 120.0)), row("open", OPEN, 2300, new=new(1, 0, 2.0)))
    assert stats(Statistics(rows, 2, Change(Count(2370, 0), 61, 0, 122.0), 0.5)).splitlines() == [
        "over 500 ms:",
        "hits/s  hits  missed  probe       symbol",
        " 120.0    70       0  sync        ext4_sync_fs+0x4 [ext4]",
        "   2.0  2300       0  open        do_sys_openat2+0x0",
        " 122.0  2370       0  total of 2",
    ]


def test_it_is_told_how_many_are_left_out() -> None:
    lines = stats(Statistics((row("c", OPEN, 300), row("b", OPEN, 20)), 3, Change(Count(321, 0)))).splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["c", "b"]
    assert lines[3].split() == ["321", "0", "total", "of", "3,", "2", "shown"]
    assert len(lines) == 4


def test_a_place_without_a_symbol_is_its_address() -> None:
    place = Place(START, START, START, None)
    assert "0xffffffff81234560" in stats(Statistics((row("a", place, 1),), 1, Change(Count(1, 0))))


def test_data_is_what_the_table_shows() -> None:
    rows = (row("sync", SYNC, 70, new=new(60, 0, 120.0)), row("open", OPEN, 2300, 3, new(1, 2, 2.04)))
    assert as_data(Statistics(rows, 7, Change(Count(2400, 3), 61, 2, 122.04), 0.4999999)) == {
        "seconds": 0.5,
        "probes": [
            {
                "name": "sync", "place": "ext4_sync_fs+0x4 [ext4]", "flags": "", "hits": 70, "missed": 0,
                "new_hits": 60, "new_missed": 0, "rate": 120.0,
            },
            {
                "name": "open", "place": "do_sys_openat2+0x0", "flags": "", "hits": 2300, "missed": 3,
                "new_hits": 1, "new_missed": 2, "rate": 2.0,
            },
        ],
        "total": {"probes": 7, "hits": 2400, "missed": 3, "new_hits": 61, "new_missed": 2, "rate": 122.0},
    }  # fmt: skip


def test_data_without_an_interval_has_no_rates() -> None:
    assert as_data(Statistics((row("open", OPEN, 5),), 1, Change(Count(5, 0)))) == {
        "probes": [{"name": "open", "place": "do_sys_openat2+0x0", "flags": "", "hits": 5, "missed": 0}],
        "total": {"probes": 1, "hits": 5, "missed": 0},
    }
