"""``./install.sh bench``: what one hit costs, and what arming in bulk does, side by side on one guest, in one run.

All rows of hits observe the same system call, the rows of the guest's own events at the same instructions as ours,
behind the entries of functions; those on ftrace at the entries themselves. Repetitions of the rows are interleaved.
Hits are compared with the calls made: a row that does not see every call proves nothing, and fails the run.

The rows of acts stand beside their floors: what the same packets take a bare client (:mod:`tests.bench.bulk`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import Dispatch, VirtAddr
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.spec import KERNEL_NAMES
from tests.bench import bulk
from tests.bench.machine import Machine
from tests.bench.places import Call, find_path
from tests.bench.places import Path as CallPath
from tests.bench.rows import Row, make_row, show, show_acts
from tests.bench.ways import CHEAP, DEAR, Measured, calibrate, measure, measure_dear, merge
from tests.support import kernel_events
from tests.support.command import Command
from tests.support.guests import profile

NUMBERS = (0, 8, 32)
FEW, MANY = 8, 512
"""Of how many places the cost of a hit is compared."""
_MANY_EVERY = 8
"""How many groups of few are measured between two times that the many are."""

CALL = Call(87, ("s:/proc/no",))
"""``unlink`` of a file that is not there: nothing is left to do later, and nobody else looks there."""


_FEW_ROW, _MANY_ROW = f"optimized_count_{FEW}", f"optimized_count_{MANY}"
HIT_ROWS = (*DEAR, *CHEAP, _FEW_ROW, _MANY_ROW)
_UNOBSERVED = "optimized_count"
"""The cheap row that tells what a call takes that nobody observes, where no cheap row is wanted."""

Samples = dict[str, list[Measured]]
"""What the repetitions of each row found."""
Wanted = Callable[[str], bool]
"""Whether a row is to be measured."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the rows observe: *behind* and *entries* of the same functions; *many* anywhere on the way."""

    entries: Sequence[VirtAddr]
    behind: Sequence[VirtAddr]
    many: Sequence[VirtAddr]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--repetitions", type=_at_least_one, default=3, metavar="N", help="of each row (3)")
    parser.add_argument(
        "--only",
        type=re.compile,
        default=re.compile(""),
        metavar="REGEX",
        help=f"only the rows in whose names it is found: of hits, in us ({', '.join(HIT_ROWS)}), and of acts, in us: "
        "attach; arm_all, a probe on every function; continue_all and stop_all with them; of each of these the _floor, "
        "a bare client that sends the same packets; and plan_each, what arming takes beside that, for each probe",
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of repetitions: 1 or more are needed")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the file; returns the exit status."""

    def wanted(name: str) -> bool:
        return options.only.search(name) is not None

    of_hits, of_acts = any(map(wanted, HIT_ROWS)), any(map(wanted, bulk.ROWS))
    if not of_hits and not of_acts:
        raise KprobeError(f"no row's name has {options.only.pattern}", f"there are {', '.join(HIT_ROWS + bulk.ROWS)}")
    with GuestVm(GuestSpec(kernel=options.kernel)) as guest, GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
        version = guest.qmp("query-version")
        assert isinstance(version, dict)
        print(f"QEMU {'.'.join(str(version['qemu'][part]) for part in ('major', 'minor', 'micro'))}, TCG")
        print(f"kernel {guest.check_output('uname -srv').strip()}")
        machine = Machine.of(gdb, guest)
        samples: Samples = defaultdict(list)
        if of_hits:
            places = _find_places(machine)
            us_per_tick = calibrate(machine, CALL)
            print(f"{len(places.behind)} places for rows, {len(places.many)} for many", flush=True)
        for repetition in range(options.repetitions):
            if of_hits:
                _repeat(machine, places, us_per_tick, wanted, samples)
            if of_acts:
                for name, measured in bulk.measure_bulk(machine, profile(guest)).items():
                    if wanted(name):
                        samples[name].append(measured)
            print(f"repetition {repetition + 1} of {options.repetitions}", flush=True)
        problems = guest.dmesg_problems()
    # gdb steps over its breakpoint, and once in some 500 steps QEMU executes nothing: then gdb comes to it again.
    rows = [
        make_row(
            name,
            all_.points,
            all_.hits,
            all_.expected,
            all_.expected // 50 if name == "gdb_breakpoint" else 0,
            all_.evaluations,
        )
        for name, found in samples.items()
        for all_ in [merge(found)]
    ]
    hits, acts = [row for row in rows if row.name not in bulk.ROWS], [row for row in rows if row.name in bulk.ROWS]
    if hits:
        print(show(hits))
    if acts:
        print(show_acts(acts))
    options.json.write_text(json.dumps([row.entry() for row in rows], indent=2) + "\n")
    return _verdict(rows, problems)


def _verdict(rows: Sequence[Row], problems: Sequence[str]) -> int:
    wrong = [row for row in rows if not row.exact]
    for row in wrong:
        asked = "" if row.evaluated is None else "; filters were asked {} times in {} calls".format(*row.evaluated)
        what = "of which there are" if row.name in bulk.ROWS else "calls"
        print(f"FAILED: {row.name} saw {row.hits} of {row.expected_hits} {what}{asked}")
    for problem in problems:
        print(f"FAILED: the guest's log says: {problem}")
    return 1 if wrong or problems else 0


def _find_places(machine: Machine) -> _Places:
    """Places that our jumps and the kernel's are both possible at.

    :raises KprobeError: there are too few.
    """
    seen = kernel_events.functions_of(machine.guest, CALL.times(1))
    with _attached(machine, Dispatch.GUEST):
        path = find_path(machine, CALL, seen)
    entries, behind = _for_the_kernel(machine, path)
    if len(behind) < max(NUMBERS) or len(path.apart) < MANY:
        raise KprobeError(
            f"the call of the bench passes {len(behind)} functions and {len(path.apart)} instructions of this kernel "
            f"just once, where probes can be jumps; {max(NUMBERS)} and {MANY} are needed",
            "another --kernel, or a call with a longer way (CALL in tests/bench)",
        )
    return _Places(entries[: max(NUMBERS)], behind[: max(NUMBERS)], path.apart[:MANY])


def _for_the_kernel(machine: Machine, path: CallPath) -> tuple[list[VirtAddr], list[VirtAddr]]:
    optimized = kernel_events.possible(machine.guest, [addr for _, addr in path.functions], kernel_events.Way.OPTIMIZED)
    on_ftrace = kernel_events.possible(machine.guest, [entry for entry, _ in path.functions], kernel_events.Way.FTRACE)
    both = [(entry, addr) for entry, addr in path.functions if entry in on_ftrace and addr in optimized]
    return [entry for entry, _ in both], [addr for _, addr in both]


def _repeat(machine: Machine, places: _Places, us_per_tick: float, wanted: Wanted, samples: Samples) -> None:
    """Measure each row of hits that is *wanted* once more."""
    cheap: dict[str, Measured] = {}
    dear: dict[str, Measured] = {}
    for name, way in DEAR.items():
        if wanted(name):
            with _attached(machine, way.dispatch):
                dear[name] = measure_dear(machine, way, CALL, places.behind[0])
    needed = {name for name in CHEAP if wanted(name)} or ({_UNOBSERVED} if dear else set())
    for name, way in CHEAP.items():
        if name not in needed:
            continue
        with _attached(machine, way.dispatch):
            at = places.entries if way.at_entry else places.behind
            cheap[name] = measure(machine, way, CALL, at, NUMBERS * way.times, us_per_tick)
    if wanted(_FEW_ROW) or wanted(_MANY_ROW):
        cheap[_FEW_ROW], cheap[_MANY_ROW] = _few_and_many(machine, places.many, us_per_tick)
    unobserved = statistics.median(
        measured.points[0][1] for name, measured in cheap.items() if name in CHEAP or not dear
    )
    for name, measured in dear.items():
        points = tuple((number, us - unobserved) for number, us in measured.points)
        samples[name].append(replace(measured, points=points))
    for name, measured in cheap.items():
        if wanted(name):
            samples[name].append(measured)


def _few_and_many(machine: Machine, places: Sequence[VirtAddr], us_per_tick: float) -> tuple[Measured, Measured]:
    """The few are all of the many in turn, for what a hit costs depends on the place."""
    way = CHEAP["optimized_count"]
    groups = [places[first :: MANY // FEW] for first in range(MANY // FEW)]
    few, many = [], []
    with _attached(machine, way.dispatch):
        for index, group in enumerate(groups):
            few.append(measure(machine, way, CALL, group, (0, FEW), us_per_tick))
            if index % _MANY_EVERY == 0:
                many.append(measure(machine, way, CALL, places, (0, MANY), us_per_tick))
    return merge(few), merge(many)


@contextmanager
def _attached(machine: Machine, dispatch: Dispatch | None) -> Iterator[None]:
    if dispatch is None:
        yield
        return
    machine.gdb.console(f"kprobe attach --dispatch {dispatch} debian")
    yield
    machine.gdb.console("kprobe detach")


COMMAND = Command("bench", "measure what a hit costs, and what arming in bulk does", arguments, run)
