"""The boundary to a stopped machine: primitives only.

If two implementations of a method would share code, the method belongs one layer up. There are two carriers of
packets (gdb's own connection and our socket client), one implementation of everything above them
(:mod:`gdb_kprobe.target.stub`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from gdb_kprobe.model import CpuId, PhysAddr, VirtAddr
from gdb_kprobe.target.packets import RUN

if TYPE_CHECKING:
    from gdb_kprobe.target.quirks import Quirks


class PacketChannel(Protocol):
    """Carries gdb remote-protocol packets to the stub and brings back the replies."""

    def send(self, packet: bytes) -> bytes:
        """Send *packet* (no framing) and return the reply's payload, unescaped.

        :raises ConnectionLostError: the other end is gone.
        """

    def send_all(self, packets: Sequence[bytes]) -> list[bytes]:
        """Send *packets*, one after the other, and return the reply to each, in one exchange: for many that are short.

        :raises ConnectionLostError: the other end is gone; some of them may have been heard.
        """

    def check_can_run(self) -> None:
        """Before anything is done that :meth:`run_for` is needed for.

        :raises GuestStateError: it would not let the machine run.
        """

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        """Let vCPUs run until one stops by itself, but no longer than *seconds*; then the machine is stopped.

        *how* is the packet that says which of them, all if not told otherwise. Returns the reply of a stop by itself,
        ``None`` when the machine had to be stopped.

        :raises ConnectionLostError: the other end is gone.
        :raises KeyboardInterrupt: the user pressed Ctrl-C; the machine is stopped. Not unless it is to *heed* that.
        """

    def monitor(self, command: str) -> str:
        """Run one command of QEMU's text monitor and return what it printed.

        Apart from :meth:`send` because its reply is a series of packets.

        :raises ConnectionLostError: the other end is gone.
        """


class PhysicalMemory(Protocol):
    """Guest RAM by physical address."""

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        """Read *size* bytes.

        :raises TargetError: there is no RAM there.
        """

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        """Write *data*; translated code of the page is thrown away, so text may be written.

        :raises TargetError: there is no RAM there.
        """

    def batch(self) -> contextlib.AbstractContextManager[None]:
        """Around many writes, whose order does not matter: they may all be made at the end, in fewer packets.

        :raises TargetError: at the end; the guest holds something else than what was written.
        """


class Memory(Protocol):
    """The kernel's virtual memory, seen through the kernel's own page table (never the current CR3's)."""

    def read(self, addr: VirtAddr, size: int) -> bytes:
        """Read *size* bytes.

        :raises UnmappedError: a page of the range has no translation.
        """

    def write(self, addr: VirtAddr, data: bytes) -> None:
        """Write *data*, whatever the page's protection is.

        :raises UnmappedError: a page of the range has no translation; then nothing was written.
        """


class LiveMemory(Protocol):
    """Guest memory by physical address while the machine runs."""

    def is_live(self, addr: PhysAddr, size: int) -> bool:
        """Whether these bytes can be read and written then."""

    def write_live(self, addr: PhysAddr, data: bytes) -> None:
        """Write data, which is never executed.

        :raises GuestStateError: it cannot be reached while the machine runs.
        """


class Cpus(Protocol):
    """The virtual CPUs of a stopped machine."""

    def cpus(self) -> tuple[CpuId, ...]:
        """All vCPUs, in the stub's order."""

    def read_registers(self, cpu: CpuId) -> dict[str, int]:
        """All integer registers by gdb's name (``rax`` ... ``eflags``, ``cs``, ``gs_base``, ``cr3``, ...)."""

    def read_register(self, cpu: CpuId, name: str) -> int:
        """One of them."""

    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None:
        """Change the named registers, by one request: should the connection be lost, either all of them or none."""

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        """Read through *cpu*'s own CR3 (cheap: one packet); ``None`` where that has no translation."""

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        """Write through *cpu*'s own CR3; ``False`` where that has no translation."""

    def step(self, cpu: CpuId) -> None:
        """Execute one instruction on *cpu* alone, interrupts held off, all others stopped.

        An exception that it raises ends the step at the first instruction of its handler.

        :raises TargetError: it has not come to an end.
        """

    def watch_faults(self, entries: Mapping[VirtAddr, int]) -> None:
        """Say where exceptions lead, and how far above RSP each one's frame has RFLAGS: :meth:`step` must know."""

    def drop_trap_flag(self, cpu: CpuId) -> None:
        """Take away what a step of *cpu* that was cut off has left of the trap flag that was set for it."""

    def flushed(self) -> contextlib.AbstractContextManager[None]:
        """Around changes of page tables: afterwards no vCPU has anything of the old ones cached.

        Not where :attr:`Quirks.flushes_at_write` is false, unless the machine runs within it, after the changes: then
        no vCPU executes an instruction with anything cached of the old ones.
        """

    def run_briefly(self) -> None:
        """Let all vCPUs run for a moment, so that each has begun to. All text must be the guest's own.

        :raises ConnectionLostError: the other end is gone.
        """

    @property
    def quirks(self) -> Quirks:
        """What is peculiar to the machine's accelerator."""

    shown: CpuId | None
    """The vCPU that the user looks at, if there is a user."""

    def check_can_run(self) -> None:
        """Before anything is done that :meth:`run_to` is needed for.

        :raises GuestStateError: it would not let the machine run.
        """

    def run_to(self, addrs: Collection[VirtAddr], seconds: float, *, heed: bool = True) -> CpuId | None:
        """Let all vCPUs run until one is about to execute one of *addrs*; which one, or ``None`` after *seconds*.

        Others may have got there in the same moment. All are stopped then.

        :raises KeyboardInterrupt: the user pressed Ctrl-C; all are stopped. Not unless it is to *heed* that.
        """

    def drop_breakpoints(self) -> None:
        """Take away all breakpoints that the stub has, also those that a killed client has left."""


class Monitor(Protocol):
    """QEMU's text monitor."""

    def monitor(self, command: str) -> str:
        """Run one HMP command and return what it printed."""


class Breakpoints(Protocol):
    """Breakpoints of the stub, by virtual address."""

    def insert(self, addr: VirtAddr) -> None:
        """Have every vCPU stop before it executes *addr*."""

    def remove(self, addr: VirtAddr) -> None:
        """Take it away again; nothing happens when there is none."""

    def is_taken(self, addr: VirtAddr) -> bool:
        """Whether the user has a breakpoint at *addr*."""

    def taken(self) -> Collection[int]:
        """Where the user has breakpoints."""

    def watch(self, addrs: Collection[VirtAddr]) -> None:
        """Have the user's steps tell of each arrival at one of *addrs*, and of no other, from the next resume on."""

    def hardware_taken(self) -> int:
        """How many of the processor's breakpoints the user has, for code and for data."""


class Debugger(Breakpoints, Protocol):
    """What a session asks of the debugger that it runs in."""

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Around what a user's Ctrl-C may end (a handler of the user's), within what it must not."""


class Machine(PhysicalMemory, Cpus, Monitor, Protocol):
    """A stopped machine, whole."""
