"""The ways to observe a place of the guest that are compared, and how the cost of a hit is measured with each.

A way where nothing leaves the guest is cheap, and measured as a slope: the time of the same call with no, a few and
many places observed, all of which each call passes once. The guest looks at its clock every 20 calls, and the
shortest of those times is taken: what else the machine does only adds, and some of so few calls it leaves alone. A
dear way, which stops the machine, is measured at one place: the time of many calls less the time of few.

What a way does beside the timed calls is shown to happen before and after them: hits of a probe that is traced, hits
for which the filter holds. They come of another system call, which passes none of the places.

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
from gdb_kprobe.model import Dispatch, Rung, VirtAddr
from kprobe_guest.timed_calls import Took, timed_calls, us_of_a_tick
from tests.bench.machine import TIMEOUT, Machine
from tests.bench.places import Call
from tests.support import kernel_events
from tests.support.calls import BODY

NEVER = "if di == 0x123456789 && (si & 0x40)"
ALIKE, ALIKE_CALL = "if di == 0x1 && (si & 0x40)", "140 {} 1 0x40"
"""The same, and a system call for which it holds at the entry of :data:`ASIDE`."""
ASIDE = BODY
"""A function that no timed call passes."""
_ASIDE = 20
"""Its calls before the timed ones, and after."""
_RUNS = 2
"""The first is not timed: QEMU translates the guest's code anew after a stop."""
_CALIBRATION = 2.0
"""Seconds of the host's clock that are compared with the guest's."""
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
    """Microseconds that a call takes, by the number of places observed; and what all runs have counted."""

    points: tuple[tuple[int, float], ...]
    hits: int
    expected: int
    evaluations: tuple[int, int] | None = None
    """Of a way that rejects: how often the guest has asked the filters in some calls, and how often it should."""


def merge(found: Iterable[Measured]) -> Measured:
    """As if measured together; the calls are of the same length."""
    parts = tuple(found)
    points = tuple(itertools.chain.from_iterable(part.points for part in parts))
    asked = [part.evaluations for part in parts if part.evaluations is not None]
    return Measured(
        points,
        sum(part.hits for part in parts),
        sum(part.expected for part in parts),
        (sum(found for found, _ in asked), sum(expected for _, expected in asked)) if asked else None,
    )


def calibrate(machine: Machine, call: Call) -> float:
    """How many microseconds a tick of the running guest's clock is."""
    with timed_calls(machine.guest, call.on_request, TIMEOUT) as run:
        return us_of_a_tick(run, _CALIBRATION)


def measure(
    machine: Machine, way: Way, call: Call, places: Sequence[VirtAddr], numbers: Sequence[int], us_per_tick: float
) -> Measured:
    """Measure a cheap way with each of *numbers* of *places*."""
    points: list[tuple[int, float]] = []
    hits = 0
    for number in numbers:
        with way.observe(machine, places[:number]) as count, _caller(machine, way, call) as run:
            run((0,) * _RUNS)  # the first after arming may take other ways
            before = count()
            run((0,) * _RUNS)
            idle = count() - before
            took = run((way.calls,) * _RUNS)
            hits += count() - before - 2 * idle
        points.append((number, took[-1].ticks_of_a_call * us_per_tick))
    if not way.rejects:
        return Measured(tuple(points), hits, _RUNS * way.calls * sum(numbers))
    filtered = places[: max(numbers)]
    evaluated = _evaluated(machine, way, call, filtered)
    return Measured(tuple(points), hits, 0, (evaluated, way.calls * len(filtered)))


def measure_dear(machine: Machine, way: Way, call: Call, place: VirtAddr) -> Measured:
    """Measure a dear way; the time of a call that nobody observes is still to be taken off."""
    runs = (_FEW, _FEW, _MANY)
    with way.observe(machine, [place]) as count, _caller(machine, way, call) as run:
        run((0,))
        before = count()
        run((0,) * len(runs))
        idle = count() - before
        _, few, many = (took.seconds for took in run(runs))
        hits = count() - before - 2 * idle
    return Measured(((1, (many - few) / (_MANY - _FEW) * 1e6),), hits, sum(runs))


Run = Callable[[Sequence[int]], list[Took]]
"""Makes so many calls, and so many, ..."""


@contextmanager
def _caller(machine: Machine, way: Way, call: Call) -> Iterator[Run]:
    """A process that makes calls when it is told to; it is there throughout where hits can be counted meanwhile."""

    def with_one_each(numbers: Sequence[int]) -> list[Took]:
        with _dialogue(machine, call) as run:
            return run(numbers)

    if way.counted_by_guest:
        yield with_one_each
    else:
        with _dialogue(machine, call) as run:
            yield run


@contextmanager
def _dialogue(machine: Machine, call: Call) -> Iterator[Run]:
    with timed_calls(machine.guest, call.on_request, TIMEOUT) as took:
        yield lambda numbers: [took(calls) for calls in numbers]


def _evaluated(machine: Machine, way: Way, call: Call, places: Sequence[VirtAddr]) -> int:
    """How often a filter that rejects every hit is asked in the calls of a run: a probe beside each counts that.

    :raises KprobeError: a hit was not rejected.
    """
    with way.observe(machine, places) as rejected:
        machine.gdb.interrupt()
        machine.arm(places, Rung.OPTIMIZED, prefix="passed")
        machine.gdb.cont()
        counts = []
        with _dialogue(machine, call) as run:
            for number in (0, 0, way.calls):
                run((number,))
                machine.gdb.interrupt()
                counts.append(sum(machine.hits("passed").values()))
                machine.gdb.cont()
        first, second, third = counts
        if hits := rejected():
            raise KprobeError(f"{hits} hits were not rejected")
        return third - second - (second - first)


@contextmanager
def _probes(
    machine: Machine,
    places: Sequence[VirtAddr],
    rung: Rung,
    condition: str = "",
    prefix: str = "bench",
    *,
    python: bool = False,
) -> Iterator[Count]:
    def count() -> int:
        machine.gdb.interrupt()
        hits = sum(machine.hits(prefix, rung).values())
        machine.gdb.cont()
        return hits

    machine.arm(places, rung, condition, prefix, python=python)
    if missing := set(places) - set(machine.hits(prefix, rung)):
        raise KprobeError(f"no {rung} probe at {', '.join(map(hex, sorted(missing)))}")
    machine.gdb.cont()
    yield count
    machine.gdb.interrupt()
    machine.disarm()


@contextmanager
def _rejecting(machine: Machine, places: Sequence[VirtAddr], *, python: bool) -> Iterator[Count]:
    """Probes with a filter that no hit passes, and one aside whose filter, alike, holds for some calls.

    *python*: all have a handler in Python, which those calls must come to.
    """
    machine.arm([machine.address(ASIDE)], Rung.OPTIMIZED, ALIKE, "aside", python=python)
    with _probes(machine, places, Rung.OPTIMIZED, NEVER, python=python) as count:
        _call_aside(machine, ALIKE_CALL, 1)
        _call_aside(machine, "140 {} 1 0x80", 1)
        yield count
        _call_aside(machine, ALIKE_CALL, 2)
        if python and (handled := machine.handled()) != 2 * _ASIDE:
            raise KprobeError(f"the handler was called {handled} times for {2 * _ASIDE} hits")


@contextmanager
def _while_tracing(machine: Machine, places: Sequence[VirtAddr]) -> Iterator[Count]:
    """Probes that count, while another one is traced: a trace of it sees each of its hits."""
    machine.arm([machine.address(ASIDE)], Rung.OPTIMIZED, prefix="aside")
    with machine.traced("aside") as told, _probes(machine, places, Rung.OPTIMIZED) as count:
        _call_aside(machine, "140 {}", 1)
        yield count
        _call_aside(machine, "140 {}", 2)
        if told() != 2 * _ASIDE:
            raise KprobeError(f"the trace saw {told()} of {2 * _ASIDE} hits")


def _call_aside(machine: Machine, call: str, times: int) -> None:
    """Make the calls aside; the probe there has counted so many *times* as many then. The guest runs.

    :raises KprobeError: it has not.
    """
    machine.guest.check_output(f"workload syscall {call.format(_ASIDE)}", TIMEOUT)
    machine.gdb.interrupt()
    (hits,) = machine.hits("aside").values()
    machine.gdb.cont()
    if hits != times * _ASIDE:
        raise KprobeError(f"{hits} hits aside, not {times * _ASIDE}")


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
    "guest_boosted": Way(partial(_probes, rung=Rung.BOOSTED), 10_000, Dispatch.GUEST, times=8),
    "optimized_count": Way(partial(_probes, rung=Rung.OPTIMIZED), 10_000, Dispatch.GUEST, times=16),
    "count_while_tracing": Way(_while_tracing, 10_000, Dispatch.GUEST, times=16),
    "optimized_filter_reject": Way(partial(_rejecting, python=False), 10_000, Dispatch.GUEST, times=16, rejects=True),
    "python_filter_reject": Way(partial(_rejecting, python=True), 10_000, Dispatch.GUEST, times=16, rejects=True),
    "kernel_event_int3": Way(partial(_kernel_events, way=kernel_events.Way.INT3), 10_000, times=2),
    "kernel_event_optimized": Way(partial(_kernel_events, way=kernel_events.Way.OPTIMIZED), 10_000, times=4),
    "kernel_event_ftrace": Way(partial(_kernel_events, way=kernel_events.Way.FTRACE), 10_000, times=4, at_entry=True),
}
