"""What a cell does beyond counting, each act against a known number of calls: the same on each accelerator.

Those of :data:`IN_SESSION` are done by one gdb, which is attached, those of :data:`OF_THEIR_OWN` begin and end without
one. Each leaves the guest as it found it, and returns what is wrong.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.x86.decode import iter_insns
from kprobe_guest import GuestVm
from kprobe_guest.patience import patient
from tests.support.places import first_insns
from tests.torture.kill9 import After, Kill9, Phase, Work
from tests.torture.reset import How, ResetTorture, When
from tests.torture.snapshot import Loaded, Saved, SnapshotTorture

FCHOWNAT = 260
"""A system call that nothing else in the guest makes."""
INNER = "do_fchownat"
SCHED_SETATTR = 314
"""``sched_setattr(pid, attr, flags)`` reads ``attr->size`` by ``get_user``, in ``__get_user_4``."""
_SAME_USER = 0xFFFF_FFFF
"""``fchownat(..., -1, ...)`` leaves the owner as it is."""
_UNMAPPED = 0x10_0000
_EFAULT = -14
_TRACED = 5
_CALLS = 8
"""Of each vCPU, where each of them stops the machine."""
_TIMEOUT = 120
_INTERRUPTS = 3
"""Stops by Ctrl-C that must come among hits."""
_MOMENT = 0.05
"""Seconds in which there are some hits."""
_STEPPED = Work(calls=20, load=500, strategies=("single-step",))
"""Each call is stepped by gdb, while there is one."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A guest, and a gdb that is attached to it, with no probe; the guest is stopped before and after each act."""

    guest: GuestVm
    gdb: GdbMi
    kernel: LinuxGuest

    @property
    def entry(self) -> VirtAddr:
        """The first instruction that each call of FCHOWNAT executes in INNER."""
        return next(first_insns(self.kernel, INNER)).addr

    @property
    def fixed_up(self) -> VirtAddr:
        """The instruction of ``__get_user_4`` whose fault the kernel fixes up."""
        start = VirtAddr(self.kernel.kallsyms.address("__get_user_4"))
        insns = iter_insns(self.kernel.memory.read(start, 64), start)
        return next(insn.addr for insn in insns if self.kernel.fixup_of(insn.addr))

    def call(self, command: str) -> list[str]:
        """Run *command*, which prints one line, on all vCPUs at once; returns the line of each."""
        words = " & ".join([command] * self.guest.spec.vcpus)
        return self.guest.check_output(f"{words} & wait", timeout=_TIMEOUT).splitlines()

    def probes(self) -> dict[str, tuple[int, int, str]]:
        """Hits, misses and rung by name."""
        probes = self.gdb.command("-kprobe-list", timeout=_TIMEOUT)["probes"]
        return {probe["name"]: (int(probe["hits"]), int(probe["missed"]), probe["rung"]) for probe in probes}


def in_session(names: Collection[str], stage: Stage) -> list[str]:
    """Do those acts of *names* that one gdb does; returns what is wrong, with the act's name."""
    wrong = []
    for name, act in IN_SESSION.items():
        if name in names:
            wrong += _told(name, functools.partial(act, stage))
            stage.gdb.console("kprobe delete all", timeout=_TIMEOUT)
    return wrong


def of_their_own(names: Collection[str], guest: GuestVm) -> list[str]:
    """Do those acts of *names* that begin without a gdb; returns what is wrong, with the act's name."""
    wrong = []
    for name, act in OF_THEIR_OWN.items():
        if name in names:
            wrong += _told(name, functools.partial(act, guest))
    return wrong


def _told(name: str, act: Callable[[], Iterable[str]]) -> list[str]:
    """Do an act, and tell how long it took: some take long, where everything does."""
    started = time.monotonic()
    wrong = [f"{name}: {problem}" for problem in act()]
    print(f"{name}: {'FAILED' if wrong else 'passed'}, {time.monotonic() - started:.0f} s", flush=True)
    return wrong


def _trace(stage: Stage) -> Iterable[str]:
    """``kprobe trace -n N`` stops at the N-th hit; what is called then is counted."""
    gdb = stage.gdb
    gdb.console("set kprobe strategy auto")
    gdb.console(f"kprobe p:traced {stage.entry:#x} user=%dx:u32", timeout=_TIMEOUT)
    gdb.console(f"kprobe trace -n {_TRACED}", timeout=_TIMEOUT)  # over MI it returns while the guest runs
    calls = f"workload syscall {FCHOWNAT} {_CALLS} -100 s:/ 0 0 0"
    begin = len(gdb.transcript)
    jobs = [stage.guest.spawn(calls, wait=False) for _ in range(stage.guest.spec.vcpus)]
    gdb.wait_stop(_TIMEOUT)
    gdb.command("-kprobe-list", timeout=_TIMEOUT)  # what was printed at the stop is read by now
    lines = sum("traced: (" in line for line in gdb.transcript[begin:])
    if lines != _TRACED:
        yield f"{lines} lines of {_TRACED} hits"
    # Another vCPU that has come to the gate by then has its hit counted too, when the machine is settled.
    hits, missed, _ = stage.probes()["traced"]
    if not _TRACED <= hits < _TRACED + stage.guest.spec.vcpus or missed:
        yield f"stopped at {hits} hits and {missed} misses, not at {_TRACED} and 0"
    gdb.cont()
    for job in jobs:
        stage.guest.finish(job, timeout=_TIMEOUT)
    gdb.interrupt(_TIMEOUT)
    yield from _differ(stage, {"traced": _CALLS * stage.guest.spec.vcpus})


def _handler(stage: Stage) -> Iterable[str]:
    """A handler in Python sees each hit, with its registers."""
    gdb, vcpus = stage.gdb, stage.guest.spec.vcpus
    add = f"api.add('p:handled {stage.entry:#x}', pre=lambda hit: seen.append(hit.regs.dx & 0xffffffff) and None)"
    gdb.console(f"python import gdb_kprobe.gdbext.api as api; seen = []; {add}", timeout=_TIMEOUT)
    gdb.cont()
    stage.call(f"workload syscall {FCHOWNAT} {_CALLS} -100 s:/ -1 0 0")
    gdb.interrupt(_TIMEOUT)
    said = gdb.console("python print('seen', len(seen), set(seen))").strip()
    if said != f"seen {_CALLS * vcpus} {{{_SAME_USER}}}":
        yield f"the handler has {said}, not {_CALLS * vcpus} times user {_SAME_USER}"
    yield from _differ(stage, {"handled": _CALLS * vcpus})


def _fault(stage: Stage) -> Iterable[str]:
    """An instruction of the exception table, single-stepped, faults: the call fails as it should, and is one hit."""
    gdb, vcpus = stage.gdb, stage.guest.spec.vcpus
    gdb.console(f"kprobe p:faulting {stage.fixed_up:#x} if ax == {_UNMAPPED:#x}", timeout=_TIMEOUT)
    gdb.cont()
    said = stage.call(f"workload syscall {SCHED_SETATTR} {_CALLS} 0 {_UNMAPPED} 0")
    gdb.interrupt(_TIMEOUT)
    if said != [f"workload: {_CALLS} calls done, last result {_EFAULT}"] * vcpus:
        yield f"the guest's calls: {said}"
    if (rung := stage.probes()["faulting"][2]) != "single-step":
        yield f"it is {rung}"
    yield from _differ(stage, {"faulting": _CALLS * vcpus})


def _interrupt(stage: Stage) -> Iterable[str]:
    """Ctrl-C, while hits that gdb handles leave it hardly a moment, stops the guest at an address of its own."""
    gdb, guest = stage.gdb, stage.guest
    gdb.console("set kprobe strategy boosted")
    gdb.console("python import gdb_kprobe.gdbext.api as api")
    gdb.console(f"python api.add('p:busy {stage.entry:#x}', pre=lambda hit: None)", timeout=_TIMEOUT)
    calls = f"workload syscall {FCHOWNAT} -1 -100 s:/ 0 0 0"
    # With hits all the time the guest comes to little else: nothing else is asked of it until the probe is gone.
    job = guest.spawn(" & ".join([calls] * guest.spec.vcpus), wait=False)
    hits, stops, deadline = 0, 0, time.monotonic() + patient(_TIMEOUT)
    while not (hits and stops >= _INTERRUPTS):
        gdb.cont()
        time.sleep(patient(_MOMENT))
        stop = gdb.interrupt(_TIMEOUT)
        # By the interrupt byte, or, where hits leave it no moment, at the next hit.
        if stop.get("signal-name") != "SIGINT" and stop.get("reason") != "breakpoint-hit":
            yield f"the stop is {stop}"
        pc = gdb.pc
        if pc >> 47 and not any(pc in text for text in stage.kernel.text_ranges()):
            yield f"stopped at {pc:#x}, which is none of the guest's own addresses"
        before, (hits, missed, _) = hits, stage.probes()["busy"]
        stops += hits > before
        if missed:
            yield f"{missed} misses"
        if time.monotonic() > deadline:
            yield f"{hits} hits in {patient(_TIMEOUT):.0f} s"
            break
    gdb.console("kprobe delete busy", timeout=_TIMEOUT)
    gdb.cont()
    guest.finish(job, timeout=_TIMEOUT, kill=True)
    gdb.interrupt(_TIMEOUT)
    gdb.console("set kprobe strategy auto")


def _differ(stage: Stage, expected: Mapping[str, int]) -> Iterable[str]:
    found = {name: probe[:2] for name, probe in stage.probes().items()}
    if found != {name: (hits, 0) for name, hits in expected.items()}:
        yield f"hits and misses are {found}, not {dict(expected)} and 0"


def _snapshot(guest: GuestVm) -> Iterable[str]:
    return SnapshotTorture(guest, random.Random(0)).round(Saved.SAME, Loaded.STOPPED).wrong


def _kill(guest: GuestVm) -> Iterable[str]:
    return Kill9(guest, random.Random(0), _STEPPED).round(Phase.HANDLING, After.ADOPT).wrong


def _reset(guest: GuestVm) -> Iterable[str]:
    return ResetTorture(guest, random.Random(0)).round(How.RUNNING, When.UP).wrong


IN_SESSION: Mapping[str, Callable[[Stage], Iterable[str]]] = {
    "trace": _trace,
    "handler": _handler,
    "fault": _fault,
    "ctrl-c": _interrupt,
}
OF_THEIR_OWN: Mapping[str, Callable[[GuestVm], Iterable[str]]] = {
    "snapshot": _snapshot,
    "kill": _kill,
    "reset": _reset,
}
ALL = (*IN_SESSION, *OF_THEIR_OWN)
