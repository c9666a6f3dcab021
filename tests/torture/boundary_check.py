"""Every instruction of a function probed at once on a live guest, and every hit accounted for.

The workload runs, and the hits of each boundary are compared with QEMU's execution log, in which an int3 is executed as
often as it is hit, whatever leads there. Which functions the workload runs is seen in the log as well, before there is
any probe.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import text_of
from kprobe_guest import GuestVm
from kprobe_guest.build.workload import PARTS, SPIN
from kprobe_guest.execution_log import ExecutionLog, Faults
from tests.support import boundaries
from tests.support.functions import Function, Limits, choose_functions

ROUNDS = 5
"""Of the workload's part, for each function: as many hits at least of a boundary that each round reaches."""

STUB_LIMITS = Limits(executed=10, hits=300, rounds=ROUNDS)
"""Where each hit stops the machine: some 10 ms."""

_SERVE = "mkdir -p /tmp/serve && cd /tmp/serve && workload serve"
_TIMEOUT = 300
_LOOKS = 20
"""For tasks within a detour, a tenth of a second apart."""

Ask = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one function: *executed* are the boundaries that were hit, *often* those with a hit each round.

    *wrong* are the differences; empty when all is well.
    """

    function: Function
    armed: int
    executed: int
    hits: int
    often: int
    refused: Counter[str]
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        refused = f"; refused: {', '.join(f'{n} {why}' for why, n in self.refused.items())}" if self.refused else ""
        return (
            f"{'FAILED' if self.wrong else 'passed'} {self.function} ({self.function.kind}, {self.function.part}): "
            f"{self.hits} hits of {self.executed} of {self.armed} boundaries, {self.often} with {ROUNDS} or more, "
            f"{self.seconds:.1f} s{refused}"
        )


class BoundaryCheck:
    """A guest with a workload that waits to be asked, and what is known of it before there is any probe."""

    def __init__(self, guest: GuestVm, ask: Ask) -> None:
        self.guest = guest
        self.before = text_of(guest)
        self.touched: set[int] = set()
        self._ask = ask
        self._log = ExecutionLog(guest)

    @property
    def kernel(self) -> LinuxGuest:
        return self.before.guest

    def choose(self, count: int | None, limits: Limits, parts: Sequence[str] = PARTS) -> tuple[Function, ...]:
        """Let the workload run without probes, and choose *count* functions (all) of those that it executes."""
        windows = {part: [self._blocks(part) for _ in range(2 if limits.rounds else 1)] for part in parts}
        return choose_functions(self.kernel, windows, SPIN, limits, count)

    def _blocks(self, part: str) -> Counter[int]:
        self.work(part, 1)  # what only happens once is over
        self.guest.stop()
        self._log.open(one_instruction=False)
        self.guest.cont()
        self.work(part, 1)
        self.guest.stop()
        blocks = self._log.close()
        self.guest.cont()
        return blocks

    def work(self, part: str, workers: int) -> None:
        """Run a part of the workload, and see that every call did what it should."""
        answer = self._ask(f"{part} {ROUNDS} {workers}")
        assert answer == f"workload: {ROUNDS} rounds done, 0 calls wrong", f"{part}: {answer}"

    def check(self, gdb: GdbMi, function: Function, strategy: str) -> Outcome:
        """Probe all boundaries of *function*, run its part of the workload on every vCPU, compare, and disarm.

        Jumps hide boundaries: of those every fifth is probed at a time, until all were.
        """
        addresses = [insn.addr for insn in function.insns]
        if strategy != Rung.OPTIMIZED:
            return self._check(gdb, function, addresses, strategy)
        parts = [addresses[first::JUMP_SIZE] for first in range(min(JUMP_SIZE, len(addresses)))]
        outcomes = [self._check(gdb, function, part, strategy) for part in parts]
        return Outcome(
            function=function,
            armed=sum(outcome.armed for outcome in outcomes),
            executed=sum(outcome.executed for outcome in outcomes),
            hits=sum(outcome.hits for outcome in outcomes),
            often=sum(outcome.often for outcome in outcomes),
            refused=sum((outcome.refused for outcome in outcomes), Counter[str]()),
            seconds=sum(outcome.seconds for outcome in outcomes),
            wrong=tuple(difference for outcome in outcomes for difference in outcome.wrong),
        )

    def _check(self, gdb: GdbMi, function: Function, addresses: Sequence[VirtAddr], strategy: str) -> Outcome:
        started = time.monotonic()
        fixups = {self.kernel.fixup_of(addr) for addr in addresses}
        # These first: a probe that watches a fixup leaves no choice of the rung there.
        armed = boundaries.arm(gdb, sorted(addresses, key=lambda addr: addr not in fixups), strategy)
        self.touched.update(addr + byte for addr in armed.rungs for byte in range(JUMP_SIZE))
        # An instruction that has no int3 is in one block with the next one, which has no line of its own then.
        alone = armed.sites == {insn.addr for insn in function.insns}
        self._log.open(one_instruction=not alone)
        gdb.cont()
        self.work(function.part, self.guest.spec.vcpus)
        self._stop_when_quiet(gdb)
        executed = self._log.close(range(function.range.start, function.range.end), self._faults(armed))
        counted = boundaries.counts(gdb)
        boundaries.disarm(gdb)
        hit = {addr: executed[addr] for addr in armed.rungs if executed[addr]}
        return Outcome(
            function=function,
            armed=len(armed.rungs),
            executed=len(hit),
            hits=sum(hit.values()),
            often=sum(hits >= ROUNDS for hits in hit.values()),
            refused=Counter(armed.refused.values()),
            seconds=time.monotonic() - started,
            wrong=tuple(differences(function, armed, executed, counted)),
        )

    def _stop_when_quiet(self, gdb: GdbMi) -> None:
        """Stop the guest where no task is within a detour: it would have executed a jump that is not counted yet.

        A word that nobody needs any more may lie on a stack for as long as its task sleeps: then it is stopped anyway.
        """
        gdb.interrupt(_TIMEOUT)
        for _ in range(_LOOKS):
            if boundaries.is_quiet(gdb):
                break
            gdb.cont()
            time.sleep(0.1)
            gdb.interrupt(_TIMEOUT)

    def _faults(self, armed: boundaries.Armed) -> Faults | None:
        """Where a user's page is not there the instruction is executed again, which is the same hit.

        That it goes on at its fixup instead does not happen: no call of the workload has a bad address.
        """
        may_fault = frozenset(addr for addr in armed.rungs if self.kernel.fixup_of(addr) is not None)
        return Faults(self.kernel.kallsyms.address("asm_exc_page_fault"), may_fault) if may_fault else None

    def leftovers(self) -> list[str]:
        """What is not as it was before: bytes of text, lines of the guest's log."""
        return [*self.before.leftovers(self.touched), *self.guest.dmesg_problems()]


@contextmanager
def boundary_check(guest: GuestVm) -> Iterator[BoundaryCheck]:
    """Start the workload in *guest*, which was made with :data:`KERNEL_TEXT` (``GuestSpec.extra_args``)."""
    with guest.dialogue(_SERVE, _TIMEOUT) as ask:
        yield BoundaryCheck(guest, ask)


def differences(
    function: Function, armed: boundaries.Armed, executed: Counter[int], counted: dict[VirtAddr, boundaries.Counts]
) -> Iterator[str]:
    """What the plugin counted and QEMU did not see, or the other way round; one line for each instruction."""
    insns = {insn.addr: insn for insn in function.insns}
    for addr in sorted(executed):
        if addr not in insns:
            yield f"{function}+{addr - function.range.start:#x} was executed, and is no boundary"

    def name(addr: VirtAddr) -> str:
        return f"{function}+{addr - function.range.start:#x} {insns[addr].raw.hex(' ')} {insns[addr]}"

    for addr, error in armed.failed.items():
        yield f"{name(addr)}: cannot be probed: {error}"
    for addr, rung in armed.rungs.items():
        if counted[addr] != boundaries.Counts(executed[addr], 0):
            yield (
                f"{name(addr)} ({rung}): executed {executed[addr]} times, counted {counted[addr].hits}, "
                f"missed {counted[addr].missed}"
            )
