"""``kprobe until``: the guest runs for a time, or until a probe was hit so often, and is stopped then."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing.terminal import GdbTerminal
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live


SETPRIORITY = 141
"""Two system calls that nothing else in the guest makes."""
CALLS = 3000
PRIO, NEVER = "p:prio __x64_sys_getpriority", "p:never __x64_sys_setpriority"


@pytest.fixture(params=[1, 2])
def guest(request: pytest.FixtureRequest, probed: Boot) -> Any:
    return probed(GuestSpec(vcpus=request.param))


@pytest.fixture
def gdb(guest: Probed) -> Iterator[GdbTerminal]:
    """At a terminal, with two probes; the second one is of something that nobody calls."""
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        for definition in (PRIO, NEVER):
            gdb.command(f"kprobe {definition}")
        guest.touched |= {int(line.split()[0], 16) for line in gdb.command("kprobe list").splitlines()[1:]}
        yield gdb
        gdb.command("kprobe detach")


def is_running(guest: Probed) -> bool:
    return bool(guest.guest.is_running())


def hits(gdb: GdbTerminal) -> int:
    return int(re.findall(r"^HITS (\d+)", gdb.command("python print('HITS', api.get('prio').hits)"), re.M)[0])


def test_for_a_time(guest: Probed, gdb: GdbTerminal) -> None:
    started = time.monotonic()
    gdb.command("kprobe until 1.5", timeout=60)
    assert time.monotonic() - started >= 1.5
    assert not is_running(guest)


def test_until_a_probe_was_hit_so_often(guest: Probed, gdb: GdbTerminal) -> None:
    gdb.command("python from gdb_kprobe.gdbext import api")
    job = guest.guest.spawn(f"workload syscall {GETPRIORITY} -1", wait=False)
    for wanted in (1, CALLS):
        before = hits(gdb)
        said = gdb.command(f"kprobe until prio {wanted} --within 60", timeout=90)
        assert not is_running(guest)
        counted = hits(gdb) - before
        assert counted >= wanted
        assert f"prio: {counted} hit(s)." in said
    gdb.type("continue")
    guest.guest.finish(job, kill=True)
    gdb.press_ctrl_c()
    gdb.wait_prompt()


def test_hits_that_do_not_come_in_time_are_an_error_and_the_guest_is_stopped(guest: Probed, gdb: GdbTerminal) -> None:
    said = gdb.command("kprobe until never 3 --within 0.7", timeout=60)
    assert "never was hit 0 time(s), and not 3, before the guest was stopped" in said
    assert not is_running(guest)


def test_ctrl_c_ends_it(guest: Probed, gdb: GdbTerminal) -> None:
    gdb.type("kprobe until 600")
    time.sleep(1)
    assert is_running(guest)
    gdb.press_ctrl_c()
    gdb.wait_prompt()
    assert not is_running(guest)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "kprobe until: the following arguments are required"),
        ("soon", "soon is no number of seconds"),
        ("-1", "kprobe until: "),
        ("inf", "inf is no number of seconds"),
        ("prio 0", "0 is not a count: give a number from 1"),
        ("nobody 3", "there is no probe named nobody"),
        ("all 3", "there is no probe named all"),
        ("3 --within 5", "--within needs NAME and COUNT"),
    ],
)
def test_what_is_no_end_is_told_and_the_guest_stays_stopped(
    guest: Probed, gdb: GdbTerminal, arguments: str, says: str
) -> None:
    assert says in gdb.command(f"kprobe until {arguments}")
    assert not is_running(guest)


def test_a_probe_that_is_not_armed_is_told(guest: Probed, gdb: GdbTerminal) -> None:
    gdb.command("kprobe disable prio")
    assert "prio is not armed: it is never hit" in gdb.command("kprobe until prio 3")
    assert not is_running(guest)


def test_a_script_comes_back_with_the_guest_stopped(guest: Probed, gdb: GdbTerminal, tmp_path: Path) -> None:
    job = guest.guest.spawn(f"workload syscall {GETPRIORITY} {CALLS}", wait=False)
    script = tmp_path / "script.py"
    script.write_text(
        "from gdb_kprobe.gdbext import api\n"
        "prio, never = api.get('prio'), api.get('never')\n"
        f"print('SAID', api.run_until(probe=prio, hits={CALLS}, seconds=60), prio.hits)\n"
        "print('SAID', api.run_until(probe=never, seconds=0.3), never.hits)\n"
        "print('SAID', api.run_until(0.3), gdb.selected_thread().is_running())\n"
    )
    said = gdb.command(f"source {script}", timeout=120)
    assert re.findall(r"^SAID (.*?)\r?$", said, re.M) == [f"True {CALLS}", "False 0", "True False"]
    gdb.type("continue")
    assert guest.guest.finish(job)[0] == 0
    gdb.press_ctrl_c()
    gdb.wait_prompt()


def test_a_trace_ends_after_a_time(guest: Probed, gdb: GdbTerminal) -> None:
    job = guest.guest.spawn(f"workload syscall {GETPRIORITY} 5", wait=False)
    started = time.monotonic()
    said = gdb.command("kprobe trace -n 1000 --for 3", timeout=60)
    assert time.monotonic() - started >= 3
    assert not is_running(guest)
    assert said.count("prio: (") == 5
    assert "5 hit(s) in " in said
    gdb.type("continue")
    assert guest.guest.finish(job)[0] == 0
    gdb.press_ctrl_c()
    gdb.wait_prompt()


def test_over_mi_the_stop_comes(guest: Probed) -> None:
    with guest.gdb() as gdb:
        guest.add(gdb, PRIO)
        job = guest.guest.spawn(f"workload syscall {GETPRIORITY} {CALLS}", wait=False)
        gdb.console(f"kprobe until prio {CALLS}")
        assert gdb.wait_stop(60)["signal-name"] == "SIGINT"
        assert guest.hits(gdb) == {"prio": CALLS}
        gdb.cont()
        assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        gdb.console("kprobe detach")
