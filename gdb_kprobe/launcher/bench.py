"""``gdb-kprobe bench``: what one hit costs, side by side on one guest, in one run.

A row is a way to observe a system call. Its cost is a slope: the time of many calls less the time of few, so that what
both have in common (starting the workload, the console) drops out, less the slope of the call that nobody observes.
Repetitions of the rows are interleaved. Hits are compared with the calls made: a row that does not see every call
proves nothing, and fails the run. All rows are at one and the same instruction, behind the function's entry, so that
the guest's own kprobe is on an int3 there too.
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

from gdb_kprobe.model import Dispatch, Rung, VirtAddr
from gdb_kprobe.render.text import table
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.x86.decode import iter_insns
from gdb_kprobe.x86.families import Family, classify
from kprobe_guest import GuestSpec, GuestVm

GETPRIORITY = 140
"""A short system call that nothing else in the guest makes."""
FUNCTION = "__x64_sys_getpriority"
_TIMEOUT = 600
_TRACING = "/sys/kernel/tracing"
_BASELINE = "unobserved"

_COUNTING_BREAKPOINT = (
    "python import gdb; "
    "Counting = type('Counting', (gdb.Breakpoint,), "
    "dict(hits=0, stop=lambda self: setattr(self, 'hits', self.hits + 1) or False)); "
    "counting = Counting('*{addr:#x}', type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)"
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


@dataclass(frozen=True, slots=True)
class Bench:
    """What the ways work on; *addr* is the instruction, *place* the same as a definition names it."""

    gdb: GdbMi
    guest: GuestVm
    addr: VirtAddr
    place: str


Count = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to observe: *observe* does so while it is entered, and gives a function that tells the hits.

    *few* and *many* are the numbers of calls; a dear way makes less of them. *dispatch* is ours, ``None``: detached.
    """

    observe: Callable[[Bench], AbstractContextManager[Count]]
    few: int
    many: int
    dispatch: Dispatch | None = None


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
        bench = _prepare(gdb, guest)
        print(f"at {bench.place}")
        for repetition in range(options.repetitions):
            for name, way in WAYS.items():
                seconds, seen = _measure(bench, way)
                samples[name].append(seconds * 1e6)
                hits[name] += seen
            print(f"repetition {repetition + 1} of {options.repetitions}", flush=True)
        problems = guest.dmesg_problems()
    rows = _rows(samples, hits, options.repetitions)
    _print(rows)
    options.json.write_text(json.dumps([{**asdict(row), "noisy": row.noisy} for row in rows], indent=2) + "\n")
    wrong = [row for row in rows if not _is_exact(row)]
    for row in wrong:
        print(f"FAILED: {row.name} saw {row.hits} of {row.expected_hits} calls")
    for problem in problems:
        print(f"FAILED: the guest's log says: {problem}")
    return 1 if wrong or problems else 0


def _is_exact(row: Row) -> bool:
    # gdb steps over its breakpoint, and once in some 500 steps QEMU executes nothing: then gdb comes to it again.
    twice = row.expected_hits // 50 if row.name == "gdb_breakpoint" else 0
    return row.expected_hits <= row.hits <= row.expected_hits + twice


def _prepare(gdb: GdbMi, guest: GuestVm) -> Bench:
    """Find the instruction, and have the guest's own kprobes stay on their int3s."""
    start = VirtAddr(int(gdb.command(f"-kprobe-plan {FUNCTION}")["plan"]["addr"], 16))
    memory = gdb.command(f"-data-read-memory-bytes {start} 32")["memory"][0]["contents"]
    insns = iter_insns(bytes.fromhex(memory), start)
    addr = next(insn.addr for insn in insns if classify(insn) is not Family.NOP)
    gdb.console("kprobe detach")
    guest.run("echo 0 >/proc/sys/debug/kprobes-optimization")
    return Bench(gdb, guest, addr, f"{FUNCTION}+{addr - start:#x}")


def _measure(bench: Bench, way: Way) -> tuple[float, int]:
    """Seconds that a call takes, and hits that were seen."""
    gdb = bench.gdb
    gdb.console("kprobe attach debian" if way.dispatch is None else f"kprobe attach --dispatch {way.dispatch} debian")
    with way.observe(bench) as count:
        # The first run is not timed: QEMU translates the guest's code anew after a stop.
        _, few, many = (_time(bench, calls) for calls in (way.few, way.few, way.many))
        seen = count()
    gdb.console("kprobe detach")
    return (many - few) / (way.many - way.few), seen


def _time(bench: Bench, calls: int) -> float:
    """Seconds that a workload of *calls* system calls takes."""
    bench.gdb.cont()
    started = time.monotonic()
    bench.guest.run(f"workload syscall {GETPRIORITY} {calls}", timeout=_TIMEOUT)
    seconds = time.monotonic() - started
    bench.gdb.interrupt()
    return seconds


def _rows(samples: dict[str, list[float]], hits: dict[str, int], repetitions: int) -> list[Row]:
    base = statistics.median(samples[_BASELINE])
    return [
        Row(
            name,
            statistics.median(samples[name]) - base,
            max(samples[name]) - min(samples[name]),
            hits[name],
            repetitions * (2 * way.few + way.many),
        )
        for name, way in WAYS.items()
        if name != _BASELINE
    ]


def _print(rows: list[Row]) -> None:
    base = rows[0].us_per_hit
    lines = [
        (row.name, f"{row.us_per_hit:.2f}", f"{row.spread:.2f}", f"{base / row.us_per_hit:.1f}", str(row.hits),
         str(row.expected_hits), "noisy" if row.noisy else "")
        for row in rows
    ]  # fmt: skip
    print(table(("way", "us per hit", "spread", "times faster", "hits", "calls", ""), lines))


@contextmanager
def _nothing(bench: Bench) -> Iterator[Count]:
    yield lambda: 0


@contextmanager
def _gdb_breakpoint(bench: Bench) -> Iterator[Count]:
    """What one does without this project: a breakpoint whose ``stop()`` counts and returns False."""
    bench.gdb.console(_COUNTING_BREAKPOINT.format(addr=bench.addr))
    yield lambda: int(bench.gdb.console("python print(counting.hits)"))
    bench.gdb.console("python counting.delete()")


@contextmanager
def _probe(bench: Bench, rung: Rung) -> Iterator[Count]:
    bench.gdb.console(f"set kprobe strategy {rung}")
    bench.gdb.console(f"kprobe p:bench {bench.place}")
    yield lambda: int(bench.gdb.command("-kprobe-list")["probes"][0]["hits"])
    bench.gdb.console("kprobe delete bench")


@contextmanager
def _kernel_event(bench: Bench) -> Iterator[Count]:
    """The guest's own kprobe event at the same instruction."""
    _while_running(bench, f"echo 'p:bench {bench.place}' >{_TRACING}/kprobe_events")
    _while_running(bench, f"echo 1 >{_TRACING}/events/kprobes/bench/enable")
    yield lambda: int(_while_running(bench, f"cat {_TRACING}/kprobe_profile").split()[1])
    _while_running(bench, f"echo 0 >{_TRACING}/events/kprobes/bench/enable; echo >{_TRACING}/kprobe_events")


def _while_running(bench: Bench, command: str) -> str:
    bench.gdb.cont()
    status, output = bench.guest.run(command)
    bench.gdb.interrupt()
    assert status == 0, output
    return output


WAYS: dict[str, Way] = {
    _BASELINE: Way(_nothing, 1_000, 201_000),
    "gdb_breakpoint": Way(_gdb_breakpoint, 10, 110),
    "stub_single_step": Way(partial(_probe, rung=Rung.SINGLE_STEP), 10, 110, Dispatch.STUB),
    "stub_boosted": Way(partial(_probe, rung=Rung.BOOSTED), 10, 110, Dispatch.STUB),
    "guest_boosted": Way(partial(_probe, rung=Rung.BOOSTED), 1_000, 201_000, Dispatch.GUEST),
    "kernel_event_int3": Way(_kernel_event, 1_000, 201_000),
}
