"""``./install.sh torture snapshot``: snapshots are saved and loaded under sessions, at random moments.

A round attaches, arms probes, saves a snapshot in one of :class:`Saved`, and loads it in one of :class:`Loaded`, from
QEMU's monitor or from gdb. Then

* a session that has other probes must not have written a byte, which is seen in gdb's log of its connection, and in the
  guest's text, which must be that of the snapshot; the next attach restores the text and arms its probes again;
* a session that has the probes of the snapshot goes on, with the counts that the snapshot has.

Either way all calls that are made from then on must be counted, and in the end the text must be what it was, and the
log clean.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestVm, Snapshots
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.guests import environment, profile
from tests.support.places import spelled
from tests.support.wire import Wire
from tests.torture.report import conclude_rounds, round_arguments, run_rounds

CALLS = 1000
FUNCTION = ENTRY
PROBE = f"p:mine {FUNCTION}"
OTHERS = (f"p:other {FUNCTION}+behind", "p:inner __do_sys_getpriority", "p:open do_sys_openat2")
_MOMENT = 0.2
"""Seconds in which a stop or a resume is over."""


class Saved(StrEnum):
    """What the snapshot has."""

    BEFORE = "before the attach"
    SAME = "with the probes there are"
    OTHER = "with other probes"
    EARLIER = "of an earlier attach"


class Loaded(StrEnum):
    """When it is loaded."""

    RUNNING = "while the guest runs"
    RESUMING = "while gdb resumes it"
    STOPPED = "at gdb's prompt"
    BY_GDB = "by gdb's monitor command"


@dataclass(frozen=True, slots=True)
class Round:
    """What was done; *wrong* is empty when all is well."""

    saved: Saved
    at_prompt: bool
    loaded: Loaded
    went_on: bool
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        result = "FAILED" if self.wrong else "passed"
        where = "at the prompt" if self.at_prompt else "running"
        then = "went on" if self.went_on else "let go, attached again"
        return f"{result} saved {where} {self.saved}, loaded {self.loaded}: {then}, {self.seconds:.1f} s"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    round_arguments(parser, 16, "round trips")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    rounds, problems = run_rounds(options, "snapshots", lambda guest, chosen: SnapshotTorture(guest, chosen).rounds())
    return conclude_rounds(started, rounds, problems)


class SnapshotTorture:
    """One guest, and its snapshots."""

    def __init__(self, guest: GuestVm, chosen: random.Random) -> None:
        self._guest = guest
        self._random = chosen
        self._snapshots = Snapshots(guest)
        self._text = text_of(guest)
        self._touched: set[int] = set()

    def rounds(self) -> Iterator[Round]:
        """One after another, for ever."""
        for saved, loaded in itertools.cycle(itertools.product(Saved, Loaded)):
            yield self.round(saved, loaded)

    def round(self, saved: Saved, loaded: Loaded) -> Round:
        """Save, load, and see that all is well.

        :raises AssertionError: gdb or the guest does not do as it should.
        """
        started = time.monotonic()
        at_prompt = saved is not Saved.BEFORE and self._random.random() < 0.5
        wrong: list[str] = []
        with GdbMi(environment(self._guest)) as gdb:
            wire = Wire(gdb, self._guest.directory / "wire")
            if saved is Saved.BEFORE:
                self._snapshots.save("it")
            gdb.console(f"kprobe attach {profile(self._guest)}")
            count = self._prepare(gdb, saved, at_prompt)
            text = self._load(gdb, wire, loaded)
            said = self._notice(gdb, loaded)
            went_on = {probe["state"] for probe in gdb.command("-kprobe-list")["probes"]} == {"armed"}
            # What is loaded in the middle of a resume is of no use: some of that was written to it.
            if went_on != (saved is Saved.SAME) and not (saved is Saved.SAME and loaded is Loaded.RESUMING):
                wrong.append(f"the session {'went on' if went_on else 'let go'}")
            if not went_on:
                count = 0
                wrong += self._check_let_go(gdb, wire, loaded, text, said)
            wrong += self._check_counts(gdb, count)
            gdb.console("kprobe detach")
        self._snapshots.delete("it")
        wrong += self._guest.dmesg_problems() + self._text.leftovers(self._touched)
        return Round(saved, at_prompt, loaded, went_on, time.monotonic() - started, tuple(wrong))

    def _prepare(self, gdb: GdbMi, saved: Saved, at_prompt: bool) -> int:
        """Arm, and save if that was not done yet; the guest is stopped then. Returns the hits in the snapshot."""
        count = 0
        if saved is not Saved.BEFORE:
            self._add(gdb, PROBE if saved is Saved.SAME else self._random.choice(OTHERS))
            gdb.cont()
            count = self._call()
            if at_prompt:
                gdb.interrupt()
                self._snapshots.save("it")
            else:
                self._snapshots.save("it")
                gdb.interrupt()
        if saved is Saved.OTHER:
            gdb.console("kprobe delete all")
        elif saved is Saved.EARLIER:
            gdb.console("kprobe detach")
            gdb.console(f"kprobe attach {profile(self._guest)}")
        if saved is not Saved.SAME:
            self._add(gdb, PROBE)
        return count

    def _load(self, gdb: GdbMi, wire: Wire, loaded: Loaded) -> list[str]:
        """Load the snapshot; returns how the guest's text differs then, which is as in the snapshot."""
        if loaded in (Loaded.RUNNING, Loaded.RESUMING):
            gdb.cont()
            if loaded is Loaded.RUNNING:
                self._call()
            else:
                time.sleep(self._random.uniform(0, _MOMENT))
        wire.mark()
        if loaded is Loaded.BY_GDB:
            gdb.console("monitor loadvm it")
        else:
            self._snapshots.load("it")
        return self._text.leftovers()

    @staticmethod
    def _notice(gdb: GdbMi, loaded: Loaded) -> str:
        """Have the session look; returns all that gdb has said."""
        if loaded in (Loaded.RUNNING, Loaded.RESUMING):
            gdb.interrupt()
        elif loaded is Loaded.STOPPED:
            gdb.cont()
            gdb.interrupt()
        return "\n".join(gdb.transcript)

    def _check_let_go(self, gdb: GdbMi, wire: Wire, loaded: Loaded, text: list[str], said: str) -> list[str]:
        """Nothing was written, the user was told, and the probe can be armed again."""
        wrong: list[str] = []
        written = wire.writes()
        # In the middle of a resume gdb was writing: what of that came after the load must have been taken back.
        if written and loaded is not Loaded.RESUMING:
            wrong.append(f"gdb wrote after the load: {written[:5]}")
        if self._text.leftovers() != text and loaded is not Loaded.RESUMING:
            wrong.append(f"the text of the snapshot was changed: {set(self._text.leftovers()) ^ set(text)}")
        told = said.count("a snapshot with other probes was loaded") + said.count("the guest was reset")
        if told != 1:
            wrong.append(f"the user was told {told} times")
        gdb.console(f"kprobe attach {profile(self._guest)}")
        return wrong

    def _check_counts(self, gdb: GdbMi, count: int) -> list[str]:
        """Every call from now on is counted, on top of *count*."""
        before = self._hits(gdb)
        gdb.cont()
        made = self._call()
        gdb.interrupt()
        after = self._hits(gdb)
        wrong = [] if not count or before == count else [f"{before} hits in the snapshot, {count} when it was saved"]
        return wrong if after == before + made else [*wrong, f"{made} calls, {after - before} hits"]

    def _hits(self, gdb: GdbMi) -> int:
        (probe,) = gdb.command("-kprobe-list")["probes"]
        assert probe["state"] == "armed", probe
        assert probe["missed"] == "0", probe
        self._touch(probe)
        return int(probe["hits"])

    def _add(self, gdb: GdbMi, definition: str) -> None:
        gdb.console(f"set kprobe strategy {self._random.choice(('auto', 'boosted'))}")
        definition = spelled(self._text.guest, definition)
        self._touch(gdb.command(f'-kprobe-add "{definition}"')["probe"])

    def _touch(self, probe: dict[str, str]) -> None:
        addr = int(probe["addr"], 16)
        self._touched |= set(range(addr, addr + (5 if probe["rung"] == "optimized" else 1)))

    def _call(self) -> int:
        times = self._random.randrange(1, CALLS)
        self._guest.check_output(f"workload syscall {GETPRIORITY} {times}")
        return times
