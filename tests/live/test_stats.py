"""``kprobe stats``: what it counts is what was called, and its rates are what was counted."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from gdb_kprobe.testing.terminal import GdbTerminal
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

SETPRIORITY = 141
PRIO = "p:prio __x64_sys_getpriority"
NICE = "p:nice __x64_sys_setpriority"


on_both_counts = pytest.mark.parametrize("vcpus", [1, 2])


def jobs(guest: Probed, calls: int, number: int = GETPRIORITY, *, wait: bool = True) -> list[int]:
    """*calls* calls on each vCPU, in the background; without *wait* for when the guest may be stopped at any moment."""
    command = f"workload syscall {number} {calls}"
    return [guest.guest.spawn(command, wait=wait) for _ in range(guest.guest.spec.vcpus)]


def finish(guest: Probed, started: list[int]) -> None:
    for job in started:
        assert guest.guest.finish(job, timeout=60)[0] == 0


def fails(gdb: GdbMi, command: str) -> str:
    with pytest.raises(GdbCommandError) as error:
        gdb.console(command)
    text = str(error.value)
    assert "Error occurred in Python" not in text
    return text


@on_both_counts
def test_totals_are_the_calls_made_the_most_frequent_first(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        guest.add(gdb, NICE)
        guest.add(gdb, PRIO)
        gdb.cont()
        finish(guest, [*jobs(guest, 2300), *jobs(guest, 23, SETPRIORITY)])
        gdb.interrupt()
        table = [line.split() for line in gdb.console("kprobe stats").splitlines()]
        assert table == [
            ["hits", "missed", "probe", "symbol"],
            [str(2300 * vcpus), "0", "prio", "__x64_sys_getpriority+0x0"],
            [str(23 * vcpus), "0", "nice", "__x64_sys_setpriority+0x0"],
            [str(2323 * vcpus), "0", "total", "of", "2"],
        ]
        top = gdb.console("kprobe stats --top 1").splitlines()
        assert [line.split()[2:] for line in top[2:]] == [["total", "of", "2,", "1", "shown"]]
        assert top[2].split()[0] == str(2323 * vcpus), "the total is that of all"
        data = json.loads(gdb.console("kprobe stats --json nice"))
        assert data["total"] == {"probes": 1, "hits": 23 * vcpus, "missed": 0}
        assert gdb.command("-kprobe-stats nice")["tables"][0]["probes"][0]["hits"] == str(23 * vcpus)
        gdb.console("kprobe detach")


@on_both_counts
def test_rates_while_the_guest_runs_are_the_differences_of_the_counts(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    calls = 3_000_000
    with guest.gdb() as gdb:
        guest.add(gdb, PRIO)
        guest.add(gdb, NICE)
        gdb.cont()
        started = jobs(guest, calls)
        deadline = time.monotonic() + 30
        while (before := int(gdb.command("-kprobe-stats prio")["tables"][0]["total"]["hits"])) < 10_000:
            assert time.monotonic() < deadline, "no hits"
        asked = time.monotonic()
        tables = gdb.command("-kprobe-stats --interval 0.2 --count 5")["tables"]
        took = time.monotonic() - asked
        assert len(tables) == 5
        assert 1.0 <= took < 10.0
        assert 0.9 < sum(float(table["seconds"]) for table in tables) <= took
        hits = before
        for position, table in enumerate(tables):
            prio, nice = table["probes"]
            assert (prio["name"], nice["name"], nice["hits"], nice["rate"]) == ("prio", "nice", "0", "0.0")
            assert prio["missed"] == prio["new_missed"] == "0"
            new = int(prio["hits"]) - hits
            assert int(prio["new_hits"]) == new if position else 0 < int(prio["new_hits"]) <= new
            hits = int(prio["hits"])
            seconds = float(table["seconds"])
            assert seconds > 0
            assert float(prio["rate"]) == pytest.approx(int(prio["new_hits"]) / seconds, rel=1e-4, abs=0.06)
            assert table["total"]["new_hits"] == prio["new_hits"]
        assert before < hits <= calls * vcpus
        finish(guest, started)
        last = json.loads(gdb.console("kprobe stats --interval 0.1 --json"))
        assert (last["total"]["hits"], last["total"]["new_hits"]) == (calls * vcpus, 0), "all, and no more of them"
        gdb.interrupt()
        assert guest.hits(gdb) == {"prio": calls * vcpus, "nice": 0}
        gdb.console("kprobe detach")


@on_both_counts
def test_ctrl_c_ends_the_waiting_and_the_guest_runs_on(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        guest.add(gdb, PRIO)
        gdb.cont()
        for command in ("kprobe stats --interval 30", "kprobe stats --interval 0.1 --count 10000"):
            waiting = gdb.start(command)
            time.sleep(1)  # it is waiting by then, or has printed the first of many tables
            gdb.signal(signal.SIGINT)
            assert "Ended; the guest runs on." in gdb.finish(waiting, timeout=5)
            assert guest.guest.is_running()
            finish(guest, jobs(guest, 100))
        gdb.interrupt()
        assert guest.hits(gdb) == {"prio": 200 * vcpus}
        gdb.console("kprobe detach")


@on_both_counts
def test_live_runs_the_guest_and_stops_it_again(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    calls = 200_000
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        gdb.command(f"kprobe {PRIO}")
        # A hit of this one stops for gdb, which must go on handling them meanwhile.
        gdb.command("python from gdb_kprobe.gdbext import api")
        gdb.command(f"python api.add('{NICE}', lambda hit: None)")
        rows = [line.split() for line in gdb.command("kprobe list").splitlines()[1:]]
        guest.touched |= {int(row[0], 16) for row in rows}
        gdb.type("kprobe stats --live --interval 0.3 --count 10 --json")
        gdb.wait_text('"seconds"')
        started = [*jobs(guest, calls, wait=False), *jobs(guest, 10, SETPRIORITY, wait=False)]
        gdb.wait_prompt(60)
        tables = [json.loads(line) for line in re.findall(r"^\{.*\}$", gdb.transcript, re.M)]
        assert len(tables) == 10
        assert tables[-1]["total"]["hits"] > 0
        assert not guest.guest.is_running()
        assert sum(table["total"]["new_hits"] for table in tables) == tables[-1]["total"]["hits"]
        gdb.type("kprobe stats --live --interval 0.1")
        gdb.wait_text("over ")
        finish(guest, started)
        gdb.wait_text("over ")
        gdb.press_ctrl_c()
        gdb.wait_prompt()
        assert not guest.guest.is_running()
        data = json.loads(gdb.command("kprobe stats --json"))
        found = {row["name"]: (row["hits"], row["missed"]) for row in data["probes"]}
        assert found == {"prio": (calls * vcpus, 0), "nice": (10 * vcpus, 0)}
        gdb.command("kprobe detach")


@on_both_counts
def test_live_over_mi_ends_with_the_stop(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    with guest.gdb() as gdb:
        guest.add(gdb, PRIO)
        gdb.console("kprobe stats --live --interval 0.2 --count 8")
        started = jobs(guest, 1000, wait=False)
        assert gdb.wait_stop()["signal-name"] == "SIGINT"
        assert "\n".join(gdb.transcript).count("over ") == 8
        gdb.cont()
        finish(guest, started)
        gdb.interrupt()
        assert guest.hits(gdb) == {"prio": 1000 * vcpus}
        assert "\n".join(gdb.transcript).count("over ") == 8, "it is over"
        gdb.console("kprobe detach")


def test_gdb_ends_right_after_the_last_table(probed: Boot) -> None:
    guest = probed(GuestSpec())
    for _ in range(5):
        with GdbTerminal(guest.environment) as gdb:
            gdb.command(f"kprobe attach {guest.profile}")
            gdb.command(f"kprobe {PRIO}")
            guest.touched.add(int(gdb.command("kprobe list").splitlines()[1].split()[0], 16))
            gdb.type("kprobe stats --live --interval 0.01 --count 20")
            gdb.type("quit")
            assert gdb.wait_exit() == 0
            assert gdb.transcript.count("over ") == 20


def test_at_the_prompt_beside_a_guest_in_the_background(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        gdb.command(f"kprobe {PRIO}")
        guest.touched.add(int(gdb.command("kprobe list").splitlines()[1].split()[0], 16))
        gdb.command("continue &")
        finish(guest, jobs(guest, 2300))
        assert gdb.command("kprobe stats").splitlines()[1].split()[:3] == ["2300", "0", "prio"]
        for _ in range(10):
            gdb.type("kprobe stats --interval 0.1 --count 10000")
            gdb.wait_text("over ")
            time.sleep(random.uniform(0.0, 0.1))
            gdb.press_ctrl_c()
            assert "Ended; the guest runs on." in gdb.wait_prompt(5)
            assert guest.guest.is_running()
        finish(guest, jobs(guest, 23))
        gdb.type("interrupt")
        gdb.wait_text("SIGINT")
        gdb.type("")
        gdb.wait_prompt()
        assert gdb.command("kprobe stats").splitlines()[1].split()[:3] == ["2323", "0", "prio"]
        gdb.command("kprobe detach")


def test_a_miss_is_shown(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        gdb.console("python from gdb_kprobe.gdbext import api")
        gdb.console(f"python api.add('{PRIO}', lambda hit: 1 / 0)")
        guest.touched.add(int(gdb.command("-kprobe-list")["probes"][0]["addr"], 16))
        gdb.cont()
        finish(guest, jobs(guest, 5))
        gdb.interrupt()
        row = gdb.console("kprobe stats").splitlines()[1].split()
        # The first hit failed, and with it the probe was disabled.
        assert row == ["1", "1", "prio", "__x64_sys_getpriority+0x0", "[DISABLED]"]
        gdb.console("kprobe detach")


def test_what_cannot_be_done_is_told(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        assert "there are no probes" in fails(gdb, "kprobe stats")
        guest.add(gdb, PRIO)
        assert "there is no probe named other" in fails(gdb, "kprobe stats other")
        assert "the guest is stopped" in fails(gdb, "kprobe stats --interval 1")
        assert "--count needs an interval" in fails(gdb, "kprobe stats --count 3")
        for wrong in ("0", "-1", "nan", "inf", "soon"):
            assert "--interval" in fails(gdb, f"kprobe stats --interval {wrong}")
        for option in ("--count", "--top"):
            for wrong in ("0", "-1", "1.5"):
                assert option in fails(gdb, f"kprobe stats --interval 1 {option} {wrong}")
        gdb.console("python from gdb_kprobe.gdbext import api")
        gdb.console(f"python api.add('{NICE}', lambda hit: None)")
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        assert "are handled by gdb" in fails(gdb, "kprobe stats --interval 1")
        assert "the guest runs already" in fails(gdb, "kprobe stats --live")
        assert "total of 2" in gdb.console("kprobe stats")
        gdb.interrupt()
        gdb.console("kprobe detach")


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_live_is_not_stopped_by_the_pager_and_redraws_at_a_terminal(
    probed: Boot, tmp_path: Path, terminal: str
) -> None:
    guest = probed(GuestSpec())
    inputrc = tmp_path / "inputrc"
    inputrc.write_text("set enable-bracketed-paste off\n")
    height, tables = 12, 6
    with GdbTerminal({**guest.environment, "TERM": terminal, "INPUTRC": str(inputrc)}) as gdb:
        gdb.command("set style enabled off")
        gdb.command(f"kprobe attach {guest.profile}")
        for offset in range(height):
            gdb.command(f"kprobe p:many_{offset} __x64_sys_getpriority")
        guest.touched |= set(
            range(address := int(gdb.command("kprobe list").splitlines()[1].split()[0], 16), address + 5)
        )
        gdb.command("set pagination on")
        gdb.command(f"set height {height}")
        begin = len(gdb.transcript)
        gdb.command(f"kprobe stats --live --interval 0.1 --count {tables}", timeout=60)
        shown = gdb.transcript[begin:]
        gdb.command("set pagination off")
        assert "--Type <RET>" not in shown
        assert shown.count("over ") == tables
        redrawn = re.findall(r"\x1b\[(\d+)A\x1b\[J", shown)
        assert len(redrawn) == (tables - 1 if terminal == "xterm" else 0)
        assert all(int(lines) < height for lines in redrawn)
        assert gdb.command("show pagination").endswith("off.")
        gdb.command("kprobe detach")
