"""``./install.sh torture boundaries``: every instruction of many functions is probed, and every hit compared.

A guest boots, functions that its workload runs are chosen, and one after another all their instructions are probed
(:mod:`tests.torture.boundary_check`). In the end the guest's text must be what it was, and its log clean.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from gdb_kprobe.model import Dispatch
from gdb_kprobe.render.text import table
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.execution_log import KERNEL_TEXT
from kprobe_guest.spec import KERNEL_NAMES
from tests.support import boundaries
from tests.support.functions import Limits
from tests.torture.boundary_check import ROUNDS, STUB_LIMITS, Outcome, boundary_check
from tests.torture.report import FAILURES, conclude

STRATEGIES = ("boosted", "single-step", "optimized")
BY_STUB_TOO = ("boosted", "single-step")
IN_GUEST, BY_STUB = 200, 20
"""Functions of a run."""


@dataclass(frozen=True, slots=True)
class Run:
    """One guest and one way to probe; *only* is a pattern for names of functions."""

    dispatch: Dispatch
    strategy: str
    kernel: str
    cpus: int
    count: int
    only: str = ""

    def __str__(self) -> str:
        where = "in the guest" if self.dispatch is Dispatch.GUEST else "by the stub"
        return f"{self.count} functions, {self.strategy}, dispatched {where}, kernel {self.kernel}, {self.cpus} vCPUs"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--all", action="store_true", help="both kernels, 1 and 2 vCPUs, both dispatchers; an hour")
    parser.add_argument("-n", type=int, metavar="N", help=f"functions ({IN_GUEST}; by the stub {BY_STUB})")
    parser.add_argument("--dispatch", type=Dispatch, choices=[Dispatch.GUEST, Dispatch.STUB], default=Dispatch.GUEST)
    parser.add_argument("--strategy", choices=STRATEGIES, default="boosted")
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--cpus", type=int, default=1, metavar="N")
    parser.add_argument("--only", default="", metavar="REGEX", help="only functions whose name matches")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    passed = failed = 0
    for one in _runs(options):
        ok, wrong = _run(one)
        passed, failed = passed + ok, failed + wrong
    return conclude(started, passed, failed)


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    if options.all:
        for kernel, cpus in product(("debian", "newest"), (1, 2)):
            yield Run(Dispatch.GUEST, "boosted", kernel, cpus, options.n or IN_GUEST)
            yield Run(Dispatch.GUEST, "optimized", kernel, cpus, options.n or IN_GUEST)
            for strategy in BY_STUB_TOO:
                yield Run(Dispatch.STUB, strategy, kernel, cpus, options.n or BY_STUB)
        return
    count = options.n or (IN_GUEST if options.dispatch is Dispatch.GUEST else BY_STUB)
    yield Run(options.dispatch, options.strategy, options.kernel, options.cpus, count, options.only)


def _run(one: Run) -> tuple[int, int]:
    """Returns how many functions have passed and failed; what belongs to none counts as one more that has failed."""
    print(f"\n{one}", flush=True)
    outcomes: list[Outcome] = []
    problems: list[str] = []
    try:
        problems += _check(one, outcomes)
    except FAILURES as error:
        problems.append(f"after {outcomes[-1].function if outcomes else 'the start'}: {error}")
    _summarize(outcomes)
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    return len(outcomes) - wrong, wrong + len(problems)


def _check(one: Run, outcomes: list[Outcome]) -> list[str]:
    """Check the functions of one run, one after another; returns what is wrong beside them.

    By the stub, where few hits can be waited for, a function counts when each boundary that was hit was hit often.
    """
    by_stub = one.dispatch is Dispatch.STUB
    limits = STUB_LIMITS if by_stub else Limits()
    counted = 0
    with GuestVm(GuestSpec(kernel=one.kernel, vcpus=one.cpus, extra_args=KERNEL_TEXT)) as guest:
        with boundary_check(guest) as check:
            functions = check.choose(None if one.only else one.count * (2 if by_stub else 1), limits)
            functions = tuple(function for function in functions if re.search(one.only, str(function)))
            print(check.kernel.description, flush=True)
            with GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
                gdb.console(f"kprobe attach --dispatch {one.dispatch} debian")
                boundaries.prepare(gdb)
                for function in functions:
                    if counted == one.count:
                        break
                    outcomes.append(check.check(gdb, function, one.strategy))
                    print(outcomes[-1], *outcomes[-1].wrong, sep="\n    ", flush=True)
                    counted += not by_stub or outcomes[-1].often == outcomes[-1].executed
                gdb.console("kprobe detach")
        left = check.leftovers()
    print(f"Text and log of the guest: {'; '.join(left) or 'as before, clean'}")
    print(f"{counted} functions" + (f" with {ROUNDS} hits or more of every boundary that was hit" if by_stub else ""))
    if counted < one.count and not one.only:
        left.append(f"the workload runs only {counted} functions of the kind asked for, not {one.count}")
    return left


def _summarize(outcomes: Sequence[Outcome]) -> None:
    rows = []
    for kind in sorted({outcome.function.kind for outcome in outcomes}):
        of_kind = [outcome for outcome in outcomes if outcome.function.kind is kind]
        figures = (len(of_kind), *(sum(values) for values in zip(*map(_figures, of_kind), strict=True)))
        rows.append((str(kind), *map(str, figures)))
    print(table(("kind", "functions", "boundaries", "of them hit", f"{ROUNDS} times or more", "hits", "refused"), rows))
    reasons = sum((outcome.refused for outcome in outcomes), Counter[str]())
    print(f"Refused: {', '.join(f'{count} {reason}' for reason, count in reasons.most_common()) or 'none'}")


def _figures(outcome: Outcome) -> tuple[int, int, int, int, int]:
    return outcome.armed, outcome.executed, outcome.often, outcome.hits, outcome.refused.total()
