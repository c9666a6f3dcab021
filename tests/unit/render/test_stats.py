"""Counts and rates of probes, as a table and as data."""

from __future__ import annotations

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.render.stats import RateView, StatsRow, StatsView, as_data, stats
from gdb_kprobe.render.views import PlaceView, ProbeView

OPEN = PlaceView(VirtAddr(0xFFFF_FFFF_8123_4560), "do_sys_openat2", 0, 0x140)
SYNC = PlaceView(VirtAddr(0xFFFF_FFFF_C000_1234), "ext4_sync_fs", 4, 0x80, "ext4")


def row(name: str, place: PlaceView | None, hits: int, rate: RateView | None = None, missed: int = 0) -> StatsRow:
    return StatsRow(ProbeView(name, place, None, hits, missed), rate)


def test_totals_have_no_rates() -> None:
    rows = (row("open", OPEN, 2300, missed=1), row("sync", SYNC, 7), row("later", None, 0))
    assert stats(StatsView(rows, 3, 2307, 1)).splitlines() == [
        "hits  missed  probe       symbol                   flags",
        "2300       1  open        do_sys_openat2+0x0",
        "   7       0  sync        ext4_sync_fs+0x4 [ext4]",
        "   0       0  later                                [PENDING]",
        "2307       1  total of 3",
    ]


def test_with_an_interval_there_are_rates_and_its_length() -> None:
    rows = (row("sync", SYNC, 70, RateView(60, 0, 120.0)), row("open", OPEN, 2300, RateView(1, 0, 2.0)))
    assert stats(StatsView(rows, 2, 2370, 0, RateView(61, 0, 122.0), 0.5)).splitlines() == [
        "over 500 ms:",
        "hits/s  hits  missed  probe       symbol",
        " 120.0    70       0  sync        ext4_sync_fs+0x4 [ext4]",
        "   2.0  2300       0  open        do_sys_openat2+0x0",
        " 122.0  2370       0  total of 2",
    ]


def test_it_is_told_how_many_are_left_out() -> None:
    lines = stats(StatsView((row("c", OPEN, 300), row("b", OPEN, 20)), 3, 321, 0)).splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["c", "b"]
    assert lines[3].split() == ["321", "0", "total", "of", "3,", "2", "shown"]
    assert len(lines) == 4


def test_a_place_without_a_symbol_is_its_address() -> None:
    assert "0xffffffff81234560" in stats(StatsView((row("a", PlaceView(OPEN.addr), 1),), 1, 1, 0))


def test_data_is_what_the_table_shows() -> None:
    rows = (row("sync", SYNC, 70, RateView(60, 0, 120.0)), row("open", OPEN, 2300, RateView(1, 2, 2.04), missed=3))
    assert as_data(StatsView(rows, 7, 2400, 3, RateView(61, 2, 122.04), 0.4999999)) == {
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
    assert as_data(StatsView((row("open", OPEN, 5),), 1, 5, 0)) == {
        "probes": [{"name": "open", "place": "do_sys_openat2+0x0", "flags": "", "hits": 5, "missed": 0}],
        "total": {"probes": 1, "hits": 5, "missed": 0},
    }
