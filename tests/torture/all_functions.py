"""``./install.sh torture all-functions``: a probe on every function of a kernel that does all kinds of work.

The workload's parts run on every vCPU, over and over, as long as was asked for. One system call that nothing else makes
is made a known number of times meanwhile; its probe's count must be that. In the end the text must be what it was, and
the log clean. How many probes are jumps is told before and after the work: a jump may have had to wait for a task.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from gdb_kprobe.model import Rung
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.workload import PARTS, SPIN
from tests.support.guests import environment, profile
from tests.torture.report import FAILURES, conclude, describe, guest_arguments, spec_of

SCHED_GET_PRIORITY_MAX = 146
"""A system call that nothing else in the guest makes."""
_COUNTED = "p___x64_sys_sched_get_priority_max_0"
_CALLS = 1000
_TIMEOUT = 600

_SITES = "f'{site.addr} {site.rung} {site.range.size}' for site in api.sites() if site.is_armed"
_SUMS = "sum(p.hits for p in api.probes()), sum(p.missed for p in api.probes())"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--minutes", type=float, default=1, metavar="N", help="how long (1)")
    parser.add_argument("--append", action="append", default=[], metavar="WORD", help="for the kernel's command line")
    guest_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    spec = spec_of(options, options.append)
    print(f"every function, {options.minutes:g} minutes, {describe(spec)}", flush=True)
    try:
        problems = _check(spec, options.minutes * 60)
    except FAILURES as error:
        problems = [str(error)]
        print(f"FAILED: {error}", flush=True)
    return conclude(started, int(not problems), int(bool(problems)))


def _check(spec: GuestSpec, seconds: float) -> list[str]:
    """Do it, and tell what happens; returns what went wrong."""
    with GuestVm(spec) as guest:
        snapshot = text_of(guest)
        with GdbMi(environment(guest)) as gdb:
            print(gdb.console(f"kprobe attach {profile(guest)}"), end="")
            print(gdb.console("kprobe add --all-functions", timeout=_TIMEOUT), end="", flush=True)
            gdb.console("python from gdb_kprobe.gdbext import api")
            sites = _sites(gdb)
            print(_rungs(sites), flush=True)
            touched = _touched(sites)
            gdb.cont()
            rounds = sum(1 for _ in _work(guest, seconds))
            guest.check()
            counted = int(gdb.console(f"python print(api.get('{_COUNTED}').hits)"))
            hits, missed = map(int, gdb.console(f"python print(*({_SUMS}))", timeout=_TIMEOUT).split())
            print(f"{rounds} rounds of all work on each vCPU, {hits} hits, {missed} missed", flush=True)
            gdb.interrupt()
            sites = _sites(gdb)
            print(f"Afterwards: {_rungs(sites)}", flush=True)
            touched |= _touched(sites)
            print(re.sub(r"\n+", "\n", gdb.console("kprobe detach", timeout=_TIMEOUT)), end="")
        problems = [*guest.dmesg_problems(), *snapshot.leftovers(touched)]
    if counted != _CALLS * spec.vcpus * rounds:
        problems.append(f"{_COUNTED} was hit {counted} times, not {_CALLS * spec.vcpus * rounds}")
    if missed:
        problems.append(f"{missed} hits were missed")
    print(f"Text and log of the guest: {'; '.join(problems) or 'as before, clean'}", flush=True)
    return problems


def _sites(gdb: GdbMi) -> dict[int, tuple[Rung, int]]:
    """The rung of each armed site and how many bytes it has patched, by address."""
    words = gdb.console(f"python print(*({_SITES}))", timeout=_TIMEOUT).split()
    return {
        int(addr): (Rung(rung), int(size))
        for addr, rung, size in zip(words[::3], words[1::3], words[2::3], strict=True)
    }


def _rungs(sites: Mapping[int, tuple[Rung, int]]) -> str:
    counts = Counter(rung for rung, _ in sites.values())
    return ", ".join(f"{counts[rung]} {rung}" for rung in (Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP))


def _touched(sites: Mapping[int, tuple[Rung, int]]) -> set[int]:
    """The bytes of text that the probes are in: a jump, or an int3."""
    return {addr + byte for addr, (_, size) in sites.items() for byte in range(size)}


def _work(guest: GuestVm, seconds: float) -> Iterator[None]:
    """Have every vCPU do each part, and again until the time is over; yields after each round."""
    parts = "; ".join(f"workload part {part} 20" for part in PARTS if part != SPIN)
    each = f"{parts}; workload syscall {SCHED_GET_PRIORITY_MAX} {_CALLS}"
    end = time.monotonic() + seconds
    while True:
        # Each in a directory of its own: the parts make files by name.
        places = [f"mkdir -p /tmp/work{cpu}; cd /tmp/work{cpu}" for cpu in range(guest.spec.vcpus)]
        jobs = [guest.spawn(f"set -e; {place}; {each}", timeout=_TIMEOUT) for place in places]
        for job in jobs:
            status, output = guest.finish(job, timeout=_TIMEOUT)
            assert status == 0, f"a workload failed: {output}"
        yield
        if time.monotonic() >= end:
            return
