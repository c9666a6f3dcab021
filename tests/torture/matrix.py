"""``./install.sh torture matrix``: one run each on machines and kernels of all kinds."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace

from gdb_kprobe.render.text import table
from kprobe_guest import GuestSpec
from tests.support.guests import unprepared
from tests.torture.cell import Cell, run_cell
from tests.torture.report import conclude

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
        outcome = run_cell(cell)
        failed += bool(outcome.wrong)
        print(f"{outcome.result} {name}", *outcome.wrong, sep="\n    ", flush=True)
        times = outcome.times.columns() if outcome.times else ("", "", "")
        rows.append((name, *times, ", ".join(outcome.rungs), str(outcome.hits), outcome.result))
    print(table(("guest", "attach, s", "add, ms", "read, ms", "rungs", "hits", ""), rows))
    return conclude(started, len(rows) - failed, failed)
