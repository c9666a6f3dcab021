"""``./install.sh torture kill9``: gdb is killed at a random moment, and the guest goes on as if nothing had happened.

A round arms probes and kills gdb (SIGKILL) in one of :class:`Phase`. Then one of :class:`After` is done. The guest must
be alive at the end of each, its log clean, its text what it was as soon as nobody probes it; and whoever has taken the
probes over must have counted every call that was made since they were armed, whoever was there then.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.patch import MAX_PATCH
from gdb_kprobe.language.spec import Location
from gdb_kprobe.render.text import table
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestVm
from tests.support.calls import BODY, ENTRY, GETPRIORITY
from tests.support.guests import environment, profile
from tests.support.places import behind_jump, entry, first_insns
from tests.torture.report import conclude_rounds, round_arguments, run_rounds

FUNCTION = ENTRY
PATTERN = "sched_*"
"""Many probes, to be killed among them."""
_ADD_MANY = f"kprobe add '{PATTERN}'"
_BODY = BODY
"""What FUNCTION calls, if the compiler has not put it in line."""
_HANDLER = "python import gdb_kprobe.gdbext.api as api; api.add('p:handled {at:#x}', pre=lambda hit: None)"
_STEPPED = 300
"""Calls whose hits gdb steps, in some seconds."""
_MOMENT = 0.05
"""Seconds in which the text of so many probes is written."""


class Phase(StrEnum):
    """When gdb is killed."""

    ARMING = "while it arms"
    ARMED = "while the guest runs"
    LOAD = "while probes are hit"
    STOPPING = "while it stops the guest"
    STOPPED = "at its prompt"
    RESUMING = "while it resumes the guest"
    DISARMING = "while it disarms"
    HANDLING = "while it handles hits"
    """Of a probe that needs it: the guest would stop at each, with nobody there."""


class After(StrEnum):
    """What is done then."""

    ALONE = "left alone"
    """A guest that is stopped gets a plain ``cont`` of QMP."""
    ADOPT = "adopted"
    RESTORE = "restored"


@dataclass(frozen=True, slots=True)
class Work:
    """What the guest does: calls at a time, and calls of a load during which gdb is killed.

    *strategies* are those of the probe that needs gdb, one of them by chance in each round.
    """

    calls: int = 10_000
    load: int = 200_000
    strategies: tuple[str, ...] = ("auto", "boosted", "single-step")


@dataclass(frozen=True, slots=True)
class Round:
    """What was done; *wrong* is empty when all is well."""

    phase: Phase
    ran_on: bool
    after: After
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        went = "ran on at once" if self.ran_on else "paused"
        result = "FAILED" if self.wrong else "passed"
        return f"{result} killed {self.phase}, {went}, {self.after}, {self.seconds:.1f} s"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    round_arguments(parser, 21, "kills")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    rounds, problems = run_rounds(options, "kills of gdb", lambda guest, chosen: Kill9(guest, chosen).rounds())
    print(summary(rounds))
    return conclude_rounds(started, rounds, problems)


def summary(rounds: list[Round]) -> str:
    """How it went, by phase."""
    columns = ("killed", "ran on at once", "paused, resumed", *After)
    lines = []
    for phase in Phase:
        of_phase = [one for one in rounds if one.phase is phase]
        ran_on = sum(one.ran_on for one in of_phase)
        afters = Counter(one.after for one in of_phase)
        lines.append((phase, *map(str, (ran_on, len(of_phase) - ran_on, *(afters[after] for after in After)))))
    return table(columns, lines)


class Kill9:
    """One guest, of which gdb after gdb is killed."""

    def __init__(self, guest: GuestVm, chosen: random.Random, work: Work | None = None) -> None:
        self._guest = guest
        self._work = work or Work()
        self._random = chosen
        self._text = text_of(guest)
        self._environment = environment(guest)
        self._profile = profile(guest)
        self._job: int | None = None
        self._calls = 0
        """Made since the probes were armed."""
        self._strategy = ""
        """Of the probe that needs gdb."""
        kernel = self._text.guest
        jump = kernel.resolve(Location(FUNCTION)).start + entry(kernel, FUNCTION)
        self._behind, self._handled = _others(kernel)
        addrs = [jump, self._behind, self._handled, *(place.addr for place in kernel.functions(PATTERN))]
        self._touched = {addr + byte for addr in addrs for byte in range(MAX_PATCH)}

    def rounds(self) -> Iterator[Round]:
        """One after another, for ever: each phase with each of what is done then."""
        for after, phase in itertools.cycle(itertools.product(After, Phase)):
            yield self.round(phase, after)

    def round(self, phase: Phase, after: After) -> Round:
        """Kill a gdb in *phase*, do *after*, and see that all is well.

        :raises AssertionError: the guest does not make its calls.
        """
        started = time.monotonic()
        wrong: list[str] = []
        self._kill(phase)
        if phase is Phase.HANDLING:
            self._finish()  # with nobody there to handle a hit
        ran_on = self._guest.is_running()
        if after is After.ADOPT:
            wrong += self._adopt(phase)
        else:
            if after is After.ALONE:
                if not ran_on:
                    self._guest.cont()
                self._call()
            self._restore()
            self._finish()
        self._call()
        self._guest.check()
        wrong += self._guest.dmesg_problems()
        wrong += self._text.leftovers(self._touched)
        return Round(phase, ran_on, after, time.monotonic() - started, tuple(wrong))

    def _kill(self, phase: Phase) -> None:
        """Have a gdb in *phase*, and kill it."""
        self._calls = 0
        adding, detaching = self._measured if phase in (Phase.ARMING, Phase.DISARMING) else (0.0, 0.0)
        with self._gdb() as gdb:
            # Without a watchdog the guest must live through it too, but where it waits for somebody to handle its hits.
            watchdog = phase is Phase.HANDLING or self._random.random() < 1 / 2
            gdb.console(f"set kprobe watchdog {'on' if watchdog else 'off'}")
            gdb.console(f"kprobe attach {self._profile}")
            self._arm(gdb)
            match phase:
                case Phase.ARMING:
                    gdb.start(_ADD_MANY)
                    self._wait(adding)
                case Phase.RESUMING:
                    gdb.console(_ADD_MANY)
                    gdb.start("continue&")
                    self._wait(_MOMENT)
                case Phase.STOPPING:
                    gdb.console(_ADD_MANY)
                    gdb.cont()
                    gdb.signal(signal.SIGINT)
                    self._wait(_MOMENT)
                case Phase.ARMED:
                    gdb.cont()
                    self._wait(0.2)
                case Phase.LOAD:
                    gdb.cont()
                    self._job = self._guest.spawn(_workload(self._work.load), timeout=60)
                    self._wait(0.5)
                case Phase.HANDLING:
                    self._strategy = self._random.choice(self._work.strategies)
                    gdb.console(f"set kprobe strategy {self._strategy}")
                    gdb.console(_HANDLER.format(at=self._handled))
                    gdb.cont()
                    self._job = self._guest.spawn(_workload(self._work.load), timeout=60)
                    self._wait(0.5)
                case Phase.STOPPED:
                    gdb.cont()
                    self._call()
                    gdb.interrupt()
                case Phase.DISARMING:
                    gdb.console(_ADD_MANY)
                    gdb.start("kprobe detach")
                    self._wait(detaching)
                case _:
                    assert_never(phase)
            gdb.signal(signal.SIGKILL)
            gdb.wait_exit()

    def _arm(self, gdb: GdbMi) -> None:
        """Probes that each call hits once, on both rungs of the guest's own, and one that is disabled."""
        gdb.console(f"kprobe add p:jump {FUNCTION}")
        gdb.console(f"kprobe add p:filtered {FUNCTION} if ip != 12345")
        gdb.console(f"kprobe add --disabled p:off {FUNCTION}")
        gdb.console("set kprobe strategy boosted")
        gdb.console(f"kprobe add p:trap {self._behind:#x}")
        # Jumps would need the text's branches read, which takes most of the time.

    @functools.cached_property
    def _measured(self) -> tuple[float, float]:
        """Seconds that it takes to arm many, and to detach."""
        with self._gdb() as gdb:
            gdb.console(f"kprobe attach {self._profile}")
            self._arm(gdb)
            seconds = []
            for command in (_ADD_MANY, "kprobe detach"):
                started = time.monotonic()
                gdb.console(command, timeout=60)
                seconds.append(time.monotonic() - started)
        return seconds[0], seconds[1]

    def _adopt(self, phase: Phase) -> list[str]:
        """Take the probes over, have them hit again, and detach; returns what is wrong with their counts."""
        wrong: list[str] = []
        with self._gdb() as gdb:
            gdb.console(f"kprobe adopt {self._profile}", timeout=60)
            gdb.cont()
            self._finish()
            # The probe that needs gdb keeps its rung: single-stepped, each call takes as long as hundreds of others.
            stepped = phase is Phase.HANDLING and self._strategy == "single-step"
            self._call(min(self._work.calls, _STEPPED) if stepped else None)
            probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list", timeout=60)["probes"]}
            expected = {"jump": self._calls, "filtered": self._calls, "trap": self._calls, "off": 0}
            # A detach that was through, or nearly, has forgotten all of them.
            if probes or phase is not Phase.DISARMING:
                found = {name: int(probes[name]["hits"]) for name in expected if name in probes}
                if found != expected:
                    wrong.append(f"counted {found}, not {expected}")
                wrong += [
                    f"{name} missed {probe['missed']}"
                    for name, probe in probes.items()
                    if name != "handled" and probe["missed"] != "0"
                ]
                if phase is Phase.HANDLING:
                    handled = probes["handled"]
                    passed = int(handled["hits"]) + int(handled["missed"])
                    # One that gdb had counted, and was not through with, is taken again. What only gdb can step is not
                    # probed without it.
                    least = 0 if self._strategy == "single-step" else self._calls
                    if not least <= passed <= self._calls + 1:
                        wrong.append(f"{handled['hits']} handled, {handled['missed']} missed of {self._calls}")
                if probes.get("off", {}).get("state") != "disabled":
                    wrong.append(f"off is {probes.get('off')}")
            gdb.interrupt()
            gdb.console("kprobe detach", timeout=60)
        return wrong

    def _restore(self) -> None:
        """As one does without a gdb: ``gdb-kprobe restore``."""
        command = [sys.executable, "-m", "gdb_kprobe.launcher.cli", "restore", self._profile]
        environment = {**os.environ, **self._environment}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=60)
        output = (done.stdout + done.stderr).decode()
        assert (done.returncode, "Detached; the guest runs." in output) == (0, True), output

    def _gdb(self) -> GdbMi:
        return GdbMi(self._environment)

    def _call(self, calls: int | None = None) -> None:
        """Make the calls, or *calls* of them; the guest is alive."""
        calls = self._work.calls if calls is None else calls
        output = self._guest.check_output(_workload(calls), timeout=60)
        assert output.startswith(f"workload: {calls} calls done"), output
        self._calls += calls

    def _finish(self) -> None:
        """Have the load come to its end, if there is one."""
        if self._job is not None:
            status, output = self._guest.finish(self._job, timeout=60)
            assert (status, output.startswith(f"workload: {self._work.load} calls done")) == (0, True), output
            self._calls += self._work.load
            self._job = None

    def _wait(self, most: float) -> None:
        time.sleep(self._random.uniform(0, most))


def _others(kernel: LinuxGuest) -> tuple[int, int]:
    """Two more places that each call comes to: behind the jump of a probe on the function, and one for a handler."""
    behind = kernel.resolve(Location(FUNCTION)).start + behind_jump(kernel, FUNCTION)
    body = kernel.kallsyms.find(_BODY)
    if body is None:
        body = next(insn.addr for insn in first_insns(kernel, FUNCTION) if insn.addr > behind)
    return behind, body


def _workload(calls: int) -> str:
    return f"workload syscall {GETPRIORITY} {calls}"
