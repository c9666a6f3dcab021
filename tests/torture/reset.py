"""``./install.sh torture reset``: the guest is reset under a session, and boots another kernel image than it knows.

A round attaches, arms probes, and has the guest reset in one of :class:`How`. The session looks at it in one of
:class:`When`, and must not write a byte: neither to memory nor to a register, which is seen in gdb's log of its
connection, and in the region, whose memory a reset leaves as it was (unless it was borrowed). When the guest is up, the
next attach arms the definitions again; every call that is made then must be counted, and in the end the text must be
that of the new boot, and the log clean.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from gdb_kprobe.model import PhysAddr
from gdb_kprobe.region.directory import Kind, read_directory
from gdb_kprobe.region.header import read_header
from gdb_kprobe.testing import GdbCommandError, GdbMi, TextSnapshot
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam, text_of
from kprobe_guest import GuestVm
from kprobe_guest.spec import MIB
from tests.support.calls import ENTRY, GETPRIORITY
from tests.support.guests import environment, profile
from tests.support.places import spelled
from tests.support.wire import Wire
from tests.torture.report import conclude_rounds, round_arguments, run_rounds

CALLS = 1000
FUNCTION = ENTRY
PROBES = ((f"p:jump {FUNCTION}", "auto"), (f"p:int3 {FUNCTION}+behind", "boosted"), ("p:open do_sys_openat2", "auto"))
_TIMEOUT = 60
_READY = "/tmp/ready-to-reset"
_DELAY = 3
"""Seconds in which the guest has told that it is ready."""
_BOOT = 3.0
"""Seconds that a boot takes, more or less."""


class How(StrEnum):
    """Who resets the guest, and what it does then."""

    RUNNING = "by QMP while it runs"
    STOPPED = "by QMP at gdb's prompt"
    BY_GDB = "by gdb's monitor command"
    ITSELF = "by itself"


class When(StrEnum):
    """When the session looks."""

    AT_ONCE = "at once"
    BOOTING = "while it boots"
    UP = "when it is up"
    LEAVING = "as gdb quits"


@dataclass(frozen=True, slots=True)
class Round:
    """What was done; *wrong* is empty when all is well."""

    how: How
    when: When
    dispatch: str
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        result = "FAILED" if self.wrong else "passed"
        return f"{result} reset {self.how}, seen {self.when}, dispatched by {self.dispatch}, {self.seconds:.1f} s"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    round_arguments(parser, 16, "resets")
    parser.add_argument("--append", action="append", default=[], metavar="WORD", help="for the kernel's command line")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    rounds, problems = run_rounds(
        options, "resets", lambda guest, chosen: ResetTorture(guest, chosen).rounds(), options.append
    )
    return conclude_rounds(started, rounds, problems)


class ResetTorture:
    """One guest, that is reset again and again."""

    def __init__(self, guest: GuestVm, chosen: random.Random) -> None:
        self._guest = guest
        self._random = chosen
        kernel = text_of(guest).guest
        self._definitions = tuple((spelled(kernel, definition), strategy) for definition, strategy in PROBES)

    def rounds(self) -> Iterator[Round]:
        """One after another, for ever."""
        for when, how in itertools.cycle(itertools.product(When, How)):
            yield self.round(how, when)

    def round(self, how: How, when: When) -> Round:
        """Reset the guest, and see that all is well.

        :raises AssertionError: gdb or the guest does not do as it should.
        """
        started = time.monotonic()
        dispatch = self._random.choice(("guest", "guest", "stub"))
        wrong: list[str] = []
        with self._gdb() as gdb:
            wire = Wire(gdb, self._guest.directory / "wire")
            gdb.console(f"kprobe attach --dispatch {dispatch} {profile(self._guest)}")
            self._add(gdb)
            runs = how in (How.RUNNING, How.ITSELF)
            if runs:
                gdb.cont()
                self._call()
            if how is How.ITSELF:
                self._prepare_to_reset_itself()
            wire.mark()
            before = self._region()
            self._reset(gdb, how)
            self._look(gdb, when, runs=runs)
            written = wire.writes()
            if when is not When.LEAVING:
                states = {probe["state"] for probe in gdb.command("-kprobe-list")["probes"]}
                if states != {"pending"}:
                    wrong.append(f"the probes are {states}")
                gdb.console("detach")  # the guest runs; the definitions stay in gdb
                if when is not When.UP:
                    self._guest.wait_ready()
                wrong += self._again(gdb, written, before)
            else:
                gdb.close()
        if when is When.LEAVING:
            self._guest.wait_ready()
            written = wire.writes()
            with self._gdb() as gdb:
                self._note(gdb)
                wrong += self._again(gdb, written, before)
        return Round(how, when, dispatch, time.monotonic() - started, tuple(wrong))

    def _again(self, gdb: GdbMi, written: list[str], before: bytes) -> list[str]:
        """Nothing was written to the boot that is up now; probes are armed in it, and count."""
        wrong = [f"gdb wrote after the reset: {written[:5]}"] if written else []
        if self._region() != before:
            wrong.append("the region is not what it was")
        text = TextSnapshot(GuestMonitor(self._guest), GuestRam(self._guest))
        said = gdb.console(f"kprobe attach {profile(self._guest)}")
        if self._guest.spec.reserved_base is not None and "earlier boot; it was cleared" not in said:
            wrong.append("the attach does not tell of the earlier boot")
        probes = self._probes(gdb)
        first = {name: int(probe["hits"]) for name, probe in probes.items()}
        touched = {int(probe["addr"], 16) + byte for probe in probes.values() for byte in range(5)}
        gdb.cont()
        made = self._call()
        gdb.interrupt()
        for name, probe in self._probes(gdb).items():
            if name != "open" and int(probe["hits"]) - first[name] != made:
                wrong.append(f"{made} calls, {probe['hits']} - {first[name]} hits of {name}")
        gdb.console("kprobe detach")
        return wrong + self._guest.dmesg_problems() + text.leftovers(touched)

    def _prepare_to_reset_itself(self) -> None:
        """In a moment it will, without another call that is probed: a hit that the stub handles is written, too."""
        self._guest.spawn(f"exec 3>/proc/sysrq-trigger; touch {_READY}; sleep {_DELAY}; echo b >&3")
        self._guest.check_output(f"while [ ! -e {_READY} ]; do sleep 0.1; done")

    def _reset(self, gdb: GdbMi, how: How) -> None:
        if how is How.BY_GDB:
            self._guest.expect_reset()
            gdb.console("monitor system_reset")
        elif how is How.ITSELF:
            self._guest.expect_reset()
            tables = self._idt()
            deadline = time.monotonic() + _TIMEOUT
            while self._idt() == tables:
                assert time.monotonic() < deadline, "the guest does not reset itself"
        else:
            self._guest.reset(wait=False)

    def _look(self, gdb: GdbMi, when: When, *, runs: bool) -> None:
        """Have the session look at the guest, which stays stopped then (but for :attr:`When.LEAVING`)."""
        if not runs and when in (When.BOOTING, When.UP):
            gdb.cont()
            runs = True
        if when is When.BOOTING:
            time.sleep(self._random.uniform(0, _BOOT))
        elif when is When.UP:
            self._guest.wait_ready()
        if when is When.LEAVING:
            return
        if runs and _is_noticed(gdb):
            # Without a session Ctrl-C is gdb's, which ignores it while the guest runs in the background.
            gdb.command("-exec-interrupt")
            gdb.wait_stop()
        elif runs:
            gdb.interrupt()
        # A reset that has not happened yet is not to be seen.
        deadline = time.monotonic() + _TIMEOUT
        while not _is_noticed(gdb):
            assert time.monotonic() < deadline, "the reset is not noticed"
            if runs:
                gdb.cont()
                time.sleep(0.1)
                gdb.interrupt()
            else:
                with contextlib.suppress(GdbCommandError):
                    gdb.console("kprobe plan vfs_read")

    def _idt(self) -> str:
        """Where the first vCPU's interrupt descriptor table is: at another place once it was reset."""
        return next(line for line in self._guest.hmp("info registers").splitlines() if line.startswith("IDT="))

    def _region(self) -> bytes:
        """The region, but for what the guest itself writes until it is reset: counters, accessed bits of its tables.

        Empty where the memory was borrowed: it is the next boot's.
        """
        spec = self._guest.spec
        if spec.reserved_base is None:
            return b""
        base = spec.reserved_base
        data = bytearray(self._guest.read_ram(base, spec.region_mb * MIB))
        ram = GuestRam(self._guest)
        header = read_header(ram, PhysAddr(base))
        if header is None:
            return bytes(data)
        for found in read_directory(ram, header):
            if found.kind == Kind.COUNTERS:
                data[found.start : found.end] = bytes(found.size)
        return bytes(data[: header.layout.end])

    def _gdb(self) -> GdbMi:
        return GdbMi(environment(self._guest))

    def _add(self, gdb: GdbMi) -> None:
        for definition, strategy in self._definitions:
            gdb.console(f"set kprobe strategy {strategy}")
            gdb.console(f"kprobe add {definition}")

    _note = _add

    @staticmethod
    def _probes(gdb: GdbMi) -> dict[str, dict[str, str]]:
        probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list")["probes"]}
        assert len(probes) == len(PROBES), probes
        assert all((probe["state"], probe["missed"]) == ("armed", "0") for probe in probes.values()), probes
        return probes

    def _call(self) -> int:
        times = self._random.randrange(1, CALLS)
        self._guest.check_output(f"workload syscall {GETPRIORITY} {times}")
        return times


def _is_noticed(gdb: GdbMi) -> bool:
    return "the guest was reset" in "\n".join(gdb.transcript)
