"""What a handler sees of a hit is the machine at the probe, whatever the rung: gdb's own breakpoint there says what.

For each hit gdb stops at the probed instruction first, by a breakpoint that knows nothing of probes. All registers, the
flags, what is on the stack, and gdb's backtrace are noted there, and again by the handler; in the same call of the same
task.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gdb_kprobe.x86.decode import Insn, iter_insns
from kprobe_guest import GuestSpec
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live


CALLS = 4
MOST_PLACES = 6
APART = 16
"""Bytes, at least, from one place to the next: no jump hides another probe, or a breakpoint."""

IN_GDB = """
import gdb
import re
from gdb_kprobe.gdbext import api
from gdb_kprobe.model import PT_REGS_NAMES

NAMES = {{name: hardware for name, hardware in PT_REGS_NAMES.items() if name not in ("cs", "ss")}}
wanted, different, seen, rungs = {{}}, [], [], []
MASK = (1 << 64) - 1
FLAGS = MASK & ~(1 << 16)  # RF is the debugger's

def size(sp):
    return min(256, -sp % 4096)  # a stack may end there

def backtrace():
    # Without the numbers: gdb's own frame of a hit at the gate has one, and is shown as one with the probed place.
    return re.findall("0x[0-9a-f]+ in", gdb.execute("backtrace 3", to_string=True))

class Oracle(gdb.Breakpoint):
    def stop(self):
        frame = gdb.newest_frame()
        values = {{name: int(frame.read_register(hardware)) & MASK for name, hardware in NAMES.items()}}
        values["flags"] &= FLAGS
        stack = bytes(gdb.selected_inferior().read_memory(values["sp"], size(values["sp"])))
        wanted[gdb.selected_thread().num] = values, stack, backtrace()
        return False

def look(hit):
    values = {{name: hit.regs[name] for name in NAMES}}
    values["flags"] &= FLAGS
    expected, stack, frames = wanted.pop(hit.cpu)
    other = [name for name in NAMES if values[name] != expected[name]]
    told = [f"{{name}} {{values[name]:#x}} != {{expected[name]:#x}}" for name in other]
    if hit.read(hit.regs.sp, size(hit.regs.sp)) != stack:
        told.append("the stack")
    # The instruction that is hit may be behind the nop that the probe was asked for.
    frames[0] = f"{{api.get(hit.name).place.at:#x}} in"
    if (found := backtrace())[:3] != frames[:3]:
        told.append(f"{{found}} != {{frames}}")
    seen.append(hit.regs.ip)
    if told:
        different.append((hex(hit.regs.ip), told))

for number, addr in enumerate({places}):
    probe = api.add(f"p:at{{number}} {{addr:#x}}", look)
    Oracle(f"*{{addr:#x}}", type=gdb.BP_HARDWARE_BREAKPOINT)
"""


def places_in(guest: Probed, function: str) -> list[int]:
    """Some instructions of *function*, each far from the last."""
    kernel = guest.snapshot.guest
    (symbol,) = kernel.kallsyms.lookup(function)
    insns: list[Insn] = list(iter_insns(kernel.memory.read(symbol.addr, kernel.kallsyms.size(symbol)), symbol.addr))
    found: list[int] = []
    for insn in insns[:-2]:
        if not found or insn.addr >= found[-1] + APART:
            found.append(insn.addr)
    return found[:MOST_PLACES]


@pytest.mark.parametrize("strategy", ["optimized", "boosted", "single-step"])
@pytest.mark.parametrize(
    ("kernel", "vcpus"), [("debian", 1), ("debian", 2), pytest.param("newest", 2, marks=pytest.mark.full)]
)
@pytest.mark.parametrize(
    ("function", "call"), [("__do_sys_getpriority", "140"), ("do_sched_yield", "24")], ids=["getpriority", "irqs off"]
)
def test_a_handler_sees_the_machine_at_the_probe(
    probed: Boot, tmp_path: Path, kernel: str, vcpus: int, function: str, call: str, strategy: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {strategy}")
        places = []
        for addr in places_in(guest, function):
            if f"rung         {strategy}" in gdb.console(f"kprobe plan {addr:#x}"):
                places.append(addr)
        assert places
        script = tmp_path / "look.py"
        script.write_text(IN_GDB.format(places=places))
        gdb.console(f"source {script}")
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {call} {CALLS}", timeout=60) for _ in range(vcpus)]
        for job in jobs:
            assert guest.guest.finish(job, timeout=60)[0] == 0
        gdb.interrupt()
        probes = gdb.command("-kprobe-list")["probes"]
        assert {probe["rung"] for probe in probes} == {strategy}
        assert gdb.console("python print(different)").strip() == "[]"
        assert int(gdb.console("python print(len(seen))")) == sum(int(probe["hits"]) for probe in probes)
        assert int(probes[0]["hits"]) >= CALLS * vcpus
        gdb.console("delete")
        gdb.console("kprobe detach")
