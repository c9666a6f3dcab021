"""QEMU's execution log counts exactly, without any probe: compared with known work, and with QEMU's single steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from gdb_kprobe.guest.linux import open_linux
from gdb_kprobe.model import AddressRange
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.workload import PARTS
from kprobe_guest.errors import GuestError
from kprobe_guest.execution_log import KERNEL_TEXT, ExecutionLog
from kprobe_guest.vm import SHARED_MEMORY
from tests.support.calls import GETPRIORITY
from tests.support.path import PathTracer

pytestmark = pytest.mark.live

BootedGuest = Callable[[GuestSpec], GuestVm]

CALLS = 200


def spec(vcpus: int) -> GuestSpec:
    """A guest whose text is logged.

    With one vCPU its time goes by the instructions it has executed. The log makes it a hundred times slower, and by the
    host's clock it would then do little else than handle its timer's interrupts.
    """
    if vcpus == 1:
        return GuestSpec(tcg_thread="single", extra_args=(*KERNEL_TEXT, "-icount", "shift=3"))
    return GuestSpec(vcpus=vcpus, extra_args=KERNEL_TEXT)


def address_of(guest: GuestVm, name: str) -> int:
    return int(guest.check_output(f"grep -w {name} /proc/kallsyms").split()[0], 16)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_every_call_of_a_function_is_one_execution_of_its_entry(booted_guest: BootedGuest, vcpus: int) -> None:
    guest = booted_guest(spec(vcpus))
    entry = address_of(guest, "__x64_sys_getpriority")
    log = ExecutionLog(guest)
    guest.stop()
    log.open(one_instruction=vcpus == 1)  # the first instruction of a function begins a block anyway
    guest.cont()
    calls = CALLS // vcpus
    guest.check_output(
        "".join(f"taskset {1 << cpu:x} workload syscall {GETPRIORITY} {calls} & " for cpu in range(vcpus)) + "wait",
        timeout=240,
    )
    guest.stop()
    counts = log.close()
    guest.cont()
    assert counts[entry] == CALLS
    assert all(addr in range(0xFFFFFFFF80000000, 0xFFFFFFFFF0000000) for addr in counts)
    assert list(SHARED_MEMORY.glob(f"gdb-kprobe-{os.getpid()}-*.log*")) == []


def test_every_instruction_is_executed_as_often_as_single_steps_say(booted_guest: BootedGuest) -> None:
    guest = booted_guest(spec(1))
    kernel = open_linux(GuestMonitor(guest), GuestRam(guest))
    ranges = [
        AddressRange(symbol.addr, kernel.kallsyms.end(symbol))
        for name in ("__x64_sys_getpriority", "__do_sys_getpriority")
        for symbol in kernel.kallsyms.lookup(name)
    ]
    tracer = PathTracer(guest.gdb_address, kernel.memory.read)
    with ThreadPoolExecutor(1) as background:
        path = tracer.trace(
            ranges, lambda: background.submit(guest.run, f"workload syscall {GETPRIORITY} 1 > /tmp/traced", 20)
        )
    log = ExecutionLog(guest)
    guest.stop()
    log.open()
    guest.cont()
    guest.check_output(f"workload syscall {GETPRIORITY} 23", timeout=240)
    guest.stop()
    counts = log.close()
    guest.cont()
    stepped = path.counts()
    assert len(stepped) > 40
    found = {addr: times for addr, times in counts.items() if any(addr in window for window in ranges)}
    assert found == {addr: 23 * times for addr, times in stepped.items()}


def test_it_is_not_switched_while_the_machine_runs(booted_guest: BootedGuest) -> None:
    guest = booted_guest(spec(1))
    log = ExecutionLog(guest)
    with pytest.raises(GuestError, match="runs"):
        log.open()
    assert guest.hmp("info status").strip() == "VM status: running"


@pytest.mark.parametrize("vcpus", [1, 2])
def test_each_part_of_the_workload_makes_the_calls_it_should(booted_guest: BootedGuest, vcpus: int) -> None:
    guest = booted_guest(spec(vcpus))
    with guest.dialogue("mkdir -p /tmp/serve && cd /tmp/serve && workload serve") as ask:
        answers = {part: ask(f"{part} 3 {vcpus}") for part in PARTS}
    assert answers == dict.fromkeys(PARTS, "workload: 3 rounds done, 0 calls wrong")
    assert guest.check_output("cd /tmp/serve; find . -type f; cd /tmp; rm -r serve") == ""
