"""The pipe between gdb and its watchdog, with a real pipe and a real process; no guest."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gdb_kprobe.watchdog.handle import Watchdog
from gdb_kprobe.watchdog.process import last_state, see_to
from gdb_kprobe.watchdog.states import State


@pytest.mark.parametrize(
    ("said", "last"),
    [
        (b"", State.DONE),
        (b"s", State.STOPPED),
        (b"sw", State.WATCHED),
        (b"swsr", State.RUNNING),
        (b"swd", State.DONE),
        (b"s" * 10_000 + b"w", State.WATCHED),
    ],
)
def test_what_was_said_last_counts(said: bytes, last: State) -> None:
    read, write = os.pipe()
    os.write(write, said)
    os.close(write)
    assert last_state(read) is last
    os.close(read)


def test_done_ends_it_though_the_pipe_is_open() -> None:
    read, write = os.pipe()
    os.write(write, b"wd")
    assert last_state(read) is State.DONE
    os.close(read)
    os.close(write)


def test_it_ends_when_it_is_sent_home(tmp_path: Path) -> None:
    watchdog = Watchdog(str(tmp_path / "nobody"))
    pid = watchdog.pid
    assert pid is not None
    assert os.getsid(pid) == pid, "neither a Ctrl-C nor the end of the terminal is for it"
    watchdog.tell(State.WATCHED)
    watchdog.end()
    assert watchdog.pid is None
    assert not Path(f"/proc/{pid}").exists()
    watchdog.tell(State.WATCHED)
    watchdog.end()


def test_gdb_goes_on_when_the_watchdog_is_killed(tmp_path: Path) -> None:
    watchdog = Watchdog(str(tmp_path / "nobody"))
    assert watchdog.pid is not None
    os.kill(watchdog.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{watchdog.pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
    assert watchdog.problem == ""
    watchdog.tell(State.WATCHED)
    watchdog.tell(State.STOPPED)
    assert watchdog.problem.startswith("the watchdog has ended; ")
    watchdog.end()


def test_one_that_hangs_does_not_hold_gdb(tmp_path: Path) -> None:
    watchdog = Watchdog(str(tmp_path / "nobody"))
    pid = watchdog.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    watchdog.end()
    assert time.monotonic() - started < 10
    assert not Path(f"/proc/{pid}").exists()


def test_files_of_the_current_directory_are_not_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    for name in ("struct", "capstone", "socket", "gdb_kprobe"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    watchdog = Watchdog(str(tmp_path / "nobody"))
    watchdog.tell(State.RUNNING)
    watchdog.end()
    assert watchdog.problem == ""
    assert not marker.exists()


def test_one_that_cannot_be_started_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdb_kprobe.watchdog.handle.find_interpreter", lambda: str(tmp_path / "python"))
    watchdog = Watchdog("nobody")
    assert watchdog.problem.startswith("the watchdog cannot be started: ")
    watchdog.tell(State.WATCHED)
    watchdog.end()


def test_there_may_be_none() -> None:
    watchdog = Watchdog(None)
    assert watchdog.pid is None
    watchdog.tell(State.WATCHED)
    watchdog.end()


def test_a_stub_that_serves_another_is_left_alone(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdb_kprobe.watchdog.process._PATIENCE", 0.1)
    assert see_to(served) == ""
