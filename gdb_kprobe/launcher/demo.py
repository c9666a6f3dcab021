"""``gdb-kprobe demo``: the main job on a real kernel, shown and checked.

A Debian guest boots; gdb attaches; on each rung a probe counts a workload of exactly N system calls; everything is
undone, and the guest's text compared with what it was. A figure that is not as it must be ends it with an error.
"""

from __future__ import annotations

import argparse
import time

from gdb_kprobe.model import Rung
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.spec import KERNEL_NAMES

FCHOWNAT = 260
PROBE = "p:{name} do_fchownat dfd=%di:s32 uid=%dx:u32 gid=%cx:u32"
"""``do_fchownat(dfd, filename, user, group, flag)``: nothing else in the guest calls it."""

ATTACH_USUAL = 3.0
"""Seconds from ``kprobe attach`` to the prompt, at most, on a machine that does nothing else."""
ADD_USUAL = 0.1
"""Seconds to add a probe, at most, on such a machine."""
_SHOWN = 4
_TIMEOUT = 600


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--calls", type=int, default=500, metavar="N", help="system calls of each workload")


def run(options: argparse.Namespace) -> int:
    """Do the demo; returns the exit status."""
    kernel: str = options.kernel
    started = time.monotonic()
    print(f"Booting a guest ({kernel} kernel, {options.vcpus} vCPUs, KASLR on) ...", flush=True)
    with GuestVm(GuestSpec(kernel=kernel, vcpus=options.vcpus)) as guest:
        print(f"Up after {time.monotonic() - started:.1f} s.\n", flush=True)
        before = text_of(guest)
        failures: list[str] = []
        with GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
            _attach(gdb)
            touched = {
                _one_rung(gdb, guest, rung, options.calls, failures) for rung in (Rung.BOOSTED, Rung.SINGLE_STEP)
            }
            _type(gdb, "kprobe detach")
        left = before.leftovers(touched)
        print(f"Kernel text, {before.size} bytes compared: {left or 'identical'}")
        problems = guest.dmesg_problems()
        print(f"Guest log: {problems or 'clean'}")
        failures += [*left, *problems]
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{'FAILED' if failures else 'All as it must be'}, in {time.monotonic() - started:.0f} s.")
    return 1 if failures else 0


def _attach(gdb: GdbMi) -> None:
    started = time.monotonic()
    _type(gdb, "kprobe attach debian")
    seconds = time.monotonic() - started
    print(f"From the command to the prompt: {seconds:.2f} s{_slow(seconds, ATTACH_USUAL)}.\n", flush=True)


def _slow(seconds: float, usual: float) -> str:
    """A remark on a time that says more of the machine than of the plugin."""
    return "" if seconds <= usual else f" (more than the usual {usual} s: the machine is slow, or busy)"


def _one_rung(gdb: GdbMi, guest: GuestVm, rung: Rung, calls: int, failures: list[str]) -> int:
    """Count *calls* system calls on *rung*; returns the probed address."""
    name = rung.replace("-", "_")
    _type(gdb, f"set kprobe strategy {rung}")
    started = time.monotonic()
    _type(gdb, f"kprobe {PROBE.format(name=name)}")
    seconds = time.monotonic() - started
    print(f"A probe was added in {seconds * 1000:.0f} ms{_slow(seconds, ADD_USUAL)}.")
    if rung is Rung.BOOSTED:
        _type(gdb, f"kprobe plan {PROBE.format(name=name)}")

    _type(gdb, f"kprobe trace -n {calls}")
    started = time.monotonic()
    job = guest.spawn(f"workload syscall {FCHOWNAT} {calls} -100 s:/ 1000 100 0", timeout=_TIMEOUT)
    gdb.wait_stop(_TIMEOUT)
    elapsed = time.monotonic() - started
    lines = [line for line in gdb.output.splitlines() if f" {name}: " in line]
    for line in lines[:_SHOWN]:
        print(line)
    print(f"... {len(lines) - _SHOWN} more lines")
    if len({line.split(f" {name}: ")[1] for line in lines}) != 1 or "uid=1000 gid=100" not in lines[0]:
        failures.append(f"{rung}: the arguments shown are not those of the calls")
    # gdb holds the guest at the last hit: let the workload end, and see that there is not one hit more.
    gdb.cont()
    status, output = guest.finish(job, timeout=_TIMEOUT)
    gdb.interrupt(_TIMEOUT)
    _type(gdb, "kprobe list")
    probe = next(probe for probe in gdb.command("-kprobe-list")["probes"] if probe["name"] == name)
    counted = f"{calls} calls done" in output and status == 0
    print(
        f"{rung}: {probe['hits']} hits of {calls} calls, {probe['missed']} missed, {len(lines)} lines traced, "
        f"{elapsed / calls * 1e6:.0f} us each\n",
        flush=True,
    )
    if not counted or (probe["hits"], probe["missed"]) != (str(calls), "0") or len(lines) != calls:
        failures.append(f"{rung}: not {calls} hits of {calls} calls (workload: {output.strip()})")
    _type(gdb, f"kprobe delete {name}")
    return int(probe["addr"], 16)


def _type(gdb: GdbMi, command: str) -> None:
    """Run *command* and show it as the user would see it."""
    print(f"(gdb) {command}")
    output = gdb.console(command, timeout=_TIMEOUT).rstrip()
    if output:
        print(output)
    print(end="", flush=True)
