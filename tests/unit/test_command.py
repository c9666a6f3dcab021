"""A command of the tests' rooms ends as a program should: what it has begun is undone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time
from tests.support.command import Command

def run(options):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("undone", flush=True)
    return 0

raise SystemExit(Command("some", "does something", lambda parser: None, run).main([]))
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_a_signal_ends_it_undone(number: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(30) == status
        assert (process.stdout.read(), process.stderr.read()) == ("undone\n", "")
