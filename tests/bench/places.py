"""Where a bench puts many probes at once: instructions that each call of a system call executes exactly once.

They are found by our own jumps: every function that the guest's tracer sees in a call has one, a known number of calls
is made, and those with as many hits are on the call's way, once. Then the same with their instructions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.model import Rung, VirtAddr
from tests.bench.machine import Machine

_CALLS = (300, 30_000)
_IDLE = 3.0
"""Seconds in which nobody may pass the place."""
_EACH = 128
"""Instructions of a function that are tried, at most: its first ones are executed most often."""


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by number, with its arguments as the workload takes them; over and over it changes nothing."""

    number: int
    arguments: tuple[str, ...]

    def times(self, calls: int) -> str:
        """The command that makes it *calls* times."""
        return self._command(str(calls))

    @property
    def on_request(self) -> str:
        """The command that makes it as often as each line of its input says, and answers with the time it took."""
        return self._command("-", "timed")

    def _command(self, calls: str, mode: str = "syscall") -> str:
        return " ".join(("workload", mode, str(self.number), calls, *self.arguments))


@dataclass(frozen=True, slots=True)
class Path:
    """What one *call* executes exactly once.

    *functions* have the nop of the guest's ftrace and the instruction behind it of functions, both of which are, and
    both may be a jump; *apart* are instructions which may all be jumps at the same time.
    """

    call: Call
    functions: tuple[tuple[VirtAddr, VirtAddr], ...]
    apart: tuple[VirtAddr, ...]


def find_path(machine: Machine, call: Call, functions: Sequence[VirtAddr]) -> Path:
    """Find the way of *call* through *functions*. *machine* is attached and stopped, and has no probes."""
    found = machine.functions(_armed_once(machine, call, functions))
    nops = {code.behind_nop: code.nop for code in found if code.behind_nop is not None and code.nop is not None}
    passed = _armed_once(machine, call, tuple(nops))
    # What is asked for at the nop or in front of it goes behind it.
    bodies = [[addr for addr in code.insns if code.nop is None or addr > code.nop] for code in found]
    straight = [
        far_enough([addr for addr in body if not code.in_loop(addr)])[:_EACH]
        for code, body in zip(found, bodies, strict=True)
    ]
    apart = _armed_once(machine, call, list(itertools.chain(*straight)))
    return Path(call, tuple((nops[addr], addr) for addr in passed), tuple(apart))


def far_enough(boundaries: Sequence[VirtAddr]) -> tuple[VirtAddr, ...]:
    """Boundaries of which none is in the window of a jump at another one."""
    chosen: list[VirtAddr] = []
    for addr in boundaries:
        if not chosen or addr - chosen[-1] >= JUMP_SIZE:
            chosen.append(addr)
    return tuple(chosen)


def _armed_once(machine: Machine, call: Call, addrs: Sequence[VirtAddr]) -> list[VirtAddr]:
    """Those of *addrs* where a jump is possible that *call* goes through once.

    Those come first that asking for calls goes through least often.
    """
    machine.arm(addrs, Rung.OPTIMIZED)
    machine.gdb.cont()
    counts = []
    with machine.guest.dialogue(call.on_request) as ask:
        for calls in (0, *_CALLS, 0):
            ask(str(calls))
            machine.gdb.interrupt()
            counts.append(machine.hits())
            machine.gdb.cont()
        time.sleep(_IDLE)
    machine.gdb.interrupt()
    idle = machine.hits()
    machine.disarm()
    found = {addr: _hits_of_a_request([hits[addr] for hits in counts], idle[addr]) for addr in idle}
    return sorted((addr for addr, hits in found.items() if hits is not None), key=lambda addr: (found[addr], addr))


def _hits_of_a_request(counts: Sequence[int], idle: int) -> int | None:
    """How often asking for calls passes a place; ``None`` if anything else but the calls does.

    What the calls leave to do later does (RCU), and what a clock does. *counts* are the hits of the place after each
    request, *idle* those at the end.
    """
    beside = {
        after - before - calls for (before, after), calls in zip(itertools.pairwise(counts), (*_CALLS, 0), strict=True)
    }
    return beside.pop() if len(beside) == 1 and idle == counts[-1] else None
