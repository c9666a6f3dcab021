"""Kernels without types (BTF): what works without, and what says that it does not.

The types of Debian's kernels are hidden from the plugin; ``small-nobtf`` has none.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.guest_kprobes import MAX_RESERVED, read_guest_kprobes
from gdb_kprobe.linux.proven_types import prove_types
from gdb_kprobe.linux.stack_areas import scan_all_stacks
from gdb_kprobe.linux.tasks import (
    StackKind,
    cpu_stacks,
    current_tasks,
    read_tasks,
    scan_stacks,
    task_on_stack,
    task_stacks,
)
from gdb_kprobe.linux.untyped_kprobes import read_untyped_kprobes
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.testing.mi import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.debug_info import fetch_debug_info
from kprobe_guest.build.kernel import find_kernel
from tests.support.calls import ENTRY
from tests.support.probed import Probed

pytestmark = pytest.mark.live

Probing = Callable[[GuestSpec], Any]

TRACED = "do_group_exit"
"""A function that the guest's own kprobes may be in."""
FUNCTION = ENTRY
CALL = "workload syscall 140 {calls}"
INNER, CALL_INNER = "sched_getaffinity", "workload syscall 204 {calls} {pid} 8 b:"
"""A function whose first argument is that of the call, in every kernel."""
CALLS = 200
TEXT = AddressRange(VirtAddr(0xFFFF_FFFF_8000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
TRACING = "/sys/kernel/tracing"
PROVEN = {
    "exception_table_entry": ("insn", "fixup"),
    "jump_entry": ("code", "target"),
    "static_call_site": ("addr",),
    "bug_entry": ("bug_addr_disp",),
    "smp_alt_module": ("locks", "locks_end", "text", "text_end", "next"),
    "kprobe_blacklist_entry": ("list", "start_addr", "end_addr"),
    "dyn_ftrace": ("ip", "flags"),
    "ftrace_page": ("next", "records", "index"),
}
ARRAYS = frozenset({"exception_table_entry", "jump_entry", "static_call_site", "bug_entry", "dyn_ftrace"})
HIDDEN = ("debian", "newest", "cloud@stable-backports")

SMALL = "small-nobtf"

no_types = pytest.mark.parametrize(
    "served", ["debian", pytest.param("newest", marks=pytest.mark.full), SMALL], indirect=True
)
hidden = pytest.mark.parametrize("served", HIDDEN, indirect=True)
small = pytest.mark.parametrize("served", [SMALL], indirect=True)


@contextmanager
def attached(guest: Probed, command: str = "attach", profile: object = None) -> Iterator[GdbMi]:
    """A gdb that does not find the kernel's types."""
    with guest.gdb(attach=False, watchdog=False) as gdb:
        gdb.console("python import gdb_kprobe.guest.linux as m; m.read_btf = lambda *_: None")
        said = gdb.console(f"kprobe {command} {profile or guest.profile}", timeout=120)
        assert "has no types (no BTF)" in said
        yield gdb


@no_types
def test_each_rung_counts_exactly_and_leaves_nothing(probed: Probing, served: str) -> None:
    # A guest that no other test has had: without types all stacks are looked at as a whole, also what is dead of them,
    # and words that earlier sessions left there would keep the region.
    guest = probed(GuestSpec(kernel=served, vcpus=2, extra_cmdline=("test=rungs",)))
    with attached(guest) as gdb:
        assert guest.add(gdb, f"p:jump {FUNCTION}")["rung"] == "optimized"
        assert guest.add(gdb, f"p:trap {FUNCTION}+behind", "boosted")["rung"] == "boosted"
        assert guest.add(gdb, f"p:step {INNER}+behind", "single-step")["rung"] == "single-step"
        guest.add(gdb, f"p:one {INNER} if u32(di) == 1")
        gdb.cont()
        few = CALLS // 4
        inner = "; ".join(CALL_INNER.format(calls=few, pid=pid) for pid in (0, 1))
        calls = f"{CALL.format(calls=CALLS)} 0 0; {inner}"
        guest.guest.check_output(f"({calls}) & ({calls}) & wait", timeout=120)
        gdb.console("kprobe stats")
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": 2 * CALLS, "trap": 2 * CALLS, "step": 4 * few, "one": 2 * few}
        done = gdb.command("-kprobe-detach")
    assert done["problems"] == []
    assert done["unmapped"] == "1"


@no_types
def test_probes_of_a_gdb_that_was_killed_are_adopted_and_restored(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served, vcpus=2))
    with attached(guest) as gdb:
        guest.add(gdb, f"p:jump {FUNCTION}")
        guest.add(gdb, f"p:trap {FUNCTION}+behind", "boosted")
        gdb.cont()
        guest.guest.check_output(f"{CALL.format(calls=CALLS)} 0 0")
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    guest.guest.check_output(f"{CALL.format(calls=CALLS)} 0 0")
    with attached(guest, "adopt") as gdb:
        gdb.cont()
        guest.guest.check_output(f"{CALL.format(calls=CALLS)} 0 0")
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": 3 * CALLS, "trap": 3 * CALLS}
        gdb.cont()
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    with attached(guest, "restore"):
        pass
    guest.check_untouched()


@no_types
def test_memory_is_borrowed_of_a_guest_that_nobody_prepared(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served, region="none", cpu="default"))
    with attached(guest) as gdb:
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        guest.guest.check_output(f"{CALL.format(calls=CALLS)} 0 0")
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": CALLS}
        assert gdb.command("-kprobe-detach")["problems"] == []


def test_what_needs_types_says_so_and_what_to_do(probed: Probing) -> None:
    guest = probed(GuestSpec())
    with attached(guest) as gdb:
        for definition, what in (
            ("p:module dummy:dummy_xmit", "what is in modules cannot be read without the types"),
            ("p:unnamed dummy_xmit", "what is in modules cannot be read without the types"),
        ):
            with pytest.raises(GdbCommandError, match=what) as refused:
                gdb.console(f"kprobe {definition}")
            assert "kprobe attach --vmlinux FILE" in str(refused.value)
        assert "the kernel has none (no BTF)" in gdb.console("kprobe doctor", timeout=120)
        told = gdb.console("kprobe info")
        for what in (
            "types:      none (no BTF)",
            "what is in modules cannot be probed",
            "kprobe attach --vmlinux FILE",
        ):
            assert what in told
        gdb.console("kprobe detach")
    with attached(guest, profile=guest.borrowing) as gdb:
        with pytest.raises(GdbCommandError, match="its record cannot be read without the types"):
            gdb.console(f"kprobe p:nop {FUNCTION}")
        gdb.console("kprobe detach")


def test_a_function_with_a_kprobe_of_the_guests_is_refused_and_others_are_not(probed: Probing) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    vm.check_output(f"echo 'p:theirs {guest.spelled(TRACED + '+behind')}' >>{TRACING}/kprobe_events")
    try:
        vm.check_output(f"echo 1 >{TRACING}/events/kprobes/theirs/enable")
        with attached(guest) as gdb:
            with pytest.raises(GdbCommandError, match=r"a kprobe of the guest's own.*what was there is not known"):
                gdb.console(f"kprobe p:ours {TRACED}")
            guest.add(gdb, f"p:other {FUNCTION}")
            gdb.cont()
            vm.check_output(f"{CALL.format(calls=CALLS)} 0 0")
            gdb.interrupt()
            assert guest.hits(gdb) == {"other": CALLS}
            gdb.console("kprobe detach")
    finally:
        vm.run(f"echo 0 >{TRACING}/events/kprobes/theirs/enable; echo -:theirs >>{TRACING}/kprobe_events")


def test_a_jump_that_a_kprobe_of_the_guests_has_saved_stays_until_that_goes(probed: Probing) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    with attached(guest) as gdb:
        ours = guest.add(gdb, f"p:ours {FUNCTION}")
        offset = int(ours["addr"], 16) - int(ours["asked"], 16)
        gdb.cont()
        vm.check_output(f"echo 'p:theirs {FUNCTION}+{offset}' >>{TRACING}/kprobe_events")
        try:
            vm.check_output(f"echo 1 >{TRACING}/events/kprobes/theirs/enable")
            vm.check_output(f"{CALL.format(calls=CALLS)} 0 0")
            gdb.interrupt()
            [probe] = gdb.command("-kprobe-list")["probes"]
            assert (probe["hits"], probe["saved"]) == (str(CALLS), "1")
            gdb.cont()
        finally:
            vm.run(f"echo 0 >{TRACING}/events/kprobes/theirs/enable; echo -:theirs >>{TRACING}/kprobe_events")
        gdb.interrupt()
        [probe] = gdb.command("-kprobe-list")["probes"]
        assert probe["saved"] == "0"
        done = gdb.command("-kprobe-detach")
    assert (done["problems"], done["unmapped"]) == ([], "1")


@hidden
def test_what_is_proven_is_what_the_kernels_types_say(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served, vcpus=2))
    known, types = guest.snapshot.guest, guest.snapshot.guest.types
    proven = prove_types(known.memory, known.kallsyms)
    assert proven.enum("system_states")["SYSTEM_RUNNING"] == types.enum("system_states")["SYSTEM_RUNNING"]
    for name, members in PROVEN.items():
        if name in ARRAYS:
            assert proven.size_of(name) == types.size_of(name), name
        if name == "smp_alt_module" and not types.has_member(name, "locks"):
            continue  # on 7.3; nothing is read by it then
        for member in members:
            found, expected = proven.member(name, member), types.member(name, member)
            assert found.offset == expected.offset, (name, member)
            if member not in ("list", "next"):
                assert found.size == expected.size, (name, member)


def words_by_types(known: LinuxGuest, pointers: Sequence[int]) -> set[int]:
    """What is alive on the stacks of all tasks, and on those of interrupts and exceptions that a vCPU is on."""
    tasks = read_tasks(known.memory, known.kallsyms, known.types)
    running = current_tasks(known.memory, known.kallsyms, known.types).values()
    stacks = list(task_stacks(tasks, running))
    elsewhere = [rsp for rsp in pointers if rsp >> 63 and task_on_stack(tasks, rsp) is None]
    of_cpus = cpu_stacks(known.memory, known.kallsyms, known.types)
    # By their storage nobody can say how much of the other ones is alive.
    interrupts = [stack for stack in of_cpus if stack.kind is StackKind.INTERRUPT]
    stacks += [stack for stack in interrupts if any(rsp in stack.range for rsp in elsewhere)]
    return {
        word.value
        for stack in stacks
        for word in scan_stacks(known.memory, (stack,), TEXT)
        if word.addr >= max((rsp for rsp in pointers if rsp in stack.range), default=0)
    }


@hidden
def test_no_word_on_a_stack_is_missed(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served, vcpus=2))
    vm: GuestVm = guest.guest
    known = guest.snapshot.guest
    jobs = [vm.spawn("workload spin 0"), vm.spawn(f"{CALL.format(calls=-1)} 0 0")]
    found = 0
    try:
        for _ in range(30):
            vm.check_output("true")
            vm.stop()
            try:
                known.refresh()
                pointers = [int(rsp, 16) for rsp in re.findall(r"RSP=([0-9a-f]{16})", vm.hmp("info registers -a"))]
                assert len(pointers) == 2
                all_words = scan_all_stacks(known.memory, known.kallsyms, known.e820(), TEXT, pointers)
                assert all_words is not None
                words = words_by_types(known, pointers)
                assert words <= set(all_words)
                found += len(words)
            finally:
                vm.cont()
    finally:
        for job in jobs:
            vm.finish(job, kill=True)
    assert found > 1000


@hidden
def test_the_guests_kprobes_are_found(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served))
    vm, known = guest.guest, guest.snapshot.guest
    inside = guest.spelled(f"{TRACED}+behind")
    names = {"on_ftrace": FUNCTION, "inside": inside, "disabled": guest.spelled("__x64_sys_setpriority+behind")}
    try:
        for name, place in names.items():
            vm.check_output(f"echo 'p:{name} {place}' >>{TRACING}/kprobe_events")
        for name in ("on_ftrace", "inside"):
            vm.check_output(f"echo 1 >{TRACING}/events/kprobes/{name}/enable")
        known.refresh()
        typed = {kprobe.addr: kprobe for kprobe in read_guest_kprobes(known.memory, known.kallsyms, known.types)}
        untyped = {
            kprobe.addr: kprobe for kprobe in read_untyped_kprobes(known.memory, known.kallsyms, known._is_ftrace_nop)
        }
        assert len(typed) >= 3
        assert set(typed) == set(untyped)
        for addr, kprobe in typed.items():
            assert untyped[addr].size >= kprobe.size
            assert untyped[addr].opaque or untyped[addr].original == kprobe.original
        assert max(kprobe.size for kprobe in untyped.values()) == MAX_RESERVED
    finally:
        vm.run(f"echo 0 >{TRACING}/events/kprobes/enable; echo >{TRACING}/kprobe_events; echo >{TRACING}/trace")


@small
def test_a_vmlinux_has_the_types_that_the_guest_has_not(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served))
    vmlinux = fetch_debug_info(find_kernel(served))
    with guest.gdb(attach=False) as gdb:
        assert "no BTF" not in gdb.console(f"kprobe attach --vmlinux {vmlinux} {guest.profile}", timeout=300)
        guest.add(gdb, f"p:jump {FUNCTION}")
        gdb.cont()
        guest.guest.check_output(f"{CALL.format(calls=CALLS)} 0 0")
        gdb.interrupt()
        assert guest.hits(gdb) == {"jump": CALLS}
        gdb.console("kprobe detach")


@small
def test_the_vmlinux_of_another_kernel_is_refused(probed: Probing, served: str) -> None:
    guest = probed(GuestSpec(kernel=served))
    vmlinux = fetch_debug_info(find_kernel("small"))
    with guest.gdb(attach=False) as gdb:
        with pytest.raises(GdbCommandError, match="is not the guest's kernel: its build id is"):
            gdb.console(f"kprobe attach --vmlinux {vmlinux} {guest.profile}")
        with pytest.raises(GdbCommandError, match="there is no file"):
            gdb.console(f"kprobe attach --vmlinux /nowhere/vmlinux {guest.profile}")
        gdb.command("-target-disconnect")
    guest.guest.cont()
