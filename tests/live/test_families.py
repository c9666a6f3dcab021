"""Every family of instructions, on both rungs, hit by a workload of a known number of calls.

The sites are chosen in the guest's live text: one call of each workload is stepped through by QEMU alone, before there
is any probe, and of each form of instruction that it executes the first one is probed. How often it was executed in
that one call is what each call of the workload must count.

GDB_KPROBE_FULL=1 in the environment runs more: 50 hits everywhere, and 2,000 in one run on all kernels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, classify
from kprobe_guest import GuestSpec, GuestVm
from tests.support.path import CallPath, PathTracer

pytestmark = pytest.mark.live

Probe = Callable[[GuestSpec], Any]
Record = Callable[[str, object], None]

FULL = bool(os.environ.get("GDB_KPROBE_FULL"))

HITS = 50
"""Of each family, on each rung."""

FEW_HITS, MORE_HITS = (HITS, HITS) if FULL else (5, 20)
MANY_HITS = 2000 if FULL else 600


@dataclass(frozen=True)
class Call:
    """A system call that nothing else in the guest makes, and the functions of its own that it runs through.

    Functions that this kernel has inlined are left out.
    """

    number: int
    arguments: str
    functions: tuple[str, ...]

    def workload(self, count: int) -> str:
        return f"workload syscall {self.number} {count} {self.arguments}"


GETPRIORITY = Call(140, "0 0", ("__x64_sys_getpriority", "__do_sys_getpriority"))
CALLS = (
    GETPRIORITY,
    Call(146, "2", ("__x64_sys_sched_get_priority_max",)),
    Call(147, "3", ("__x64_sys_sched_get_priority_min",)),
    Call(95, "18", ("__x64_sys_umask",)),
    Call(37, "0", ("__x64_sys_alarm",)),
    Call(100, "0", ("__x64_sys_times",)),
    Call(309, "b:", ("__x64_sys_getcpu",)),
    Call(324, "0", ("__x64_sys_membarrier", "__do_sys_membarrier")),
    Call(252, "1 0", ("__x64_sys_ioprio_get", "__do_sys_ioprio_get")),
    Call(145, "0", ("__x64_sys_sched_getscheduler",)),
    Call(143, "0 b:", ("__x64_sys_sched_getparam",)),
    Call(170, "s:guest 5", ("__x64_sys_sethostname",)),
    Call(168, "s:/none", ("__x64_sys_swapoff", "__do_sys_swapoff")),
)
INDIRECT_CALLS = (
    # With retpolines these are calls of a thunk. fsync: of a file in tmpfs, the workload's output.
    Call(148, "0 b:", ("__x64_sys_sched_rr_get_interval", "sched_rr_get_interval")),
    Call(74, "1", ("__x64_sys_fsync", "do_fsync", "vfs_fsync", "vfs_fsync_range")),
)


@dataclass(frozen=True)
class Site:
    """An instruction of the form *form*, executed *times* times by each call of *call*."""

    form: str
    family: Family
    addr: VirtAddr
    call: Call
    times: int


def form_of(insn: Insn, family: Family, directions: set[bool]) -> str:
    """The family, and what within it is worth a probe of its own; *directions*: has it jumped (``True``), or not."""
    match family:
        case Family.NOP:
            return "endbr64" if insn.raw.startswith(b"\xf3\x0f\x1e\xfa") else f"nop of {insn.length}"
        case Family.JCC:
            assert insn.branch_target is not None
            where = "backwards" if insn.branch_target < insn.addr else "forwards"
            how = "both ways" if len(directions) == 2 else "taken" if directions == {True} else "not taken"
            return f"jcc of {insn.length} {where}, {how}"
        case Family.JMP:
            return f"jmp of {insn.length}"
        case Family.PLAIN | Family.RIP_RELATIVE:
            segment = " gs" if 0x65 in insn.prefixes else ""
            if family is Family.RIP_RELATIVE:
                return f"rip-relative {insn.mnemonic}{segment}"
            return f"{insn.mnemonic}{segment or (' memory' if insn.has_memory_operand else '')}"
        case _:
            return str(family)


def sites_on(call: Call, path: CallPath, forbidden: Callable[[Insn], bool]) -> Iterator[Site]:
    """One site for each instruction of *path* that may be probed."""
    counts = path.counts()
    directions: dict[VirtAddr, set[bool]] = {}
    for step in path.executed:
        directions.setdefault(step.insn.addr, set()).add(step.taken)
    for insn in {step.insn.addr: step.insn for step in path.executed}.values():
        family = classify(insn)
        if isinstance(family, Family) and not forbidden(insn):
            form = form_of(insn, family, directions[insn.addr])
            yield Site(form, family, insn.addr, call, counts[insn.addr])


class Sites:
    """The sites of each guest, found once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[Call, ...]], tuple[Site, ...]] = {}

    def of(self, probed: Any, calls: tuple[Call, ...]) -> tuple[Site, ...]:
        """The first site of each form that is met."""
        key = (probed.guest.pid, calls)
        if key not in self._found:
            forms: dict[str, Site] = {}
            for call in calls:
                for site in self._trace(probed, call):
                    forms.setdefault(site.form, site)
            self._found[key] = tuple(forms.values())
        return self._found[key]

    def _trace(self, probed: Any, call: Call) -> Iterator[Site]:
        guest: GuestVm = probed.guest
        kernel = probed.snapshot.guest
        ranges = [
            AddressRange(symbol.addr, kernel.kallsyms.end(symbol))
            for name in call.functions
            for symbol in kernel.kallsyms.lookup(name)
        ]
        tracer = PathTracer(guest.gdb_address, kernel.memory.read)
        with ThreadPoolExecutor(1) as background:
            path = tracer.trace(ranges, lambda: background.submit(guest.run, f"{call.workload(1)} > /tmp/traced", 20))
        return sites_on(call, path, lambda insn: kernel.refusal_at(kernel.place_of(insn.addr), insn.length) is not None)


@pytest.fixture(scope="module")
def sites() -> Sites:
    return Sites()


LOADS = ("workload spin 0", "workload syscall 39 -1")
"""A loop in user mode, and one of system calls (getpid)."""


@contextmanager
def load(guest: GuestVm) -> Iterator[None]:
    """Keep every vCPU busy, in user mode and in the kernel; at the lowest priority, so that no workload has to wait."""
    lowest = "workload syscall 141 1 0 $$ 19"  # setpriority(PRIO_PROCESS, this process, 19)
    jobs = [guest.spawn(f"{lowest}; exec {command}") for command in LOADS]
    yield
    running = guest.check_output("ps")
    assert all(command in running for command in LOADS), running
    for job in jobs:
        guest.finish(job, kill=True)


def run_workloads(guest: GuestVm, *chains: Sequence[str], timeout: float = 240) -> None:
    """Run each of *chains* on a vCPU of its own (while there are enough), its workloads one after another."""
    script = ""
    for index, chain in enumerate(chains):
        on_cpu = f"taskset {1 << index % guest.spec.vcpus:x}"
        script += f"({'; '.join(f'{on_cpu} {workload}' for workload in chain)}) > /tmp/chain{index} & "
    output = guest.check_output(f"{script} wait; cat /tmp/chain*; rm /tmp/chain*", timeout)
    assert output.count("calls done") == sum(map(len, chains)), output


def count_hits(probed: Any, chosen: tuple[Site, ...], rung: str, hits: int, record: Record) -> None:
    """Probe all *chosen* sites at once, run one process for each vCPU, and compare the counts."""
    guest: GuestVm = probed.guest
    vcpus = guest.spec.vcpus
    wanted: dict[str, int] = {}
    with load(guest), probed.gdb() as gdb:
        calls: dict[Call, int] = {}
        for index, site in enumerate(chosen):
            added = probed.add(gdb, f"p:f{index} {site.addr:#x}", rung)
            assert added["rung"] == rung, (site, added)
            each = -(-hits // (vcpus * min(site.times, 2)))
            calls[site.call] = max(calls.get(site.call, 0), each)
        for index, site in enumerate(chosen):
            wanted[f"f{index}"] = calls[site.call] * vcpus * site.times
        gdb.cont()
        started = time.monotonic()
        run_workloads(guest, *[[call.workload(each) for call, each in calls.items()]] * vcpus)
        seconds = time.monotonic() - started
        gdb.interrupt()
        counted = probed.hits(gdb)
        gdb.console("kprobe detach")
    total = sum(counted.values())
    names = {f"f{index}": site.form for index, site in enumerate(chosen)}
    record("hits", {names[name]: count for name, count in counted.items()})
    record("missed", 0)  # hits() has seen to that
    record("summary", f"{total} hits in {seconds:.1f} s, {1000 * seconds / max(total, 1):.1f} ms each")
    assert {names[name]: count for name, count in counted.items()} == {
        names[name]: count for name, count in wanted.items()
    }


RUNGS = ("single-step", "boosted")
ON_ANY_KERNEL = {
    "nop of 5", "push", "pop", "mov", "mov memory", "mov gs", "sub", "sub gs", "add", "lea memory",
    "test", "cmp", "cmp memory", "xchg memory", "rip-relative mov",
    "jcc of 6 forwards, not taken", "jcc of 6 forwards, taken",
    "jcc of 2 forwards, not taken", "jcc of 2 forwards, taken", "jcc of 2 backwards, both ways",
    "jmp of 2", "jmp of 5", "call", "ret",
}  # fmt: skip
BY_KERNEL = {"debian": {"rip-relative mov gs"}, "newest": {"rip-relative mov gs", "endbr64"}}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    ("kernel", "vcpus", "hits"),
    [
        ("debian", 1, FEW_HITS),
        ("debian", 2, MORE_HITS),
        pytest.param("newest", 1, FEW_HITS, marks=pytest.mark.full),
        ("newest", 2, FEW_HITS),
    ],
)
def test_every_family_counts_every_call(
    probed: Probe, sites: Sites, record_property: Record, kernel: str, vcpus: int, hits: int, rung: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    chosen = sites.of(guest, CALLS)
    assert {site.form for site in chosen} >= ON_ANY_KERNEL | BY_KERNEL[kernel]
    count_hits(guest, chosen, rung, hits, record_property)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_many_hits_in_one_run(
    probed: Probe, sites: Sites, record_property: Record, kernel: str, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    chosen = tuple(site for site in sites.of(guest, (GETPRIORITY,)) if site.form == "push")
    assert len(chosen) == 1
    count_hits(guest, chosen, rung, MANY_HITS, record_property)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_indirect_calls_and_jumps_without_retpolines(
    probed: Probe, sites: Sites, record_property: Record, kernel: str, rung: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=2, extra_cmdline=("mitigations=off",)))
    chosen = sites.of(guest, INDIRECT_CALLS)
    assert {site.form for site in chosen} >= {"indirect call", "indirect jmp"}
    count_hits(guest, chosen, rung, MORE_HITS, record_property)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_every_family_with_page_table_isolation(
    probed: Probe, sites: Sites, record_property: Record, kernel: str, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus, extra_cmdline=("pti=on",)))
    chosen = sites.of(guest, CALLS)
    assert {site.form for site in chosen} >= ON_ANY_KERNEL | BY_KERNEL[kernel]
    count_hits(guest, chosen, rung, FEW_HITS, record_property)


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_arming_and_disarming_under_load_with_page_table_isolation(
    probed: Probe, record_property: Record, kernel: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=2, extra_cmdline=("pti=on",)))
    rounds, calls = (20 if FULL else 5), 5
    chains = [[GETPRIORITY.workload(calls)]] * 2
    in_user_mode = 0
    with load(guest.guest):
        for _ in range(2):  # attached and detached as well
            with guest.gdb() as gdb:
                guest.add(gdb, "p:boosted __x64_sys_getpriority", "boosted")
                guest.add(gdb, "p:stepped __do_sys_getpriority", "single-step")
                for turn in range(rounds):
                    gdb.cont()
                    run_workloads(guest.guest, *chains)
                    gdb.interrupt()
                    in_user_mode += guest.guest.hmp("info registers -a").count("CPL=3")
                    counted = 2 * calls * (turn + 1)
                    assert guest.hits(gdb) == {"boosted": counted, "stepped": counted}
                    gdb.console("kprobe disable all")
                    gdb.cont()
                    run_workloads(guest.guest, *chains)
                    gdb.interrupt()
                    assert guest.hits(gdb) == {"boosted": counted, "stepped": counted}
                    gdb.console("kprobe enable all")
                gdb.console("kprobe detach")
    record_property("summary", f"{4 * rounds} times armed or disarmed, {in_user_mode} vCPUs in user mode then")
    assert in_user_mode


@pytest.mark.parametrize("rung", RUNGS)
def test_arguments_are_those_of_the_call(probed: Probe, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    wanted = {(0, 4000): 20, (1, 4001): 20, (7, -1): 20}
    chains = [[f"workload syscall 140 20 {which} {who}"] for which, who in wanted]
    with load(guest.guest), guest.gdb() as gdb:
        gdb.console("python import collections; seen = collections.Counter()")
        gdb.console("python from gdb_kprobe.gdbext import api")
        guest.add(gdb, "p:args __do_sys_getpriority which=%di:s32 who=%si:s32", rung)
        gdb.console("python api.on_hit(lambda hit: seen.update([tuple(value for _, value in hit.args)]))")
        gdb.cont()
        run_workloads(guest.guest, *chains)
        gdb.interrupt()
        printed = gdb.console("python print(sorted(seen.items()))")
        gdb.console("kprobe detach")
    counted = {(which & 0xFFFF_FFFF, who & 0xFFFF_FFFF): count for (which, who), count in wanted.items()}
    assert printed.strip() == str(sorted(counted.items()))
