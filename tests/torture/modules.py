"""``./install.sh torture modules``: a module is loaded and unloaded under load, with probes in it and for it.

gdb is not asked to stop in between: the probes follow the module by themselves. Every call of its functions that the
guest makes must be counted, those of its init too, and those of a probe on the core kernel; now and then its init is
made to fail. In the end the text must be what it was before, and the log clean.
"""

from __future__ import annotations

import argparse
import time

from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestVm
from tests.support.guests import environment, profile
from tests.torture.report import FAILURES, conclude, describe, guest_arguments, spec_of

LOAD, UNLOAD = "insmod /modules/loop.ko", "rmmod loop"
FAIL = f"{LOAD} max_part=300"
"""Its init finds that to be too many."""
IOCTL, GETPRIORITY, CALLS = 16, 140, 50
CALL = f"workload syscall {IOCTL} {CALLS} 3 0x1234 0 3</dev/loop-control"
DEVICES = "ls -d /sys/block/loop* | wc -l"
"""As many as the module's init has called ``loop_add``."""
BUSY = f"while [ ! -e /tmp/enough ]; do workload syscall {GETPRIORITY} 1000 >/dev/null; echo; done | wc -l"
"""Prints how many thousand calls it has made."""
FAIL_EVERY = 5
PROBES = ("p:ctl loop:loop_control_ioctl", "p:init loop:loop_add", "p:core __x64_sys_getpriority")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-n", type=int, default=20, metavar="N", help="rounds (20)")
    guest_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    spec = spec_of(options)
    print(f"{options.n} loads of a module, {describe(spec)}", flush=True)
    passed, problems = 0, []
    try:
        with GuestVm(spec) as guest:
            guest.check_output(UNLOAD)
            text = text_of(guest)
            with GdbMi(environment(guest)) as gdb:
                gdb.console(f"kprobe attach {profile(guest)}")
                for definition in PROBES:
                    print(gdb.console(f"kprobe {definition}"), end="")
                core = int(gdb.command("-kprobe-list")["probes"][2]["addr"], 16)
                gdb.cont()
                busy = guest.spawn(BUSY, timeout=60)
                calls = devices = 0
                for number in range(options.n):
                    devices += _round(guest, fail=number % FAIL_EVERY == 0)
                    calls += CALLS
                    found = {probe["name"]: (probe["hits"], probe["missed"]) for probe in _probes(gdb)}
                    expected = {"ctl": (str(calls), "0"), "init": (str(devices), "0")}
                    if {name: found[name] for name in expected} != expected:
                        problems.append(f"round {number + 1}: counted {found}, not {expected}")
                        break
                    passed += 1
                    print(f"round {number + 1}: ctl {calls}, init {devices}", flush=True)
                guest.check_output("touch /tmp/enough")
                status, output = guest.finish(busy, timeout=60)
                assert status == 0, output
                core_calls = int(output.split()[-1]) * 1000
                counted = {probe["name"]: int(probe["hits"]) for probe in _probes(gdb)}["core"]
                print(f"the core kernel's was called {core_calls} times, and counted {counted}", flush=True)
                if counted != core_calls:
                    problems.append(f"core was hit {counted} times, not {core_calls}")
                gdb.interrupt()
                gdb.console("kprobe detach")
            guest.check()
            problems += guest.dmesg_problems()
            problems += text.leftovers(range(core, core + JUMP_SIZE))
    except FAILURES as error:
        problems.append(f"after {passed} rounds: {error}")
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    return conclude(started, passed, len(problems))


def _round(guest: GuestVm, *, fail: bool) -> int:
    """Load, call, unload; returns how many devices the init has made."""
    if fail:
        assert guest.run(FAIL)[0] != 0
    guest.check_output(LOAD)
    _, output = guest.run(CALL)
    assert f"workload: {CALLS} calls done" in output, output
    devices = int(guest.check_output(DEVICES))
    guest.check_output(UNLOAD)
    return devices


def _probes(gdb: GdbMi) -> list[dict[str, str]]:
    probes: list[dict[str, str]] = gdb.command("-kprobe-list")["probes"]
    return probes
