"""What is said of a guest that has failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kprobe_guest import GuestFailedError
from kprobe_guest.console import SUSPICIOUS, find_problems


@pytest.mark.parametrize(
    ("console", "expected"),
    [
        ("[    1.061652] int3: 0000 [#1] PREEMPT SMP NOPTI", True),  # 6.1
        ("[    1.061652] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", True),  # 6.12
        ("[   23.4] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", True),
        ("[   28.0] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [init:1]", True),
        ("[    2.3] Oops: 0002 [#1] PREEMPT SMP NOPTI", False),
        ("[    2.3] Kernel panic - not syncing: sysrq triggered crash", False),
    ],
)
def test_what_a_switched_label_may_do_is_known(console: str, expected: bool) -> None:
    """The line is the first that was seen, or one behind it; it may be out of sight at the end of a long report."""
    for what, tail in ((console, "after"), ("Call Trace:", f"before\n{console}\nafter")):
        assert GuestFailedError(what, tail, Path("/nowhere")).is_of_a_switched_label == expected


@pytest.mark.parametrize(
    "line",
    [
        "Kernel panic - not syncing: Fatal exception",
        "Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "BUG: unable to handle page fault for address: 0000000000100000",
        "kernel BUG at mm/slub.c:379!",
        "WARNING: CPU: 0 PID: 104 at kernel/trace/ftrace.c:2029",
        "Call Trace:",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 26s!",
        "Watchdog detected hard LOCKUP on cpu 0",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "general protection fault, probably for non-canonical address",
        "init: insmod dummy.ko failed",
        "guest: exception 3",
        "guest: wrong result of f_jcc",
    ],
)
def test_what_a_guest_looks_for_in_its_log_has_all_problems(line: str) -> None:
    assert find_problems(f"[    1.0] {line}\n") == [f"[    1.0] {line}"]
    assert re.search(SUSPICIOUS, line, re.IGNORECASE)
