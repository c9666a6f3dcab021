"""How long a system call of the guest takes, by the guest's own clock.

``workload timed`` reads the clock every 20 calls. What else the machine does only adds to a call, and leaves some runs
of 20 calls alone: the shortest is what they take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kprobe_guest.commands import GuestCommands

CHUNK = 20
"""Calls between two looks of the workload at the clock."""


@dataclass(frozen=True, slots=True)
class Took:
    """What some calls took: by the host's clock, and in ticks of the guest's for every 20; *begin* in those too."""

    seconds: float
    begin: int
    ticks: tuple[int, ...]

    @property
    def ticks_of_a_call(self) -> float:
        """By the fastest 20: nothing came between."""
        return min(self.ticks) / CHUNK


@contextmanager
def timed_calls(guest: GuestCommands, command: str, timeout: float) -> Iterator[Callable[[int], Took]]:
    """Run *command*, a ``workload timed NR - ...``; the function given makes so many calls with it.

    The guest runs no other command meanwhile. *timeout*: seconds for one answer.

    :raises GuestError: the command failed.
    """
    with guest.dialogue(command, timeout) as ask:

        def took(calls: int) -> Took:
            started = time.monotonic()
            answer = ask(str(calls))
            seconds = time.monotonic() - started
            begin, *ticks = ticks_of(answer)
            return Took(seconds, begin, tuple(ticks))

        yield took


def ticks_of(answer: str) -> tuple[int, ...]:
    """The ticks in the workload's *answer*: ``workload: N calls done, last result R BEGIN TICKS TICKS ...``."""
    _, _, result_and_ticks = answer.partition("last result ")
    return tuple(map(int, result_and_ticks.split()[1:]))


def us_of_a_tick(run: Callable[[int], Took], seconds: float) -> float:
    """How many microseconds a tick is: *seconds* of the host's clock are compared with the running guest's."""
    run(0)
    started = time.monotonic()
    first = run(0)
    time.sleep(seconds)
    passed = time.monotonic() - started
    second = run(0)
    return passed * 1e6 / (second.begin - first.begin)
