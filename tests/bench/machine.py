"""The guest that a bench runs on and the gdb beside it: probes by address, and runs with their time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestVm

TIMEOUT = 600

# Runs in gdb: one command of MI for each of many probes would take longer than arming it.
_IN_GDB = """
import json
from gdb_kprobe.gdbext import api

def bench_functions(entries):
    found = []
    for entry in entries:
        function = api.function(entry)
        flow = [[insn.addr, insn.end if insn.falls_through else None, insn.branch_target] for insn in function.insns]
        found.append([flow, function.ftrace])
    print(json.dumps(found))

bench_called = []

def bench_arm(prefix, addrs, condition, python):
    handler = (lambda hit: bench_called.append(hit.name)) if python else None
    api.add_many([f"p:{prefix}_{addr:x} {addr:#x} {condition}" for addr in addrs], handler)

def bench_listener(hit):
    bench_told.append(hit.probe.name)

bench_told = []

def bench_trace(prefix):
    global bench_end
    bench_told.clear()
    bench_end = api.on_hit(bench_listener, [probe for probe in api.probes() if probe.name.startswith(prefix)])

def bench_hits(prefix):
    probes = [probe for probe in api.probes() if probe.name.startswith(prefix)]
    print(json.dumps({probe.place.addr: [api.site(probe).rung, probe.hits] for probe in probes}))
"""


@dataclass(frozen=True, slots=True)
class FunctionCode:
    """A function: where each of its instructions may go on, and the *nop* that the guest's ftrace has there.

    A call goes on behind itself, and at what it calls.
    """

    flow: Mapping[VirtAddr, tuple[VirtAddr, ...]]
    nop: VirtAddr | None

    @property
    def insns(self) -> tuple[VirtAddr, ...]:
        return tuple(self.flow)

    def in_loop(self, addr: VirtAddr) -> bool:
        """Whether the function may execute the instruction at *addr* again, if only now and then (a lost race)."""
        seen: set[VirtAddr] = set()
        ahead = list(self.flow[addr])
        while ahead:
            at = ahead.pop()
            if at not in seen and at in self.flow:
                seen.add(at)
                ahead += self.flow[at]
        return addr in seen

    @property
    def behind_nop(self) -> VirtAddr | None:
        """The instruction behind the nop: at the nop the kernel's own kprobes are on ftrace."""
        if self.nop is None or self.nop not in self.insns[:-1]:
            return None
        return self.insns[self.insns.index(self.nop) + 1]


@dataclass(frozen=True, slots=True)
class Machine:
    """Probes of the attached gdb, and the guest that they are in."""

    gdb: GdbMi
    guest: GuestVm

    @classmethod
    def of(cls, gdb: GdbMi, guest: GuestVm) -> Machine:
        """Define in *gdb* what the methods here call."""
        gdb.console(f"python exec({_IN_GDB!r})")
        return cls(gdb, guest)

    # -- probes: attached, and the guest stopped ----------------------------------------------------------------

    def arm(
        self,
        addrs: Iterable[VirtAddr],
        rung: Rung,
        condition: str = "",
        prefix: str = "bench",
        *,
        python: bool = False,
    ) -> None:
        """Probe those of *addrs* where *rung* is possible; names begin with *prefix*.

        *python*: with a handler in Python; :meth:`handled` counts its calls from now on.
        """
        self.gdb.console(f"set kprobe strategy {rung}")
        self.gdb.console(f"python bench_arm({prefix!r}, {list(addrs)}, {condition!r}, {python})", TIMEOUT)

    def disarm(self) -> None:
        self.gdb.console("kprobe delete all", TIMEOUT)
        self.gdb.console("python bench_called.clear()")

    def handled(self) -> int:
        """How often handlers were called since :meth:`disarm`."""
        return int(self.gdb.console("python print(len(bench_called))"))

    @contextmanager
    def traced(self, prefix: str) -> Iterator[Callable[[], int]]:
        """Have hits of the probes told whose names begin with *prefix*; gives a function that says how many were."""
        self.gdb.console(f"python bench_trace({prefix!r})")
        yield lambda: int(self.gdb.console("python print(len(bench_told))"))
        self.gdb.console("python bench_end()")

    def address(self, symbol: str) -> VirtAddr:
        """Where the function *symbol* begins."""
        return VirtAddr(int(self.gdb.console(f"python print(api.address({symbol!r}))")))

    def hits(self, prefix: str = "", rung: Rung = Rung.OPTIMIZED) -> dict[VirtAddr, int]:
        """The hits of the probes on *rung* whose names begin with *prefix*, by address."""
        found = json.loads(self.gdb.console(f"python bench_hits({prefix!r})", TIMEOUT))
        return {VirtAddr(int(addr)): hits for addr, (its_rung, hits) in found.items() if its_rung == rung}

    def functions(self, entries: Sequence[VirtAddr]) -> list[FunctionCode]:
        """The functions that begin at *entries*, as far as they have instructions."""
        found = json.loads(self.gdb.console(f"python bench_functions({list(entries)})", TIMEOUT))
        return [
            FunctionCode(
                {VirtAddr(at): tuple(VirtAddr(to) for to in then if to is not None) for at, *then in insns},
                VirtAddr(nops[0]) if nops else None,
            )
            for insns, nops in found
            if insns
        ]
