"""``gdb-kprobe bench``: what one hit costs, side by side on one guest, in one run.

A row is a way to observe a system call. Its cost is a slope: the time of many calls less the time of few, so that what
both have in common (starting the workload, the console) drops out. Repetitions of the rows are interleaved. Hits are
compared with the calls made: a row that does not see every call proves nothing, and fails the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from gdb_kprobe.model import Rung
from gdb_kprobe.render.text import table
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm

GETPRIORITY = 140
"""A short system call that nothing else in the guest makes."""
FUNCTION = "__x64_sys_getpriority"
FEW, MANY = 10, 110
_TIMEOUT = 600

_COUNTING_BREAKPOINT = (
    "python import gdb; "
    "Counting = type('Counting', (gdb.Breakpoint,), "
    "dict(hits=0, stop=lambda self: setattr(self, 'hits', self.hits + 1) or False)); "
    "counting = Counting('*{addr}', type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. *spread* is the range of the repetitions, in us; a noisy row proves nothing."""

    name: str
    us_per_hit: float
    spread: float
    hits: int
    expected_hits: int

    @property
    def noisy(self) -> bool:
        return self.spread > self.us_per_hit / 3


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--kernel", choices=["debian", "newest"], default="debian")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the file; returns the exit status."""
    samples: dict[str, list[float]] = {name: [] for name in WAYS}
    hits = dict.fromkeys(WAYS, 0)
    with GuestVm(GuestSpec(kernel=options.kernel)) as guest, GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
        gdb.console("kprobe attach debian")
        print(f"{guest.qmp('query-version')}")
        print(gdb.console("kprobe info"))
        for repetition in range(options.repetitions):
            for name, way in WAYS.items():
                with way(gdb) as count:
                    few, many = (_time(gdb, guest, calls) for calls in (FEW, MANY))
                    hits[name] += count()
                samples[name].append((many - few) / (MANY - FEW) * 1e6)
            print(f"repetition {repetition + 1} of {options.repetitions}", flush=True)
        gdb.console("kprobe detach")
    expected = options.repetitions * (FEW + MANY)
    rows = [
        Row(name, statistics.median(values), max(values) - min(values), hits[name], expected)
        for name, values in samples.items()
    ]
    base = rows[0].us_per_hit
    print(
        table(
            ("way", "us per hit", "spread", "ratio", "hits", "calls", ""),
            [
                (row.name, f"{row.us_per_hit:.0f}", f"{row.spread:.0f}", f"{row.us_per_hit / base:.2f}", str(row.hits),
                 str(row.expected_hits), "noisy" if row.noisy else "")
                for row in rows
            ],
        )
    )  # fmt: skip
    options.json.write_text(json.dumps([{**asdict(row), "noisy": row.noisy} for row in rows], indent=2) + "\n")
    wrong = [row for row in rows if row.hits != row.expected_hits]
    for row in wrong:
        print(f"FAILED: {row.name} saw {row.hits} of {row.expected_hits} calls")
    return 1 if wrong else 0


def _time(gdb: GdbMi, guest: GuestVm, calls: int) -> float:
    """Seconds that a workload of *calls* system calls takes."""
    gdb.cont()
    started = time.monotonic()
    guest.run(f"workload syscall {GETPRIORITY} {calls}", timeout=_TIMEOUT)
    seconds = time.monotonic() - started
    gdb.interrupt()
    return seconds


Count = Callable[[], int]


@contextmanager
def _gdb_breakpoint(gdb: GdbMi) -> Iterator[Count]:
    """What one does without this project: a breakpoint whose ``stop()`` counts and returns False."""
    addr = gdb.command(f"-kprobe-plan {FUNCTION}")["plan"]["addr"]
    gdb.console(_COUNTING_BREAKPOINT.format(addr=addr))
    yield lambda: int(gdb.console("python print(counting.hits)"))
    gdb.console("python counting.delete()")


@contextmanager
def _probe(gdb: GdbMi, rung: Rung) -> Iterator[Count]:
    gdb.console(f"set kprobe strategy {rung}")
    gdb.console(f"kprobe p:bench {FUNCTION}")
    yield lambda: int(gdb.command("-kprobe-list")["probes"][0]["hits"])
    gdb.console("kprobe delete bench")


WAYS: dict[str, Callable[[GdbMi], AbstractContextManager[Count]]] = {
    "gdb_breakpoint": _gdb_breakpoint,
    "stub_single_step": partial(_probe, rung=Rung.SINGLE_STEP),
    "stub_boosted": partial(_probe, rung=Rung.BOOSTED),
}
