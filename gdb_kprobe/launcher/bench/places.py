"""Where a bench puts many probes at once: instructions that each call of a system call executes exactly once.

They are found by our own jumps: every function that the guest's tracer sees in a call has one, a known number of calls
is made, and those with as many hits more than without the calls are on the call's way, once. Then the same with their
instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.launcher.bench.machine import Machine
from gdb_kprobe.model import Rung, VirtAddr

_CALLS = 300
_EACH = 16
"""Instructions of a function that are tried, at most: its first ones are executed most often."""


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by number, with its arguments as the workload takes them; over and over it changes nothing."""

    number: int
    arguments: tuple[str, ...]

    def times(self, calls: int) -> str:
        """The command that makes it *calls* times."""
        return " ".join(("workload syscall", str(self.number), str(calls), *self.arguments))


@dataclass(frozen=True, slots=True)
class Path:
    """What one *call* executes exactly once.

    *functions* have the entry and the next instruction of functions, both of which are, and both may be a jump;
    *apart* are instructions which may all be jumps at the same time. Those that starting the program passes come last.
    """

    call: Call
    functions: tuple[tuple[VirtAddr, VirtAddr], ...]
    apart: tuple[VirtAddr, ...]


def find_path(machine: Machine, call: Call, functions: Sequence[VirtAddr]) -> Path:
    """Find the way of *call* through *functions*. *machine* is attached and stopped, and has no probes."""
    boundaries = machine.boundaries(_armed_once(machine, call, functions))
    seconds = {insns[1]: insns[0] for insns in boundaries if len(insns) > 1}
    passed = _armed_once(machine, call, tuple(seconds))
    apart = _armed_once(machine, call, [addr for insns in boundaries for addr in far_enough(insns)[:_EACH]])
    return Path(call, tuple((seconds[addr], addr) for addr in passed), tuple(apart))


def far_enough(boundaries: Sequence[VirtAddr]) -> tuple[VirtAddr, ...]:
    """Boundaries of which none is in the window of a jump at another one."""
    chosen: list[VirtAddr] = []
    for addr in boundaries:
        if not chosen or addr - chosen[-1] >= JUMP_SIZE:
            chosen.append(addr)
    return tuple(chosen)


def _armed_once(machine: Machine, call: Call, addrs: Sequence[VirtAddr]) -> list[VirtAddr]:
    """Those of *addrs* where a jump is possible that *call* goes through once.

    Those come first that starting the program goes through least often.
    """
    machine.arm(addrs, Rung.OPTIMIZED)
    counts = [machine.hits()]
    for calls in (_CALLS, 2 * _CALLS):
        machine.run_attached(call.times(calls))
        counts.append(machine.hits())
    machine.disarm()
    before, after, last = counts
    # Hits beside those of the calls, in the first run and in the second.
    others = {addr: (after[addr] - before[addr] - _CALLS, last[addr] - after[addr] - 2 * _CALLS) for addr in last}
    return sorted((addr for addr, (one, two) in others.items() if one == two), key=lambda addr: (*others[addr], addr))
