"""``./install.sh torture owners``: the guest's own kprobes and tracers come and go where probes of ours do.

A sequence is some steps by chance at one function: the guest defines, enables, disables and removes kprobe events,
return probes and fprobe events, switches its function tracers, attaches BPF programs and loads live patches; we add,
switch and delete probes at the same places and beside, stop the guest, detach, are killed, adopted and restored; and
calls are made. Each must be counted by all that are there, or whoever has not counted says why. What the guest's own
count is compared with another guest, which never meets us. In the end no text and no record of ftrace's is changed, and
the log is clean.

A sequence that fails is played again by a new guest, made shorter as long as it fails, and printed, to be played with
``--replay``.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from gdb_kprobe.errors import KprobeError
from kprobe_guest import GuestSpec, GuestVm, Template
from tests.torture.owners.match import Ground, Match
from tests.torture.owners.our_side import WrongError
from tests.torture.owners.shrink import shrink
from tests.torture.owners.steps import Sequence, parse, sequence, written
from tests.torture.report import FAILURES, conclude, describe, guest_arguments, spec_of

_WIDTH = 400
"""Characters that are printed of a line of what was said with gdb."""
_REPORT = 20
"""Sequences from one line about the progress to the next."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-n", type=int, default=100, metavar="N", help="sequences (100)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so long, whatever N is")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="begin with the Kth sequence of the seed")
    parser.add_argument("--replay", metavar="STEPS", help="play one sequence: its steps, or a file of them")
    parser.add_argument("--no-shrink", action="store_true", help="print a sequence that fails as it is")
    guest_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    spec = spec_of(options)
    with Arena(spec) as arena:
        if options.replay:
            wrong = arena.play(_replayed(options.replay, arena.ground))
            print(wrong or "nothing is wrong", flush=True)
            return conclude(started, int(not wrong), int(bool(wrong)))
        seed = options.seed if options.seed is not None else random.randrange(10**6)
        print(f"{options.n} sequences, {describe(spec)}, seed {seed}", flush=True)
        passed, failed = 0, 0
        kinds: Counter[str] = Counter()
        for number in range(options.first, options.first + options.n):
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                break
            one = numbered(seed, number, arena)
            wrong = arena.play(one)
            if wrong:
                failed += 1
                kind = _kind(wrong)
                kinds[kind] += 1
                print(f"FAILED: sequence {number} of seed {seed}: {written(one)}\n{wrong}", flush=True)
                if kinds[kind] == 1 and not options.no_shrink:
                    short = shrink(one, partial(_fails_so, arena, kind))
                    print(f"made short ({kind}): {written(short)}", flush=True)
            else:
                passed += 1
            if (passed + failed) % _REPORT == 0:
                rate = 60 * (passed + failed) / (time.monotonic() - started)
                print(
                    f"up to {number}: {passed} passed, {failed} failed, {arena.lost} guests lost, "
                    f"{arena.lost_interrupts} interrupts lost, {rate:.0f} a minute",
                    flush=True,
                )
        for what, counted in (("refused", arena.refused), ("not counted", arena.reasons), ("failed", kinds)):
            for text, times in counted.most_common(20):
                print(f"{times:6} {what}: {text}")
        print(
            f"{arena.excused} places of the guest's were hidden by a jump; {arena.lost} guests lost; "
            f"{arena.lost_interrupts} interrupts that gdb took for others"
        )
    return conclude(started, passed, failed)


def _replayed(steps: str, ground: Ground) -> Sequence:
    """:raises KprobeError: there is no such file, or no such function in it."""
    try:
        # A path has no blank in it, and a sequence has.
        found = parse(steps if " " in steps else Path(steps).read_text())
    except OSError as error:
        raise KprobeError(f"--replay {steps}: {error.strerror}", "it is a file of steps, or the steps") from error
    for step in found:
        if step.verb == "on" and " ".join(step.words) not in ground.functions:
            raise KprobeError(
                f"--replay: there is no function for '{step}'", f"there are {', '.join(ground.functions)}"
            )
    return found


def numbered(seed: int, number: int, arena: Arena) -> Sequence:
    """The sequence of this number: the same for the same kernel."""
    return sequence(random.Random(f"{seed}/{number}"), arena.ground.field)


def _fails_so(arena: Arena, kind: str, some: Sequence) -> bool:
    """Whether *some*, a part of a sequence that has failed so, does it too. It may leave probes, to the next."""
    wrong = arena.play(some)
    arena.drop()
    return _kind(wrong) == kind


def _kind(wrong: str) -> str:
    """What failures that are probably of one cause have in common."""
    lines = wrong.splitlines()
    if not lines:
        return ""
    return "".join(letter for letter in lines[0][:60] if not letter.isdigit())


class Arena:
    """Where sequences are played: the guest of the last one, as long as nothing was wrong with it."""

    def __init__(self, spec: GuestSpec) -> None:
        with GuestVm(spec) as guest:
            self.ground = Ground(guest)
            self._template = Template(guest)
        self._match: Match | None = None
        self._guests = ExitStack()
        self.refused: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.excused = 0
        self.lost = 0
        self.lost_interrupts = 0

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self._template.close()

    def play(self, sequence: Sequence) -> str:
        """Play a sequence; returns what is wrong, nothing if nothing is."""
        return self.go(lambda match: match.play(sequence))

    def go(self, act: Callable[[Match], None]) -> str:
        """Have something done; returns what is wrong, nothing if nothing is. Then other guests come."""
        match = self.match()
        try:
            act(match)
        except FAILURES as error:
            lost = "the guest is lost: " if not match.is_alive() else ""
            self.lost += bool(lost)
            wrong = f"{lost}{type(error).__name__}: {error}"
        except WrongError as error:
            wrong = str(error)
        else:
            wrong = ""
        self._tally(match)
        if wrong:
            wrong += "\n" + "\n".join(f"    {line[:_WIDTH]}" for line in match.ours.transcript)
            self.drop()
        return wrong

    def match(self) -> Match:
        """Two guests that nothing is wrong with."""
        if self._match is None:
            subject = self._guests.enter_context(self._template.fork())
            reference = self._guests.enter_context(self._template.fork())
            self._match = Match(self.ground, subject, reference)
        return self._match

    def _tally(self, match: Match) -> None:
        self.refused.update(text.splitlines()[0] for text in match.ours.refusals if text)
        self.reasons.update(match.ours.reasons)
        self.excused += len(match.excused)
        self.lost_interrupts += match.ours.lost_interrupts
        match.ours.lost_interrupts = 0
        match.ours.refusals.clear()
        match.ours.reasons.clear()
        match.excused.clear()

    def drop(self) -> None:
        """Have the next sequence played in other guests."""
        match, self._match = self._match, None
        guests, self._guests = self._guests, ExitStack()
        with guests:
            if match is not None:
                match.close()
