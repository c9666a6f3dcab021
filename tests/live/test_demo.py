"""``gdb-kprobe demo``: what it prints, of a run with few calls."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.live


def test_the_demo_counts_on_each_rung_beside_a_breakpoint() -> None:
    command = [sys.executable, "-P", "-m", "gdb_kprobe.launcher.cli", "demo", "--calls", "23"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.findall(r"^([\w-]+): (\d+) hits of (\d+) calls, 0 missed", done.stdout, re.M)
    # Without a stop a hundred times as many: counted once while the guest runs, then three times measured.
    assert counted == [
        ("optimized", "2300", "2300"),
        ("optimized", "9200", "9200"),
        ("optimized", "9204", "9204"),
        ("boosted", "2300", "2300"),
        ("boosted", "9200", "9200"),
        ("single-step", "23", "23"),
    ]
    listed = re.findall(r"^ffffffff\w+ .*? (\[OPTIMIZED\])? +(\d+) +0 +([\w-]+)  ", done.stdout, re.M)
    assert listed == [("[OPTIMIZED]", "2300", "optimized"), ("", "2300", "boosted"), ("", "23", "single-step")]
    (times,) = re.findall(r"^gdb breakpoint: 2[34] hits of 23 calls, \d+ us each: .* ([\d,]+) times", done.stdout, re.M)
    assert int(times.replace(",", "")) > 100, "a hit that stops nothing is cheaper"
    assert len(re.findall(r"^\[00[01]\] .* dfd=-100 uid=1000 gid=100$", done.stdout, re.M)) == 4
    assert "This machine is emulated" in done.stdout
    assert re.search(r"^Detached; the guest runs\.\nKernel text, \d+ bytes compared: identical$", done.stdout, re.M)
