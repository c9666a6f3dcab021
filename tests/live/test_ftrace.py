"""What is read of the guest's ftrace against what the guest says of it, and nops that are borrowed of it.

The function tracer is switched on and off for all functions while the entries of some hold a jump of ours: the guest
verifies its text then, and warns at each byte that it does not know.

GDB_KPROBE_FULL=1 in the environment runs all on both kernels, and with 2 vCPUs, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gdb_kprobe.errors import StaleTextError, UnmappedError
from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.linux.ftrace import (
    NOP,
    SITE_SIZE,
    FtraceRecords,
    FtraceSite,
    FtraceTracers,
    read_ftrace_records,
    read_ftrace_tracers,
)
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.session import transaction
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.errors import GuestFailedError
from tests.support.probed import Boot, Booted

pytestmark = pytest.mark.live

TRACING = "/sys/kernel/tracing"
JUMP = bytes.fromhex(
    "e900000000"
)  # to the next instruction: what a probe's jump is to ftrace, and as harmless as a nop
BORROWED = 20
OFTEN = 10  # what is less often in the trace may be a matter of caches
OTHER = "__x64_sys_getpgid"  # not among those: nothing calls it
MOST_BEFORE = 4  # bytes of a function in front of its nop: endbr64
WORK = "ls -lR /etc /proc/self > /dev/null; workload syscall 140 23; cat /proc/modules /proc/mounts > /dev/null; true"
PRESENT = re.compile(r"^ +\S.*?\[\d+\] .*?: (\S+) <-", re.M)

both_kernels = pytest.mark.parametrize("kernel", ["debian", "newest"])
one_kernel = pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
cpus = pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.full)])


class Looked:
    """The stopped guest as we read it, at one moment, and the way to write to it."""

    def __init__(self, stub: QemuStub) -> None:
        self.guest: LinuxGuest = open_linux(stub, stub)
        before = time.monotonic()
        self.records: FtraceRecords = read_ftrace_records(self.guest.memory, self.guest.kallsyms, self.guest.types)
        self.seconds = time.monotonic() - before
        self.tracers: FtraceTracers = read_ftrace_tracers(self.guest.memory, self.guest.kallsyms, self.guest.types)

    def text(self, addr: VirtAddr) -> bytes:
        return self.guest.memory.read(addr, SITE_SIZE)

    def site_of(self, name: str) -> FtraceSite:
        """The record of a function's entry."""
        (symbol,) = self.guest.kallsyms.lookup(name)
        (site,) = self.records.sites_in(AddressRange(symbol.addr, VirtAddr(symbol.addr + MOST_BEFORE + 1)))
        return site

    def why_not_borrow(self, site: FtraceSite) -> str | None:
        return site.why_not_borrow(self.text(site.ip))

    def apply(self, patches: list[CodePatch]) -> None:
        transaction.apply(self.guest.memory, patches)


@contextmanager
def stopped(vm: GuestVm) -> Iterator[Looked]:
    """Stop the guest by its stub, and read what there is to know."""
    with RspSocket(vm.gdb_address) as channel:
        try:
            yield Looked(QemuStub(channel))
        finally:
            channel.detach()


def borrow(vm: GuestVm, names: list[str]) -> list[CodePatch]:
    """Set the flag of each function, then write a jump over its nop; the patches that were made."""
    with stopped(vm) as looked:
        sites = [looked.site_of(name) for name in names]
        assert [looked.why_not_borrow(site) for site in sites] == [None] * len(sites)
        patches = [CodePatch(site.record, site.data, site.borrowed) for site in sites]
        patches += [CodePatch(site.ip, NOP, JUMP) for site in sites]
        looked.apply(patches)
    return patches


def give_back(vm: GuestVm, patches: list[CodePatch]) -> None:
    with stopped(vm) as looked:
        ips = [patch.addr for patch in patches if patch.new == JUMP]
        assert [looked.tracers.why_not_return(ip) for ip in ips] == [None] * len(ips)
        looked.apply([patch.inverse for patch in reversed(patches)])


def trace(vm: GuestVm, work: str = WORK, tracer: str = "function") -> dict[str, int]:
    """How often each function is in the trace that the guest's own tracer makes of *work*."""
    vm.check_output(f"cd {TRACING}; echo > trace; echo 1 > tracing_on; echo {tracer} > current_tracer", timeout=120)
    vm.check_output(work, timeout=240)
    vm.check_output(f"cd {TRACING}; echo 0 > tracing_on; cp trace /tmp/trace; echo nop > current_tracer", timeout=240)
    vm.check_output(f"echo 1 > {TRACING}/tracing_on")  # as it was: other tests use this guest
    counts: dict[str, int] = {}
    for name in PRESENT.findall(vm.read_file("/tmp/trace", timeout=240).decode()):
        counts[name] = counts.get(name, 0) + 1
    return counts


def traced_by_all(vm: GuestVm) -> dict[str, int]:
    counts = trace(vm)
    assert sum(counts.values()) > 1000, counts
    return counts


def choose(vm: GuestVm, traces: list[dict[str, int]]) -> list[str]:
    """Functions that each of *traces* has often, evenly among all of those; each has one symbol."""
    often = [name for name in sorted(traces[0]) if all(counts.get(name, 0) >= OFTEN for counts in traces)]
    with stopped(vm) as looked:
        once = [name for name in often if len(looked.guest.kallsyms.lookup(name)) == 1]
    return once[:: len(once) // BORROWED][:BORROWED]


@one_kernel
def test_records_equal_available_filter_functions(booted_guest: Booted, kernel: str) -> None:
    vm = booted_guest(GuestSpec(kernel=kernel))
    lines = vm.read_file(f"{TRACING}/available_filter_functions").decode().splitlines()
    with stopped(vm) as looked:
        sites = list(looked.records)
        texts = {looked.text(site.ip) for site in sites if not site.is_disabled}
        users = [site for site in sites if site.is_enabled]
        assert len(looked.records) == len(sites) == len(lines) > 30_000
    symbols: dict[str, set[int]] = {}
    for line in vm.kallsyms().splitlines():
        addr, _, rest = line.split(" ", 2)
        symbols.setdefault(" ".join(rest.split("\t")), set()).add(int(addr, 16))
    invalid = [site for site, line in zip(sites, lines, strict=True) if line.startswith("__ftrace_invalid_address__")]
    wrong = [
        (hex(site.ip), line)
        for site, line in zip(sites, lines, strict=True)
        if site not in invalid and not any(0 <= site.ip - addr <= MOST_BEFORE for addr in symbols[line])
    ]
    modules = {line.partition(" [")[2] for line in lines} - {""}
    print(
        f"\n{len(sites)} records in {1000 * looked.seconds:.0f} ms, {len(invalid)} of weak functions, "
        f"of {len(modules)} modules, {len(looked.tracers.tracers)} tracers"
    )
    assert wrong == []
    assert modules, "no function of a module: nothing was compared for modules"
    # Not in each kernel: newer ones drop these records when they are built.
    assert [site for site in sites if site.is_disabled] == invalid
    assert (texts, users) == ({NOP}, [])
    for site in sites[::97]:
        assert looked.records.find(site.ip) == site
        assert looked.records.find(site.ip + 1) is None
        assert site in looked.records.sites_in(AddressRange(VirtAddr(site.ip + 4), VirtAddr(site.ip + 5)))
        assert site not in looked.records.sites_in(AddressRange(VirtAddr(site.ip + 5), VirtAddr(site.ip + 6)))


def test_records_have_the_addresses_that_the_guest_lists(booted_guest: Booted) -> None:
    vm = booted_guest(GuestSpec(kernel="newest"))
    lines = vm.read_file(f"{TRACING}/available_filter_functions_addrs").decode().splitlines()
    with stopped(vm) as looked:
        assert [site.ip for site in looked.records] == [int(line.split()[0], 16) for line in lines]


@both_kernels
def test_records_follow_the_modules(booted_guest: Booted, kernel: str) -> None:
    vm = booted_guest(GuestSpec(kernel=kernel))
    module = vm.check_output("find /modules -name 'loop.ko*'").strip()
    listed = vm.read_file(f"{TRACING}/available_filter_functions").decode().splitlines()
    of_loop = sum(line.endswith(" [loop]") for line in listed)
    assert of_loop > 10
    counts = []
    for command in ("true", "rmmod loop", f"insmod {module}"):
        vm.check_output(command)
        with stopped(vm) as looked:
            counts.append(len(looked.records))
    assert counts == [len(listed), len(listed) - of_loop, len(listed)]


@one_kernel
@cpus
def test_the_guest_leaves_borrowed_functions_alone(probed: Boot, kernel: str, vcpus: int) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    vm: GuestVm = guest.guest
    before = traced_by_all(vm)
    names = choose(vm, [before, traced_by_all(vm)])
    assert len(names) == BORROWED
    patches = borrow(vm, names)
    jumps = [patch for patch in patches if patch.new == JUMP]
    guest.touched |= {patch.addr + at for patch in jumps for at in range(SITE_SIZE)}

    # All functions, by two tracers; the borrowed ones run (their callers are in the trace), and are not in it.
    for tracer in ("function", "function_graph"):
        vm.check_output(f"echo {tracer} > {TRACING}/current_tracer; echo 1 > {TRACING}/tracing_on", timeout=120)
        with stopped(vm) as looked:
            assert {looked.text(patch.addr) for patch in jumps} == {JUMP}
            assert sum(site.is_enabled for site in looked.records) > 30_000
            reasons = {looked.tracers.why_not_return(patch.addr) for patch in jumps}
            assert len(looked.tracers.tracers) == 1
            assert reasons == {"a tracer of the guest's covers this function, and was not counted when it came"}
            assert looked.why_not_borrow(looked.site_of(OTHER)) == "a tracer of the guest's is called from it"
        vm.check_output(WORK, timeout=240)
        vm.check_output(f"echo nop > {TRACING}/current_tracer", timeout=120)
    meanwhile = traced_by_all(vm)
    assert sorted(set(meanwhile) & set(names)) == []
    assert len(set(meanwhile) & set(before)) > 200

    # By name they are not to be had.
    for name in names:
        status, answer = vm.run(f"echo {name} > {TRACING}/set_ftrace_filter")
        assert (status, answer.split(":")[-1].strip()) == (1, "Invalid argument")
    # A tracer of other functions does not stand in the way of giving back, one of all but others does.
    for file, covered in (("set_ftrace_filter", True), ("set_ftrace_notrace", False)):
        vm.check_output(f"cd {TRACING}; echo {OTHER} > {file}; echo function > current_tracer", timeout=120)
        with stopped(vm) as looked:
            assert (looked.tracers.why_not_return(looked.site_of(OTHER).ip) is not None) == covered
            assert {looked.tracers.why_not_return(patch.addr) is not None for patch in jumps} == {not covered}
        vm.check_output(f"cd {TRACING}; echo nop > current_tracer; echo > {file}", timeout=120)

    # A kprobe of the guest's own is taken, and never hit.
    vm.check_output(f"cd {TRACING}; echo p:mine {names[0]} > kprobe_events; echo 1 > events/kprobes/mine/enable")
    vm.check_output(WORK, timeout=240)
    profile = vm.check_output(
        f"cd {TRACING}; cat kprobe_profile; echo 0 > events/kprobes/mine/enable; echo > kprobe_events"
    )
    assert profile.split() == ["mine", "0", "0"]
    with stopped(vm) as looked:
        assert {looked.text(patch.addr) for patch in jumps} == {JUMP}

    give_back(vm, patches)
    # Now they are found by name, and each is called.
    vm.check_output(f"echo {' '.join(names)} > {TRACING}/set_ftrace_filter")
    assert sorted(trace(vm)) == sorted(names)
    vm.check_output(f"echo > {TRACING}/set_ftrace_filter")
    assert vm.dmesg_problems() == []


@one_kernel
def test_a_module_goes_with_its_borrowed_function(booted_guest: Booted, kernel: str) -> None:
    vm = booted_guest(GuestSpec(kernel=kernel))
    module = vm.check_output("find /modules -name 'loop.ko*'").strip()
    record, jump = borrow(vm, ["loop_control_ioctl"])
    vm.check_output(f"echo function > {TRACING}/current_tracer", timeout=120)
    with stopped(vm) as looked:
        assert looked.text(jump.addr) == JUMP
        count = len(looked.records)
    vm.check_output("rmmod loop", timeout=120)
    with stopped(vm) as looked:
        assert looked.records.find(jump.addr) is None
        with pytest.raises((StaleTextError, UnmappedError)):
            looked.apply([jump.inverse, record.inverse])
    vm.check_output(f"insmod {module}", timeout=120)
    with stopped(vm) as looked:
        assert len(looked.records) == count
        assert looked.site_of("loop_control_ioctl").is_enabled
    vm.check_output(f"echo nop > {TRACING}/current_tracer", timeout=120)
    with stopped(vm) as looked:
        assert looked.why_not_borrow(looked.site_of("loop_control_ioctl")) is None
    assert vm.dmesg_problems() == []


def switch_tracer(vm: GuestVm, name: str) -> None:
    vm.check_output(f"echo {name} > {TRACING}/current_tracer", timeout=120)


@one_kernel
def test_the_guest_minds_what_is_not_done_so(kernel: str) -> None:
    """Why it is done at all: an int3 without the flag, and the flag cleared while a tracer covers the function."""
    with hurt_guest(GuestSpec(kernel=kernel)) as vm:
        with stopped(vm) as looked:
            site = looked.site_of(OTHER)
            looked.apply([CodePatch(site.ip, NOP, b"\xcc" + NOP[1:])])
        with pytest.raises(GuestFailedError, match=r"WARNING.*ftrace"):
            switch_tracer(vm, "function")
    with hurt_guest(GuestSpec(kernel=kernel)) as vm:
        patches = borrow(vm, [OTHER])
        switch_tracer(vm, "function")
        with stopped(vm) as looked:
            assert looked.tracers.why_not_return(patches[1].addr) is not None
            looked.apply([patch.inverse for patch in reversed(patches)])
        with pytest.raises(GuestFailedError, match=r"WARNING.*ftrace"):
            switch_tracer(vm, "nop")


@contextmanager
def hurt_guest(spec: GuestSpec) -> Iterator[GuestVm]:
    """A guest of its own, whose failure is wanted: nothing of it is kept."""
    vm = GuestVm(spec)
    vm.start()
    try:
        vm.wait_ready()
        yield vm
    finally:
        vm.close()
