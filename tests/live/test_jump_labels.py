"""Jumps of ours right beside a jump label of the guest's, and beside its target, while the guest switches it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator

import pytest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.x86.decode import Insn, iter_insns
from kprobe_guest import GuestSpec, GuestVm
from tests.support.kernel_events import Way, events, hits
from tests.support.probed import Boot

pytestmark = pytest.mark.live

FUNCTION = "__set_task_comm"
"""Has one jump label, that of the tracepoint task_rename, which a file of tracefs switches."""
RENAME, CALLS = "workload syscall 157 {calls} 15 s:thirteen-long", 200_000
"""``prctl(PR_SET_NAME)``. With a name of this length 6.12 executes what lies before the label's target, else not."""
STOPS = 20
INSTANCE = "/sys/kernel/tracing/instances/renames"
SWITCH = f"{INSTANCE}/events/task/task_rename/enable"
SWITCHES = f"while [ ! -e /tmp/enough ]; do echo 1 >{SWITCH}; sleep 0.01; echo 0 >{SWITCH}; echo; done | wc -l"
"""Prints how often the label was switched on and off."""
JUMPS = ("before", "behind", "above", "target")


def label_of(kernel: LinuxGuest, insns: list[Insn]) -> tuple[VirtAddr, VirtAddr]:
    """The address of the function's only jump label, and where it jumps to."""
    tables = kernel.text_facts().tables
    pairs = zip(tables.jump_labels, tables.jump_targets, strict=True)
    ((label, target),) = [pair for pair in pairs if insns[0].addr <= pair[0] < insns[-1].end]
    return VirtAddr(label), VirtAddr(target)


def windows(insns: list[Insn]) -> Iterator[tuple[VirtAddr, VirtAddr]]:
    """Of each instruction where a jump there would begin, and where what it displaces ends."""
    for index, insn in enumerate(insns):
        ends = (other.end for other in insns[index:] if other.end >= insn.addr + JUMP_SIZE)
        if (end := next(ends, None)) is not None:
            yield insn.addr, end


def beside(kernel: LinuxGuest) -> dict[str, VirtAddr]:
    """Where to probe: as near before and behind the label as can be, as near before its target, and at its target.

    ``theirs`` is for the guest's own kprobe: an instruction that every call executes, and no jump of ours displaces.
    """
    (symbol,) = kernel.kallsyms.lookup(FUNCTION)
    code = kernel.memory.read(symbol.addr, kernel.kallsyms.end(symbol) - symbol.addr)
    insns = list(iter_insns(code, symbol.addr))
    label, target = label_of(kernel, insns)
    (at_label,) = [insn for insn in insns if insn.addr == label]

    def last_before(addr: int) -> VirtAddr:
        return max((end, start) for start, end in windows(insns) if end <= addr)[1]

    (theirs,) = [insn.addr for insn in insns if str(insn) == "push rbp"]
    assert theirs < last_before(label)
    return {
        "before": last_before(label),
        "behind": at_label.end,
        "above": last_before(target),
        "target": target,
        "theirs": theirs,
    }


def recorded(vm: GuestVm) -> int:
    """How many renames the guest's tracer has recorded."""
    text = vm.check_output(f"cat {INSTANCE}/per_cpu/cpu*/stats")
    return sum(int(number) for number in re.findall(r"^(?:entries|overrun): (\d+)", text, re.M))


def rungs(gdb: GdbMi) -> dict[str, str]:
    return {probe["name"]: probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]}


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_a_label_is_switched_beside_jumps(probed: Boot, kernel: str) -> None:
    """The guest's own kprobe in the function counts its calls, and its tracer how often the label jumped.

    With more than one vCPU, QEMU 7.2 kills a guest that switches jump labels by itself.
    """
    guest = probed(GuestSpec(kernel=kernel))
    vm = guest.guest
    places = beside(guest.snapshot.guest)
    chosen = random.Random(1)
    with events(vm, [places["theirs"]], Way.INT3):
        vm.check_output(f"mkdir {INSTANCE}")  # with the options that there are now
        before = hits(vm)
        with guest.gdb() as gdb:
            for name in JUMPS:
                assert guest.add(gdb, f"p:{name} {places[name]:#x}")["rung"] == "optimized"
            gdb.cont()
            switching = vm.spawn(SWITCHES, timeout=120)
            calling = vm.spawn(RENAME.format(calls=CALLS), timeout=120)
            waited = 0
            for _ in range(STOPS):
                time.sleep(chosen.uniform(0, 0.2))
                gdb.interrupt()
                name = chosen.choice(JUMPS)
                gdb.console(f"kprobe disable {name}")
                gdb.console(f"kprobe enable {name}")
                waited += rungs(gdb)[name] != "optimized"
                gdb.cont()
            assert vm.finish(calling, timeout=120) == (0, f"workload: {CALLS} calls done, last result 0\n")
            vm.check_output("touch /tmp/enough")
            status, switched = vm.finish(switching, timeout=30)
            assert status == 0
            calls = hits(vm) - before
            counts = guest.hits(gdb)
            print(
                f"{switched.strip()} times on and off; {calls} calls, {counts['target']} at the target; "
                f"{waited} had to wait"
            )
            # What lies above the target is executed by every call, or by those with a name of that length.
            assert counts["above"] in (calls, CALLS)
            assert counts == {**counts, "before": calls, "behind": calls, "target": recorded(vm)}
            assert 0 < counts["target"] < calls
            assert int(switched) > STOPS
            gdb.interrupt()
            assert rungs(gdb) == dict.fromkeys(JUMPS, "optimized")
            gdb.console("kprobe detach")
    vm.check_output(f"rmdir {INSTANCE}")
