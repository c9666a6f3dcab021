"""Processes at the other end of a connection, and whether they are still there."""

from __future__ import annotations

import os
import subprocess
import time

from gdb_kprobe.target.socket_peer import have_ended


def test_a_process_that_ends_has_a_moment_to_do_so() -> None:
    with subprocess.Popen(["sleep", "0.2"]) as ending:
        assert not have_ended((ending.pid,), 0.01)
        assert have_ended((ending.pid,), 10)


def test_of_several_all_must_have_ended_and_of_none_nothing_is_known() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        assert have_ended((ended.pid,), 1)
        assert not have_ended((ended.pid, os.getpid()), 0.05)
    started = time.monotonic()
    assert not have_ended((), 10)
    assert time.monotonic() - started < 5
