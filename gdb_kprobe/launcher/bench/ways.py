"""The ways to observe a place of the guest that are compared, and how the cost of a hit is measured with each.

A way where nothing leaves the guest is cheap, and measured as a slope: the time of the same call with no, a few and
many places observed, all of which each call passes once. A dear way, which stops the machine, is measured at one place:
the time of many calls less the time of few.

Telling a process to make so many calls may pass the places too. So it is told to make none as often before, and what
that hit is taken off: what is left must be the calls made, exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.launcher.bench import kernel_events
from gdb_kprobe.launcher.bench.machine import TIMEOUT, Machine
from gdb_kprobe.launcher.bench.places import Call
from gdb_kprobe.model import Dispatch, Rung, VirtAddr

NEVER = "if di == 0x123456789 && (si & 0x40)"
_TIMED = 3
"""Runs of which the fastest counts; one before is not timed: QEMU translates the guest's code anew after a stop."""
_FEW, _MANY = 10, 110
"""Calls of a dear way."""

_COUNTING_BREAKPOINT = (
    "python import gdb; "
    "Counting = type('Counting', (gdb.Breakpoint,), "
    "dict(hits=0, stop=lambda self: setattr(self, 'hits', self.hits + 1) or False)); "
    "counting = Counting('*{addr:#x}', type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)"
)

Count = Callable[[], int]
Observe = Callable[[Machine, Sequence[VirtAddr]], AbstractContextManager[Count]]
"""Observes all places while it is entered, and lets the guest run; gives a function that tells the hits so far."""


@dataclass(frozen=True, slots=True)
class Way:
    """*calls* is the number of calls of a run; *dispatch* is ours, ``None``: detached.

    *times*: how often each number of places is observed, armed anew. What the same call takes differs a little by where
    QEMU's translations come to lie, which is much beside the least costs.

    *rejects*: it counts no hit; that the places are passed is seen by a second probe at each, in a run of its own.
    """

    observe: Observe
    calls: int = 0
    dispatch: Dispatch | None = None
    times: int = 1
    at_entry: bool = False
    rejects: bool = False

    @property
    def counted_by_guest(self) -> bool:
        """The guest must run a command to tell the hits."""
        return self.dispatch is None


@dataclass(frozen=True, slots=True)
class Measured:
    """Microseconds that a call takes, by the number of places observed; and the hits of all runs."""

    points: tuple[tuple[int, float], ...]
    hits: int
    expected: int


def merge(found: Iterable[Measured]) -> Measured:
    """As if measured together; the calls are of the same length."""
    parts = tuple(found)
    points = tuple(itertools.chain.from_iterable(part.points for part in parts))
    return Measured(points, sum(part.hits for part in parts), sum(part.expected for part in parts))


def measure(
    machine: Machine,
    way: Way,
    call: Call,
    places: Sequence[VirtAddr],
    numbers: Sequence[int],
    clock: Clock | None = None,
) -> Measured:
    """Measure a cheap way with each of *numbers* of *places*, by QEMU's processor time or another *clock*."""
    clock = clock or machine.cpu_seconds
    points: list[tuple[int, float]] = []
    hits = 0
    runs = 1 + _TIMED
    for number in numbers:
        with way.observe(machine, places[:number]) as count, _caller(machine, way, call) as run:
            run((0,) * runs, clock)  # the first after arming may take other ways
            before = count()
            run((0,) * runs, clock)
            idle = count() - before
            seconds = run((way.calls,) * runs, clock)
            hits += count() - before - 2 * idle
        points.append((number, min(seconds[1:]) / way.calls * 1e6))
    expected = 0 if way.rejects else runs * way.calls * sum(numbers)
    if way.rejects:
        _prove_passed(machine, call, places[: max(numbers)], way.calls)
    return Measured(tuple(points), hits, expected)


def measure_dear(machine: Machine, way: Way, call: Call, place: VirtAddr) -> Measured:
    """Measure a dear way; the time of a call that nobody observes is still to be taken off."""
    runs = (_FEW, _FEW, _MANY)
    with way.observe(machine, [place]) as count, _caller(machine, way, call) as run:
        run((0,), machine.wall_seconds)
        before = count()
        run((0,) * len(runs), machine.wall_seconds)
        idle = count() - before
        _, few, many = run(runs, machine.wall_seconds)
        hits = count() - before - 2 * idle
    return Measured(((1, (many - few) / (_MANY - _FEW) * 1e6),), hits, sum(runs))


Clock = Callable[[Callable[[], object]], float]
Run = Callable[[Sequence[int], Clock], list[float]]
"""Makes so many calls, and so many, ...; gives the seconds of each."""


@contextmanager
def _caller(machine: Machine, way: Way, call: Call) -> Iterator[Run]:
    """A process that makes calls when it is told to; it is there throughout where hits can be counted meanwhile."""

    def with_one(ask: Callable[[str], str], numbers: Sequence[int], clock: Clock) -> list[float]:
        return [clock(partial(ask, str(calls))) for calls in numbers]

    def with_one_each(numbers: Sequence[int], clock: Clock) -> list[float]:
        with machine.guest.dialogue(call.on_request, TIMEOUT) as ask:
            return with_one(ask, numbers, clock)

    if way.counted_by_guest:
        yield with_one_each
    else:
        with machine.guest.dialogue(call.on_request, TIMEOUT) as ask:
            yield partial(with_one, ask)


def _prove_passed(machine: Machine, call: Call, places: Sequence[VirtAddr], calls: int) -> None:
    """See that a filter that rejects every hit is asked at all: beside it a probe without one counts every call."""
    with _probes(machine, places, Rung.OPTIMIZED, NEVER) as rejected:
        machine.gdb.interrupt()
        machine.arm(places, Rung.OPTIMIZED, prefix="passed")
        machine.gdb.cont()
        counts = []
        with machine.guest.dialogue(call.on_request, TIMEOUT) as ask:
            for number in (0, 0, calls):
                ask(str(number))
                machine.gdb.interrupt()
                counts.append(sum(machine.hits("passed").values()))
                machine.gdb.cont()
        first, second, third = counts
        found = third - second - (second - first)
        if found != calls * len(places) or rejected():
            raise KprobeError(f"{found} of {calls * len(places)} hits came to the filters")


@contextmanager
def _probes(
    machine: Machine, places: Sequence[VirtAddr], rung: Rung, condition: str = "", prefix: str = "bench"
) -> Iterator[Count]:
    def count() -> int:
        machine.gdb.interrupt()
        hits = sum(machine.hits(prefix, rung).values())
        machine.gdb.cont()
        return hits

    machine.arm(places, rung, condition, prefix)
    if missing := set(places) - set(machine.hits(prefix, rung)):
        raise KprobeError(f"no {rung} probe at {', '.join(map(hex, sorted(missing)))}")
    machine.gdb.cont()
    yield count
    machine.gdb.interrupt()
    machine.disarm()


@contextmanager
def _kernel_events(machine: Machine, places: Sequence[VirtAddr], way: kernel_events.Way) -> Iterator[Count]:
    with kernel_events.events(machine.guest, places, way):
        yield lambda: kernel_events.hits(machine.guest)


@contextmanager
def _gdb_breakpoint(machine: Machine, places: Sequence[VirtAddr]) -> Iterator[Count]:
    """What one does without this project: a breakpoint whose ``stop()`` counts and returns False."""

    def count() -> int:
        machine.gdb.interrupt()
        hits = int(machine.gdb.console("python print(counting.hits)"))
        machine.gdb.cont()
        return hits

    (place,) = places
    machine.gdb.console(_COUNTING_BREAKPOINT.format(addr=place))
    machine.gdb.cont()
    yield count
    machine.gdb.interrupt()
    machine.gdb.console("python counting.delete()")


DEAR: dict[str, Way] = {
    "gdb_breakpoint": Way(_gdb_breakpoint, dispatch=Dispatch.GUEST),
    "stub_single_step": Way(partial(_probes, rung=Rung.SINGLE_STEP), dispatch=Dispatch.STUB),
    "stub_boosted": Way(partial(_probes, rung=Rung.BOOSTED), dispatch=Dispatch.STUB),
}
CHEAP: dict[str, Way] = {
    "guest_boosted": Way(partial(_probes, rung=Rung.BOOSTED), 30_000, Dispatch.GUEST, times=2),
    "optimized_count": Way(partial(_probes, rung=Rung.OPTIMIZED), 50_000, Dispatch.GUEST, times=4),
    "optimized_filter_reject": Way(
        partial(_probes, rung=Rung.OPTIMIZED, condition=NEVER), 50_000, Dispatch.GUEST, times=4, rejects=True
    ),
    "kernel_event_int3": Way(partial(_kernel_events, way=kernel_events.Way.INT3), 10_000),
    "kernel_event_optimized": Way(partial(_kernel_events, way=kernel_events.Way.OPTIMIZED), 20_000),
    "kernel_event_ftrace": Way(partial(_kernel_events, way=kernel_events.Way.FTRACE), 20_000, at_entry=True),
}
