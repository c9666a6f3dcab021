"""``gdb-kprobe torture matrix``: one run each on machines and kernels of all kinds.

Each cell attaches, puts a probe on every rung and one with a condition, has a known number of calls made on every vCPU,
compares the counts, and detaches. Text and log of the guest must be as before.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.language.spec import Location
from gdb_kprobe.launcher.guests import environment, profile, unprepared
from gdb_kprobe.launcher.oracle import GuestMonitor, GuestRam
from gdb_kprobe.launcher.torture.report import FAILURES, conclude
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.render.text import table
from gdb_kprobe.session.linux_guest import LinuxGuest
from gdb_kprobe.testing import GdbCommandError, GdbMi, TextSnapshot
from gdb_kprobe.x86.decode import decode
from gdb_kprobe.x86.encoding import MAX_LENGTH
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.debug_info import fetch_debug_info
from kprobe_guest.build.kernel import find_kernel

GETPRIORITY = 140
OUTER, INNER = "__x64_sys_getpriority", "__do_sys_getpriority"
"""A system call that nothing else in the guest makes, and what it calls with its arguments in registers."""
CALLS, OF_GROUPS = 20, 7
"""Calls on each vCPU for a process, and for a group of processes (``PRIO_PGRP``)."""
_TIMEOUT = 120


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of guest. *after* are commands of gdb right behind the attach; *debug_info*: gdb is given it there."""

    spec: GuestSpec
    after: tuple[str, ...] = ()
    debug_info: bool = False


CELLS: dict[str, Cell] = {
    "-cpu max": Cell(GuestSpec()),
    "default CPU": Cell(GuestSpec(cpu="default")),
    "default CPU, 2 vCPUs": Cell(GuestSpec(cpu="default", vcpus=2)),
    "4 levels of page tables": Cell(GuestSpec(extra_args=("-cpu", "max,-cx16,la57=off"))),
    "pti=on": Cell(GuestSpec(extra_cmdline=("pti=on",), vcpus=2)),
    "mitigations=off": Cell(GuestSpec(extra_cmdline=("mitigations=off",), vcpus=2)),
    "preempt=full": Cell(GuestSpec(extra_cmdline=("preempt=full",), vcpus=2)),
    "preempt=none": Cell(GuestSpec(extra_cmdline=("preempt=none",))),
    "no KASLR": Cell(GuestSpec(kaslr=False)),
    "-M pc": Cell(GuestSpec(machine="pc")),
    "one thread for all vCPUs": Cell(GuestSpec(tcg_thread="single", vcpus=2)),
    "4 vCPUs": Cell(GuestSpec(vcpus=4)),
    "RAM above 4 GiB": Cell(GuestSpec(memory_mb=5120)),
    "private RAM": Cell(GuestSpec(shared_ram=False, vcpus=2)),
    "ivshmem": Cell(GuestSpec(region="ivshmem", vcpus=2)),
    "gdbstub by TCP": Cell(GuestSpec(gdb="tcp")),
    "unprepared": Cell(unprepared()),
    "unprepared, 2 vCPUs": Cell(unprepared(vcpus=2)),
    "unprepared, -cpu max, pti=on": Cell(replace(unprepared(extra_cmdline=("pti=on",)), cpu="max")),
    "6.12, unprepared": Cell(unprepared("newest")),
    "symbols loaded": Cell(GuestSpec(), after=("kprobe symbols",)),
    "debug info loaded": Cell(GuestSpec(), after=("kprobe symbols {vmlinux}",), debug_info=True),
    "the user's breakpoints": Cell(
        GuestSpec(), after=("break *{inner:#x}", "ignore $bpnum 100000", "hbreak *{idle:#x}")
    ),
    "6.12": Cell(GuestSpec(kernel="newest")),
    "6.12, default CPU, ivshmem": Cell(GuestSpec(kernel="newest", cpu="default", region="ivshmem")),
    "6.12, private RAM": Cell(GuestSpec(kernel="newest", shared_ram=False)),
    "6.12, pti=on, 2 vCPUs": Cell(GuestSpec(kernel="newest", extra_cmdline=("pti=on",), vcpus=2)),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell: its times, the rungs, the hits; *wrong* is empty if all is well."""

    times: Times | None
    rungs: tuple[str, ...]
    hits: int
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: of the attach, of adding a first probe, of reading the counts while the guest runs (if that can be)."""

    attach: float
    add: float
    read: float | None

    def columns(self) -> tuple[str, str, str]:
        """For the table: seconds, and milliseconds."""
        return f"{self.attach:.2f}", f"{self.add * 1e3:.1f}", "-" if self.read is None else f"{self.read * 1e3:.1f}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells whose name matches")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    rows, failed = [], 0
    for name, cell in CELLS.items():
        if not re.search(options.only, name):
            continue
        try:
            with GuestVm(cell.spec) as guest:
                outcome = check(guest, cell)
        except FAILURES as error:
            outcome = Outcome(None, (), 0, (str(error),))
        failed += bool(outcome.wrong)
        result = "FAILED" if outcome.wrong else "passed"
        print(f"{result} {name}", *outcome.wrong, sep="\n    ", flush=True)
        times = outcome.times.columns() if outcome.times else ("", "", "")
        rows.append((name, *times, ", ".join(outcome.rungs), str(outcome.hits), result))
    print(table(("guest", "attach, s", "add, ms", "read, ms", "rungs", "hits", ""), rows))
    return conclude(started, len(rows) - failed, failed)


def check(guest: GuestVm, cell: Cell) -> Outcome:
    """Run *cell* on *guest*, which is of its kind; the guest is as before then.

    :raises GdbCommandError: gdb refuses what it is told.
    """
    text = TextSnapshot(GuestMonitor(guest), GuestRam(guest))
    places = dict(_places(text.guest))
    with tempfile.TemporaryDirectory() as directory, GdbMi(environment(guest)) as gdb:
        attach = _timed(gdb, f"kprobe attach {profile_of(guest, Path(directory))}")
        vmlinux = _vmlinux(guest) if cell.debug_info else None
        for command in cell.after:
            gdb.console(command.format(inner=places["step"], idle=places["idle"], vmlinux=vmlinux), timeout=_TIMEOUT)
        if vmlinux is not None and gdb.evaluate(f"&{OUTER}") != _function(text.guest, OUTER).start:
            return Outcome(None, (), 0, (f"{vmlinux} is not at the guest's addresses",))
        add = 0.0
        for name, strategy in (("jump", "auto"), ("trap", "boosted"), ("step", "single-step"), ("group", "auto")):
            gdb.console(f"set kprobe strategy {strategy}")
            condition = " if di == 1" if name == "group" else ""
            seconds = _timed(gdb, f"kprobe p:{name} {places[name]:#x}{condition}")
            add = add or seconds
        gdb.cont()
        calls = [f"workload syscall {GETPRIORITY} {times} {which} 0" for which, times in ((0, CALLS), (1, OF_GROUPS))]
        guest.check_output(" & ".join([" && ".join(calls)] * guest.spec.vcpus) + " & wait", timeout=_TIMEOUT)
        try:
            read = _timed(gdb, "kprobe stats")
        except GdbCommandError:
            if guest.spec.shared_ram or guest.spec.region == "none":
                raise
            read = None  # the profile says that nothing is to be shared
        gdb.interrupt()
        probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list")["probes"]}
        done = gdb.command("-kprobe-detach", timeout=_TIMEOUT)
    every = (CALLS + OF_GROUPS) * guest.spec.vcpus
    expected = {"jump": every, "trap": every, "step": every, "group": OF_GROUPS * guest.spec.vcpus}
    found = {name: int(probe["hits"]) for name, probe in probes.items()}
    wrong = [] if found == expected else [f"counted {found}, not {expected}"]
    wrong += [f"{name} missed {probe['missed']}" for name, probe in probes.items() if probe["missed"] != "0"]
    wrong += [f"detach: {problem}" for problem in done["problems"]]
    wrong += guest.dmesg_problems()
    wrong += text.leftovers(addr + byte for addr in places.values() for byte in range(JUMP_SIZE))
    rungs = tuple(dict.fromkeys(probe["rung"] for probe in probes.values()))
    return Outcome(Times(attach, add, read), rungs, sum(found.values()), tuple(wrong))


def _timed(gdb: GdbMi, command: str) -> float:
    """Seconds that a command of gdb takes."""
    started = time.monotonic()
    gdb.console(command, timeout=_TIMEOUT)
    return time.monotonic() - started


def _vmlinux(guest: GuestVm) -> Path:
    assert guest.spec.kernel != "bare"
    return fetch_debug_info(find_kernel(guest.spec.kernel))


def profile_of(guest: GuestVm, directory: Path) -> Path:
    """Write the profile in configs/ for the guest's region, with the address and the memory of this very guest."""
    text = (CONFIGS / f"{profile(guest)}.yaml").read_text()
    text = text.replace("${KPROBE_GUEST}/gdb", guest.gdb_address)
    if guest.spec.reserved_base is not None:
        text = text.replace("physical: 0x10000000", f"physical: {guest.spec.reserved_base:#x}")
    if not guest.spec.shared_ram:
        text = text.replace("shared_memory: auto", "shared_memory: off")
    path = directory / "profile.yaml"
    path.write_text(text)
    return path


def _places(kernel: LinuxGuest) -> Iterator[tuple[str, VirtAddr]]:
    """Where the probes are put: the nop of the guest's ftrace and what is behind it, and the first instructions."""
    outer, inner = _function(kernel, OUTER), _function(kernel, INNER)
    (site,) = kernel.ftrace_sites(outer)
    yield "jump", site.window.start
    yield "trap", site.window.end
    first = decode(kernel.memory.read(inner.start, MAX_LENGTH), inner.start)
    yield "step", first.addr
    yield "group", first.end
    yield "idle", _function(kernel, "__x64_sys_setpriority").start


def _function(kernel: LinuxGuest, symbol: str) -> AddressRange:
    place = kernel.resolve(Location(symbol))
    return AddressRange(place.start, place.end)
