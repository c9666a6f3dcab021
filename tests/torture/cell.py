"""One cell of the matrix: probes on one kind of guest, against a known number of calls.

It attaches, puts a probe on every rung and one with a condition, has calls made on every vCPU, compares the counts, and
detaches. Text and log of the guest must be as before. What it may do then: :mod:`tests.torture.acts`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdb_kprobe.config.installation import CONFIGS
from gdb_kprobe.errors import KprobeError, ReportedError
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import AddressRange, VirtAddr, offset
from gdb_kprobe.testing import GdbCommandError, GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestSpec, GuestVm, nesting
from kprobe_guest.boot_files import boot_files
from kprobe_guest.build.debug_info import fetch_debug_info
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.errors import BuildError
from kprobe_guest.spec import KERNEL_NAMES
from tests.support.command import python_words
from tests.support.guests import environment, profile
from tests.support.places import behind_jump, first_insns
from tests.torture import acts
from tests.torture.acts import FCHOWNAT, INNER
from tests.torture.report import FAILURES

OUTER = "__x64_sys_fchownat"
"""What calls INNER, with its arguments in registers. No compiler inlines INNER: three system calls call it."""
CALLS, OF_ONE = 20, 7
"""Calls on each vCPU that give a file to user 0, and to user 1."""
_TIMEOUT = 120
_NESTED_TIMEOUT, _NESTED_ACT_TIMEOUT = 1800, 150
"""Seconds for a cell where KVM is emulated, and for each act: several times what they take on an idle machine."""
_NESTED_FIRST = 300
"""Seconds within which the guest there is up, which a cell with acts says first."""
CANNOT_BE_RUN = 77
"""Exit status of a cell whose kernel cannot be had here; that of a skipped test in automake."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of guest. *after* are commands of gdb right behind the attach; *debug_info*: gdb is given it there.

    *acts* is what is done beyond counting.
    """

    spec: GuestSpec
    after: tuple[str, ...] = ()
    debug_info: bool = False
    acts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell: its times, the rungs, the hits; *wrong* is empty if all is well."""

    times: Times | None = None
    rungs: tuple[str, ...] = ()
    hits: int = 0
    wrong: tuple[str, ...] = ()
    release: str = ""
    acts: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        return "FAILED" if self.wrong else "passed"

    def __str__(self) -> str:
        if self.wrong:
            return "; ".join(_one_line(problem) for problem in self.wrong)
        attach, add, read = self.times.columns() if self.times else ("", "", "")
        done = f"; {', '.join(self.acts)}" if self.acts else ""
        return f"{', '.join(self.rungs)}; {self.hits} hits; attach {attach} s, add {add} ms, read {read} ms{done}"


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: of the attach, of adding a first probe, of reading the counts while the guest runs (if that can be)."""

    attach: float
    add: float
    read: float | None

    def columns(self) -> tuple[str, str, str]:
        """For the table: seconds, and milliseconds."""
        return f"{self.attach:.2f}", f"{self.add * 1e3:.1f}", "-" if self.read is None else f"{self.read * 1e3:.1f}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument(
        "--modules", type=Path, metavar="DIR", help="/lib/modules/RELEASE of a kernel given by its path"
    )
    parser.add_argument("--vcpus", type=int, default=1, metavar="N")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--cpu", choices=["max", "default"], default="max")
    parser.add_argument("--machine", choices=["q35", "pc"], default="q35")
    parser.add_argument("--region", choices=["reserved", "ivshmem", "none"], default="reserved")
    parser.add_argument("--private-ram", action="store_true", help="no file that the host shares with the guest")
    parser.add_argument("--tcp", action="store_true", help="the gdbstub listens at a TCP port")
    parser.add_argument("--no-kaslr", action="store_true")
    parser.add_argument("--accelerator", choices=["tcg", "kvm"], default="tcg", help="kvm needs /dev/kvm")
    parser.add_argument("--tcg-thread", choices=["multi", "single"], default="multi")
    parser.add_argument("--append", default="", metavar="WORDS", help="more words for the kernel's command line")
    parser.add_argument(
        "--also", default="", metavar="ACTS", help=f"what to do beyond counting: all, or some of {','.join(acts.ALL)}"
    )
    parser.add_argument("--nested", action="store_true", help="where there is no /dev/kvm, have QEMU emulate one")
    parser.add_argument("--qemu", default="", metavar="WORDS", help="more words for QEMU's command line")


def run(options: argparse.Namespace) -> int:
    """Do it, and print one line, of which the first word is the result; returns the exit status."""
    spec = GuestSpec(
        kernel=options.kernel,
        modules=options.modules,
        vcpus=options.vcpus,
        memory_mb=options.memory,
        cpu=options.cpu,
        machine=options.machine,
        region=options.region,
        shared_ram=not options.private_ram,
        gdb="tcp" if options.tcp else "unix",
        kaslr=not options.no_kaslr,
        accelerator=options.accelerator,
        tcg_thread=options.tcg_thread,
        extra_cmdline=tuple(options.append.split()),
        extra_args=tuple(shlex.split(options.qemu)),
    )
    chosen = acts.ALL if options.also == "all" else tuple(filter(None, options.also.split(",")))
    if unknown := [act for act in chosen if act not in acts.ALL]:
        raise KprobeError(f"--also: there is no act {', '.join(unknown)}", f"there are all, {', '.join(acts.ALL)}")
    try:
        boot_files(spec)
        lacking = nesting.what_kvm_lacks() if spec.accelerator == "kvm" else None
        if lacking is not None and not options.nested:
            raise BuildError(f"{lacking}; with --nested KVM is emulated")
        if lacking is not None:
            nesting.prepare()
    except BuildError as error:
        print(f"skipped ({spec.describe()}): {_one_line(error)}", flush=True)
        return CANNOT_BE_RUN
    if lacking is not None:
        return _run_nested(options.words, len(chosen))
    outcome = run_cell(Cell(spec, acts=chosen))
    print(f"{outcome.result} {outcome.release or '?'} ({spec.describe()}): {outcome}", flush=True)
    return 1 if outcome.wrong else 0


def _run_nested(words: Sequence[str], acts_to_do: int) -> int:
    """Run this very command, *words*, where there is KVM; returns its status."""
    try:
        return nesting.run_nested(
            [sys.executable, *python_words("torture", *words)],
            lambda line: print(line, flush=True),
            timeout=_NESTED_TIMEOUT + acts_to_do * _NESTED_ACT_TIMEOUT,
            first=_NESTED_FIRST if acts_to_do else None,
        )
    except FAILURES as error:
        print(f"FAILED ? (nested): {_one_line(error)}", flush=True)
        return 1


def run_cell(cell: Cell) -> Outcome:
    """Boot the guest of *cell* and run it; whatever goes wrong is in the outcome.

    :raises KeyboardInterrupt: of the user's.
    """
    try:
        started = time.monotonic()
        with GuestVm(cell.spec) as guest:
            if cell.acts:
                print(f"the guest is up after {time.monotonic() - started:.0f} s", flush=True)
            return check(guest, cell)
    except FAILURES as error:
        return Outcome(wrong=(str(error),))
    except (ReportedError, OSError, ValueError, LookupError) as error:
        # A mistake of ours is one cell's failure, and not the end of the others.
        return Outcome(wrong=(f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-4:]))


def check(guest: GuestVm, cell: Cell) -> Outcome:
    """Run *cell* on *guest*, which is of its kind; the guest is as before then.

    :raises GdbCommandError: gdb refuses what it is told.
    """
    text = text_of(guest)
    places = dict(_places(text.guest))
    release = text.guest.release  # now: a reset puts the kernel somewhere else
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, GdbMi(environment(guest)) as gdb:
        attach = _timed(gdb, f"kprobe attach {profile_of(guest, Path(directory))}")
        vmlinux = _vmlinux(guest) if cell.debug_info else None
        for command in cell.after:
            gdb.console(command.format(inner=places["step"], idle=places["idle"], vmlinux=vmlinux), timeout=_TIMEOUT)
        if vmlinux is not None and gdb.evaluate(f"&{OUTER}") != _function(text.guest, OUTER).start:
            return Outcome(wrong=(f"{vmlinux} is not at the guest's addresses",))
        add = 0.0
        for name, strategy in (("jump", "auto"), ("trap", "boosted"), ("step", "single-step"), ("one", "auto")):
            gdb.console(f"set kprobe strategy {strategy}")
            condition = " if u32(dx) == 1" if name == "one" else ""
            seconds = _timed(gdb, f"kprobe p:{name} {places[name]:#x}{condition}")
            add = add or seconds
        gdb.cont()
        calls = [
            f"workload syscall {FCHOWNAT} {times} -100 s:/ {user} 0 0" for user, times in ((1, OF_ONE), (0, CALLS))
        ]
        guest.check_output(" & ".join([" && ".join(calls)] * guest.spec.vcpus) + " & wait", timeout=_TIMEOUT)
        try:
            read = _timed(gdb, "kprobe stats")
        except GdbCommandError:
            if guest.spec.shared_ram or guest.spec.region == "none":
                raise
            read = None  # the profile says that nothing is to be shared
        gdb.interrupt()
        probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list")["probes"]}
        wrong: list[str] = []
        if cell.acts:
            print(f"counted after {time.monotonic() - started:.0f} s", flush=True)
        if any(act in cell.acts for act in acts.IN_SESSION):
            gdb.console("kprobe delete all", timeout=_TIMEOUT)
            wrong += acts.in_session(cell.acts, acts.Stage(guest, gdb, text.guest))
        done = gdb.command("-kprobe-detach", timeout=_TIMEOUT)
    every = (CALLS + OF_ONE) * guest.spec.vcpus
    expected = {"jump": every, "trap": every, "step": every, "one": OF_ONE * guest.spec.vcpus}
    found = {name: int(probe["hits"]) for name, probe in probes.items()}
    wrong += [] if found == expected else [f"counted {found}, not {expected}"]
    wrong += [f"{name} missed {probe['missed']}" for name, probe in probes.items() if probe["missed"] != "0"]
    wrong += [f"detach: {problem}" for problem in done["problems"]]
    wrong += guest.dmesg_problems()
    wrong += text.leftovers(addr + byte for addr in places.values() for byte in range(JUMP_SIZE))
    wrong += acts.of_their_own(cell.acts, guest)
    rungs = tuple(dict.fromkeys(probe["rung"] for probe in probes.values()))
    times = Times(attach, add, read)
    return Outcome(times, rungs, sum(found.values()), tuple(wrong), release, cell.acts)


def _timed(gdb: GdbMi, command: str) -> float:
    """Seconds that a command of gdb takes."""
    started = time.monotonic()
    gdb.console(command, timeout=_TIMEOUT)
    return time.monotonic() - started


def _vmlinux(guest: GuestVm) -> Path:
    assert guest.spec.kernel != "bare"
    return fetch_debug_info(find_kernel(guest.spec.kernel))


def profile_of(guest: GuestVm, directory: Path) -> Path:
    """Write the profile in configs/ for the guest's region, with the address and the memory of this very guest."""
    text = (CONFIGS / f"{profile(guest)}.yaml").read_text()
    text = text.replace("${KPROBE_GUEST}/gdb", guest.gdb_address)
    if guest.spec.reserved_base is not None:
        text = text.replace("physical: 0x10000000", f"physical: {guest.spec.reserved_base:#x}")
    if not guest.spec.shared_ram:
        text = text.replace("shared_memory: auto", "shared_memory: off")
    path = directory / "profile.yaml"
    path.write_text(text)
    return path


def _places(kernel: LinuxGuest) -> Iterator[tuple[str, VirtAddr]]:
    """Where the probes are put: a function's entry and what is behind the jump there; the first instructions."""
    yield "jump", _function(kernel, OUTER).start
    yield "trap", offset(_function(kernel, OUTER).start, behind_jump(kernel, OUTER))
    inner = first_insns(kernel, INNER)
    yield "step", next(inner).addr
    yield "one", next(inner).addr
    yield "idle", _function(kernel, "__x64_sys_setpriority").start


def _function(kernel: LinuxGuest, symbol: str) -> AddressRange:
    place = kernel.resolve(Location(symbol))
    return AddressRange(place.start, place.end)


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())
