"""QEMU's execution log: which instructions the guest executed, and how often, as QEMU itself saw it.

Within a window QEMU makes a block of each instruction and writes a line when it enters one (``log exec``; accel/tcg,
``log_cpu_exec``). Blocks are not chained (``nochain``): a chained one is entered without a line. A block that is
entered and left before its first instruction, for an interrupt or a stop, has a second line that takes the first one
back. So the count of an address is how often the instruction there was executed, whatever made the guest do it.

What counts more than once: an instruction that faults, at each attempt; and, with several vCPUs, one that QEMU can only
do while the others wait (16-byte cmpxchg).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kprobe_guest.errors import GuestError
from kprobe_guest.private import private_file
from kprobe_guest.vm import SHARED_MEMORY, GuestVm

KERNEL_TEXT = "-dfilter", "0xffffffff80000000+0x70000000"
"""QEMU's arguments (``GuestSpec.extra_args``) for a log of the kernel and its modules alone: user mode is most of it.

From __START_KERNEL_map on, but not the end of the module area, where a debugger may have code of its own. QEMU takes a
filter only when it starts.
"""

EVERYWHERE = range(1 << 64)

_CHUNK = 1 << 26
"""Bytes of the log that are looked at together."""

_ONE_INSTRUCTION = ("one-insn-per-tb", "singlestep")
"""The monitor's command; QEMU 8.1 has renamed it."""

_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Faults:
    """Which instructions may raise an exception, whose entry is at *entry*."""

    entry: int
    instructions: frozenset[int]


class ExecutionLog:
    """The log of *guest*: one window at a time. It is opened and closed while the machine is stopped."""

    def __init__(self, guest: GuestVm) -> None:
        self._guest = guest
        self._path: Path | None = None
        self._was_one_instruction = False

    def open(self, *, one_instruction: bool = True) -> None:
        """Begin a window.

        Without *one_instruction* only the first instruction of each block is counted, five times as fast. A block then
        begins where a jump, a call or an exception leads to, behind each of these, and at the start of a page; and QEMU
        makes blocks of one instruction in a page that the stub has a breakpoint in (``check_for_breakpoints``).

        :raises GuestError: the machine runs, or QEMU has no such log.
        """
        assert self._path is None, "a window is open already"
        self._require_stopped()
        # Named as the guest's memory is: when we are killed the next start of a guest removes it.
        path = SHARED_MEMORY / f"gdb-kprobe-{os.getpid()}-{self._guest.directory.name}.log{next(_numbers)}"
        if one_instruction:
            self._one_instruction("on")
        self._was_one_instruction = one_instruction
        self._command(f"logfile {private_file(path)}")
        self._command("log exec,nochain")
        self._path = path

    def close(self, addresses: range = EVERYWHERE, faults: Faults | None = None) -> Counter[int]:
        """End the window; returns how often each instruction of *addresses* was executed in it, by address.

        With *faults* an instruction that has faulted does not count as executed.

        :raises GuestError: the machine runs.
        """
        assert self._path is not None, "no window is open"
        self._require_stopped()
        self._command("log none")
        if self._was_one_instruction:
            self._one_instruction("off")
        path, self._path = self._path, None
        try:
            counts = count_executions(_chunks(path), addresses)
            return counts if faults is None else counts - count_faults(_chunks(path), addresses, faults)
        finally:
            path.unlink(missing_ok=True)

    def _require_stopped(self) -> None:
        if self._guest.is_running():
            raise GuestError("the execution log is switched while the machine is stopped; it runs")

    def _command(self, command: str) -> None:
        answer = self._guest.hmp(command).strip()
        if answer:
            raise GuestError(f"QEMU's monitor to '{command}': {answer}")

    def _one_instruction(self, state: str) -> None:
        answers = []
        for command in _ONE_INSTRUCTION:
            answer = self._guest.hmp(f"{command} {state}").strip()
            if not answer:
                return
            answers.append(answer)
        raise GuestError(f"this QEMU does not make blocks of one instruction: {'; '.join(answers)}")


def count_executions(chunks: Iterable[bytes], addresses: range = EVERYWHERE) -> Counter[int]:
    """Executions by address of a log in pieces of whole lines.

    ``Trace CPU: HOST [CS_BASE/PC/FLAGS/CFLAGS] SYMBOL`` is an entry, ``Stopped execution of TB chain before HOST [PC]
    SYMBOL`` takes one back. A narrow range is found some ten times as fast.
    """
    address = b"(" + _pattern(addresses) + b")"
    entered = re.compile(b"/" + address + b"/")
    taken_back = re.compile(rb"Stopped execution of TB chain before 0x[0-9a-f]+ \[" + address + rb"\]")
    found: Counter[bytes] = Counter()
    for chunk in chunks:
        found.update(entered.findall(chunk))
        found.subtract(taken_back.findall(chunk))
    counts = Counter({int(addr, 16): times for addr, times in found.items() if times})
    return Counter({addr: times for addr, times in counts.items() if addr in addresses})


def count_faults(chunks: Iterable[bytes], addresses: range, of: Faults) -> Counter[int]:
    """Faults by address: the instruction led to the exception, and on its vCPU no other of *addresses* came before it.

    What is behind the instruction must be in *addresses*, and begin a block.
    """
    entered = re.compile(rb"Trace (\d+): 0x[0-9a-f]+ \[[0-9a-f]{16}/(%s|%016x)/" % (_pattern(addresses), of.entry))
    faults: Counter[int] = Counter()
    last: dict[bytes, int] = {}
    for chunk in chunks:
        for cpu, digits in entered.findall(chunk):
            addr = int(digits, 16)
            if addr == of.entry:
                faults[last.pop(cpu, 0)] += 1
            elif addr in addresses:
                last[cpu] = addr
    return Counter({addr: times for addr, times in faults.items() if addr in of.instructions})


def _pattern(addresses: range) -> bytes:
    """A regular expression for the digits of *addresses*, and of a few others."""
    first, last = (b"%016x" % addr for addr in (addresses[0], addresses[-1]))
    same = next((at for at in range(len(first)) if first[at] != last[at]), len(first))
    return b"%s[0-9a-f]{%d}" % (first[:same], len(first) - same)


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines; nothing when QEMU never had a reason to make it."""
    if not path.exists():
        return
    with path.open("rb") as log:
        rest = b""
        while chunk := log.read(_CHUNK):
            whole, newline, rest_of_chunk = (rest + chunk).rpartition(b"\n")
            yield whole + newline
            rest = rest_of_chunk
        assert not rest, "the log ends within a line"
