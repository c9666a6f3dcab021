"""``gdb-kprobe demo``: what it is all for, on a real kernel, shown and checked.

A Debian guest boots; gdb attaches. An optimized probe counts a workload of exactly N system calls while the guest runs,
and what a hit costs is measured beside a gdb breakpoint at the same instruction. Then its hits are traced, and the
other rungs count. Everything is undone, and the guest's text compared with what it was. A figure that is not as it must
be ends the demo with an error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gdb_kprobe.model import Rung
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.spec import KERNEL_NAMES
from kprobe_guest.timed_calls import Took, timed_calls, us_of_a_tick

FCHOWNAT = 260
_ARGUMENTS = "-100 s:/ 1000 100 0"
_SHOWN = "dfd=-100 uid=1000 gid=100"
"""What a trace makes of them."""
PROBE = "p:{name} do_fchownat dfd=%di:s32 uid=%dx:u32 gid=%cx:u32"
"""``do_fchownat(dfd, filename, user, group, flag)``: nothing else in the guest calls it."""

ATTACH_USUAL = 3.0
"""Seconds from ``kprobe attach`` to the prompt, at most, on a machine that does nothing else."""
ADD_USUAL = 0.1
"""Seconds to add a probe, at most, on such a machine."""
CHEAP = 100
"""Calls that stop nothing, for each call that stops the machine."""
ROUNDS = 3
"""Runs without the probe and with it, in turn: their scatter is what a difference must exceed."""
LINES = 4
"""Hits that are traced."""
_CALIBRATION = 0.5
"""Seconds of the host's clock that are compared with the guest's."""
_TIMEOUT = 600


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument(
        "--calls", type=_calls, default=200, metavar="N",
        help=f"system calls where each hit stops the machine (200), and one in {CHEAP} where none does",
    )  # fmt: skip


def _calls(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of calls: 1 or more are needed")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Do the demo; returns the exit status."""
    kernel: str = options.kernel
    started = time.monotonic()
    print(f"Booting a guest ({kernel} kernel, {options.vcpus} vCPUs, KASLR on) ...", flush=True)
    with GuestVm(GuestSpec(kernel=kernel, vcpus=options.vcpus)) as guest:
        print(f"Up after {time.monotonic() - started:.1f} s.\n", flush=True)
        before = text_of(guest)
        with GdbMi({"KPROBE_GUEST": str(guest.directory)}) as gdb:
            demo = _Demo(gdb, guest, options.calls)
            demo.show()
        left = before.leftovers(demo.touched)
        print(f"Kernel text, {before.size} bytes compared: {left or 'identical'}")
        problems = guest.dmesg_problems()
        print(f"Guest log: {problems or 'clean'}")
    failures = [*demo.failures, *left, *problems]
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{'FAILED' if failures else 'All as it must be'}, in {time.monotonic() - started:.0f} s.")
    return 1 if failures else 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of a hit; *is_bound*: it costs less, by so much that runs alike differ."""

    us: float
    is_bound: bool = False

    @classmethod
    def of(cls, without: Sequence[float], with_probe: Sequence[float]) -> Cost:
        """What a hit adds to a call, by the microseconds of calls *without* the probe and *with_probe*."""
        difference = statistics.median(with_probe) - statistics.median(without)
        scatter = max(max(runs) - min(runs) for runs in (without, with_probe))
        return cls(max(difference, scatter), difference <= scatter)

    def __str__(self) -> str:
        return f"{'less than ' if self.is_bound else ''}{self.us:.{0 if self.us >= 100 else 2}f} us"


@dataclass(slots=True)
class _Demo:
    """The parts of the demo, in their order; *failures* is what was not as it must be.

    *calls*: how many are made where each hit stops the machine.
    """

    gdb: GdbMi
    guest: GuestVm
    calls: int
    touched: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    us_of_a_tick: float = 0.0

    def show(self) -> None:
        """Do it all: from the attach to the detach."""
        started = time.monotonic()
        self._type("kprobe attach debian")
        seconds = time.monotonic() - started
        print(f"From the command to the prompt: {seconds:.2f} s{_slow(seconds, ATTACH_USUAL)}.\n", flush=True)
        with self._calls() as call:
            self.us_of_a_tick = us_of_a_tick(call, _CALIBRATION)
        cost = self._count(Rung.OPTIMIZED)
        self._compare(cost)
        self._trace()
        self._type(f"kprobe delete {_name(Rung.OPTIMIZED)}")
        self._count(Rung.BOOSTED)
        self._type(f"kprobe delete {_name(Rung.BOOSTED)}")
        self._single_step()
        self._type("kprobe detach")

    # -- parts --------------------------------------------------------------------------------------------------

    def _count(self, rung: Rung) -> Cost:
        """Count calls on a *rung* where no hit stops the machine, and measure what a hit costs."""
        calls = self.calls * CHEAP
        self._add(rung)
        print("(gdb) continue &")
        with self._calls() as call:
            call(calls)
            print(f"[the guest makes {calls} calls of fchownat(), and runs on]")
            self._type("kprobe list")
        self._expect(rung, calls)
        us: dict[str, list[float]] = {"disable": [], "enable": []}
        for command in ("disable", "enable") * ROUNDS:
            self.gdb.console(f"kprobe {command} {_name(rung)}")
            with self._calls() as call:
                us[command].append(call(calls).ticks_of_a_call * self.us_of_a_tick)
        without, with_probe = us.values()
        cost = Cost.of(without, with_probe)
        print(
            f"{ROUNDS} times as many without the probe and with it, in turn: {statistics.median(without):.2f} and "
            f"{statistics.median(with_probe):.2f} us a call."
        )
        self._expect(rung, calls * (1 + ROUNDS), f", {cost} each.\n")
        return cost

    def _compare(self, cost: Cost) -> None:
        """Count with a gdb breakpoint at the same instruction; *cost* is that of a hit of the optimized probe."""
        print("The same instruction with a breakpoint of gdb, which only counts:")
        self.gdb.console(f"kprobe disable {_name(Rung.OPTIMIZED)}")
        self._type(f"break *{min(self.touched):#x}")
        self._type(f"ignore $bpnum {10 * self.calls}")
        us = self._us_of_a_stop()
        self._type("info breakpoints")
        hits = int(self.gdb.command("-break-info")["BreakpointTable"]["body"][0]["times"])
        self.gdb.console("delete")
        self.gdb.console(f"kprobe enable {_name(Rung.OPTIMIZED)}")
        print(
            f"gdb breakpoint: {hits} hits of {self.calls} calls, {us:.0f} us each: "
            f"{'more than' if cost.is_bound else 'about'} {_two_digits(us / cost.us):,} times what a hit of the "
            "optimized probe costs.\n"
            f"This machine is emulated ({_qemu(self.guest)}, without KVM): compare the figures with each other only.\n",
            flush=True,
        )
        # gdb steps over its breakpoint. Now and then QEMU executes nothing in a step, and gdb counts the hit again.
        if not self.calls <= hits <= self.calls * 1.05 + 1:
            self.failures.append(f"gdb breakpoint: {hits} hits of {self.calls} calls")

    def _trace(self) -> None:
        """Show hits of the optimized probe, which keeps its jump."""
        counted = int(self._probe(Rung.OPTIMIZED)["hits"])
        self._type(f"kprobe trace -n {LINES}")
        job = self.guest.spawn(f"workload syscall {FCHOWNAT} {LINES} {_ARGUMENTS}", timeout=_TIMEOUT)
        self.gdb.wait_stop(_TIMEOUT)
        lines = [line for line in self.gdb.output.splitlines() if f" {_name(Rung.OPTIMIZED)}: " in line]
        print("\n".join(lines))
        # gdb holds the guest at the last hit: let the workload end, and see that there is not one hit more.
        self.gdb.cont()
        status, output = self.guest.finish(job, timeout=_TIMEOUT)
        self.gdb.interrupt(_TIMEOUT)
        if status or f"{LINES} calls done" not in output:
            self.failures.append(f"trace: the workload has failed: {output.strip()}")
        if len(lines) != LINES or not all(line.endswith(_SHOWN) for line in lines):
            self.failures.append("trace: the lines are not those of the calls")
        self._expect(Rung.OPTIMIZED, counted + LINES)

    def _single_step(self) -> None:
        """Count calls on the rung where each hit stops the machine."""
        self._add(Rung.SINGLE_STEP)
        us = self._us_of_a_stop()
        self._type("kprobe list")
        self._expect(Rung.SINGLE_STEP, self.calls, f", {us:.0f} us each.\n")

    # -- steps --------------------------------------------------------------------------------------------------

    def _add(self, rung: Rung) -> None:
        """Add a probe on *rung*; of the optimized one, which needs no setting, show the plan before."""
        definition = PROBE.format(name=_name(rung))
        if rung is Rung.OPTIMIZED:
            self._type(f"kprobe plan {definition}")
        else:
            self._type(f"set kprobe strategy {rung}")
        started = time.monotonic()
        self._type(f"kprobe {definition}")
        seconds = time.monotonic() - started
        print(f"A probe was added in {seconds * 1000:.0f} ms{_slow(seconds, ADD_USUAL)}.")
        self.touched.add(int(self._probe(rung)["addr"], 16))

    def _expect(self, rung: Rung, calls: int, end: str = ".") -> None:
        """Say what the probe on *rung* has counted; it should be *calls*."""
        probe = self._probe(rung)
        print(f"{rung}: {probe['hits']} hits of {calls} calls, {probe['missed']} missed{end}", flush=True)
        if (probe["rung"], probe["hits"], probe["missed"]) != (rung, str(calls), "0"):
            self.failures.append(
                f"{rung}: not {calls} hits of {calls} calls, but {probe['hits']} and {probe['missed']} missed, "
                f"on the rung {probe['rung']}"
            )

    def _probe(self, rung: Rung) -> dict[str, str]:
        probes: list[dict[str, str]] = self.gdb.command("-kprobe-list")["probes"]
        return next(probe for probe in probes if probe["name"] == _name(rung))

    def _us_of_a_stop(self) -> float:
        """Make the calls where each hit stops the machine; returns the microseconds of one, with all that it takes."""
        print(f"(gdb) continue &\n[the guest makes {self.calls} calls of fchownat()]", flush=True)
        with self._calls() as call:
            nothing = call(0).seconds
            return (call(self.calls).seconds - nothing) / self.calls * 1e6

    @contextmanager
    def _calls(self) -> Iterator[Callable[[int], Took]]:
        """Let the guest run meanwhile; the function given has it make so many calls."""
        self.gdb.cont()
        with timed_calls(self.guest, f"workload timed {FCHOWNAT} - {_ARGUMENTS}", _TIMEOUT) as call:
            yield call
        self.gdb.interrupt(_TIMEOUT)

    def _type(self, command: str) -> None:
        """Run *command* and show it as the user would see it."""
        print(f"(gdb) {command}")
        output = self.gdb.console(command, timeout=_TIMEOUT).rstrip()
        if output:
            print(output)
        print(end="", flush=True)


def _name(rung: Rung) -> str:
    return rung.replace("-", "_")


def _slow(seconds: float, usual: float) -> str:
    """A remark on a time that says more of the machine than of the plugin."""
    return "" if seconds <= usual else f" (more than the usual {usual} s: the machine is slow, or busy)"


def _two_digits(number: float) -> int:
    """*number* as far as it is known."""
    return int(float(f"{number:.1e}"))


def _qemu(guest: GuestVm) -> str:
    version = guest.qmp("query-version")
    assert isinstance(version, dict)
    return f"QEMU {'.'.join(str(version['qemu'][part]) for part in ('major', 'minor', 'micro'))}"
