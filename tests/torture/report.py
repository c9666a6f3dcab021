"""What the kinds of torture have in common: their options, the rounds that some go by, and how it is all told."""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from gdb_kprobe.testing import GdbCommandError, GdbDiedError, GdbTimeoutError
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.errors import GuestError
from kprobe_guest.spec import KERNEL_NAMES
from tests.support.guests import unprepared

FAILURES = (GuestError, GdbCommandError, GdbDiedError, GdbTimeoutError, AssertionError)
"""What a guest or a gdb that does not do as it should raises; anything else is a mistake of ours, and ends the run."""


class Round(Protocol):
    """One of many that are the same but for chance; printed, it says what was done."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """Empty when all is well."""


R = TypeVar("R", bound=Round)


def guest_arguments(parser: argparse.ArgumentParser, *, cpus: int = 1) -> None:
    """Declare which guest is tortured."""
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--cpus", type=int, default=cpus, metavar="N", help=f"vCPUs ({cpus})")
    parser.add_argument("--unprepared", action="store_true", help="a guest as of 'qemu -s', with a borrowed region")


def spec_of(options: argparse.Namespace, command_line: Sequence[str] = ()) -> GuestSpec:
    """The guest that :func:`guest_arguments` were about; *command_line* is more for its kernel."""
    if options.unprepared:
        return unprepared(options.kernel, options.cpus, command_line)
    return GuestSpec(kernel=options.kernel, vcpus=options.cpus, extra_cmdline=tuple(command_line))


def describe(spec: GuestSpec) -> str:
    """Which guest that is, for the first line of a run."""
    words = [f"kernel {spec.kernel}", f"{spec.vcpus} vCPUs", *spec.extra_cmdline]
    return ", ".join([*words, *(["unprepared"] if spec.region == "none" else [])])


def round_arguments(parser: argparse.ArgumentParser, number: int, what: str) -> None:
    """Declare how many rounds there are, of which guest, and by which chance."""
    parser.add_argument("-n", type=int, default=number, metavar="N", help=f"{what} ({number})")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    guest_arguments(parser)


def run_rounds(
    options: argparse.Namespace,
    what: str,
    rounds: Callable[[GuestVm, random.Random], Iterator[R]],
    command_line: Sequence[str] = (),
) -> tuple[list[R], list[str]]:
    """Take as many of *rounds* as *options* say, on one guest; returns them, and what ended them early.

    *command_line* is more for the guest's kernel.
    """
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    spec = spec_of(options, command_line)
    print(f"{options.n} {what}, {describe(spec)}, seed {seed}", flush=True)
    done: list[R] = []
    problems: list[str] = []
    with GuestVm(spec) as guest:
        try:
            for one in itertools.islice(rounds(guest, random.Random(seed)), options.n):
                done.append(one)
                print(one, *one.wrong, sep="\n    ", flush=True)
        except FAILURES as error:
            problems.append(f"after {len(done)} rounds: {error}")
            print(f"FAILED: {problems[-1]}", flush=True)
    return done, problems


def conclude_rounds(started: float, rounds: Sequence[Round], problems: Sequence[str]) -> int:
    """Print how the rounds ended; the exit status."""
    failed = sum(bool(one.wrong) for one in rounds)
    return conclude(started, len(rounds) - failed, failed + len(problems))


def conclude(started: float, passed: int, failed: int) -> int:
    """Print how it ended; *started* is in seconds of :func:`time.monotonic`. Returns the exit status."""
    print(f"In {time.monotonic() - started:.0f} s:\n{passed} passed, {failed} failed")
    return 1 if failed else 0
