"""The instructions that one call of a function executes, found by stepping the machine through it.

An oracle for counts: it knows nothing of probes. An instruction that is on the path k times is reached k times by every
call that takes the same path, so N such calls must be k * N hits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import AddressRange, CpuId, VirtAddr
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.x86.decode import Insn, decode

MAX_STEPS = 2000
"""A path that is longer is a mistake of the caller's, or a loop."""

_MAX_INSN = 15


@dataclass(frozen=True, slots=True)
class Executed:
    """One instruction as it was executed: *next_ip* is where it led; a call out of the ranges, once that returned."""

    insn: Insn
    next_ip: VirtAddr

    @property
    def taken(self) -> bool:
        """Of a conditional jump: whether it jumped."""
        return self.next_ip != self.insn.end


@dataclass(frozen=True, slots=True)
class CallPath:
    """All instructions of one call inside the traced ranges, in order; *caller* is where it returned to."""

    executed: tuple[Executed, ...]
    caller: VirtAddr

    def counts(self) -> Counter[VirtAddr]:
        """How often each instruction is executed in one call, by address."""
        return Counter(step.insn.addr for step in self.executed)


class PathTracer:
    """Steps the machine behind the gdbstub at *address*, which has no other client meanwhile.

    *read* gives *size* bytes of kernel text.
    """

    def __init__(self, address: str, read: Callable[[VirtAddr, int], bytes], timeout: float = 30) -> None:
        self._address = address
        self._read = read
        self._timeout = timeout

    def trace(self, ranges: Sequence[AddressRange], start_call: Callable[[], object] = lambda: None) -> CallPath:
        """Follow one call of the function that begins *ranges*, inside these; what it calls outside runs freely.

        *start_call* is called when the machine runs with a breakpoint at the function, and must not wait for it.
        Afterwards the machine runs.

        :raises TargetError: the call did not come, or did not end.
        """
        entry = ranges[0].start
        with RspSocket(self._address) as channel:
            stub = QemuStub(channel)
            try:
                cpu = self._run_to(channel, stub, entry, start_call)
                return self._follow(channel, stub, cpu, ranges)
            finally:
                channel.detach()

    def _follow(self, channel: RspSocket, stub: QemuStub, cpu: CpuId, ranges: Sequence[AddressRange]) -> CallPath:
        at = VirtAddr(stub.read_register(cpu, "rip"))
        caller = self._stack_top(stub, cpu)
        executed: list[Executed] = []
        while at != caller:
            if len(executed) == MAX_STEPS:
                raise TargetError(f"no end of the call after {MAX_STEPS} instructions; it is at {at:#x}")
            insn = decode(self._read(at, _MAX_INSN + 1), at)
            reached = self._step(stub, cpu)
            if insn.is_call and not any(reached in window for window in ranges):
                cpu = self._run_to(channel, stub, insn.end)
                reached = insn.end
            executed.append(Executed(insn, reached))
            at = reached
            if at != caller and not any(at in window for window in ranges):
                self._run_to(channel, stub, caller)  # a tail call
                break
        return CallPath(tuple(executed), caller)

    def _step(self, stub: QemuStub, cpu: CpuId) -> VirtAddr:
        """Execute one instruction. One step in some 500 executes nothing."""
        before = stub.read_register(cpu, "rip")
        for _ in range(16):
            stub.step(cpu)
            after = stub.read_register(cpu, "rip")
            if after != before:
                return VirtAddr(after)
        raise TargetError(f"vCPU {cpu} does not step at {before:#x}")

    def _run_to(
        self, channel: RspSocket, stub: QemuStub, addr: VirtAddr, when_running: Callable[[], object] = lambda: None
    ) -> CpuId:
        channel.send(b"Z1,%x,1" % addr)
        channel.resume()
        when_running()
        stopped = channel.wait_stop(self._timeout)
        if stopped is None:
            channel.interrupt()
            channel.wait_stop(self._timeout)
            raise TargetError(f"{addr:#x} was not reached within {self._timeout:g} s")
        channel.send(b"z1,%x,1" % addr)
        stub.forget()
        cpu = next((cpu for cpu in stub.cpus() if stub.read_register(cpu, "rip") == addr), None)
        if cpu is None:
            raise TargetError(f"the machine stopped somewhere else than at {addr:#x}: {stopped!r}")
        return cpu

    def _stack_top(self, stub: QemuStub, cpu: CpuId) -> VirtAddr:
        rsp = stub.read_register(cpu, "rsp")
        data = stub.read_current(cpu, VirtAddr(rsp), 8)
        if data is None:
            raise TargetError(f"the stack at {rsp:#x} is not mapped")
        return VirtAddr(int.from_bytes(data, "little"))
