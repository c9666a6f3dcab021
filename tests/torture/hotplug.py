"""``./install.sh torture hotplug``: a CPU is taken offline and online again under load, with probes armed.

Every call that the guest makes must be counted, on whichever CPU. In each round gdb stops the guest once while the CPU
is offline, and disarms and arms its probes there.
"""

from __future__ import annotations

import argparse
import time

from gdb_kprobe.kprobes.patch import MAX_PATCH
from gdb_kprobe.language.spec import Location
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestVm
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.functions import function_insns
from tests.support.guests import environment, profile
from tests.torture.report import FAILURES, conclude, describe, guest_arguments, spec_of

CALLS = 20_000
ONLINE = "/sys/devices/system/cpu/cpu1/online"
CALL = f"workload syscall {GETPRIORITY} {CALLS}"
FUNCTION = ENTRY


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-n", type=int, default=10, metavar="N", help="rounds (10)")
    guest_arguments(parser, cpus=2)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    spec = spec_of(options)
    print(f"a CPU goes and comes {options.n} times, {describe(spec)}", flush=True)
    passed, problems = 0, []
    try:
        with GuestVm(spec) as guest:
            text = text_of(guest)
            with GdbMi(environment(guest)) as gdb:
                gdb.console(f"kprobe attach {profile(guest)}")
                gdb.console(f"kprobe p:jump {FUNCTION}")
                gdb.console("set kprobe strategy boosted")
                kernel = text.guest
                function = kernel.resolve(Location(FUNCTION))
                # A probe on the function is a jump behind its nop: this one is far enough.
                last = function_insns(kernel, function.start, function.end)[-1]
                gdb.console(f"kprobe p:trap {last.addr:#x}")
                touched = {
                    int(probe["addr"], 16) + byte
                    for probe in gdb.command("-kprobe-list")["probes"]
                    for byte in range(MAX_PATCH)
                }
                gdb.cont()
                for number in range(options.n):
                    _round(guest, gdb, options.cpus)
                    expected = (number + 1) * 2 * options.cpus * CALLS
                    found = {probe["name"]: probe["hits"] for probe in gdb.command("-kprobe-list")["probes"]}
                    if found != {"jump": str(expected), "trap": str(expected)}:
                        problems.append(f"round {number + 1}: counted {found}, not {expected}")
                        break
                    passed += 1
                    print(f"round {number + 1}: {expected} hits of each", flush=True)
                gdb.interrupt()
                gdb.console("kprobe detach")
            guest.check()
            problems += [*guest.dmesg_problems(), *text.leftovers(touched)]
    except FAILURES as error:
        problems.append(f"after {passed} rounds: {error}")
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    return conclude(started, passed, len(problems))


def _round(guest: GuestVm, gdb: GdbMi, cpus: int) -> None:
    """Take the CPU offline while others work, stop there, and take it online while others work."""
    jobs = [guest.spawn(CALL) for _ in range(cpus)]
    guest.check_output(f"echo 0 >{ONLINE}")
    gdb.interrupt()
    gdb.console("kprobe disable all")
    gdb.console("kprobe enable all")
    gdb.cont()
    jobs += [guest.spawn(CALL) for _ in range(cpus)]
    guest.check_output(f"echo 1 >{ONLINE}")
    for job in jobs:
        status, output = guest.finish(job, timeout=60)
        assert status == 0, output
    assert guest.check_output(f"cat {ONLINE}").strip() == "1"
