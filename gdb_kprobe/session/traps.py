"""Where a vCPU stops because of an int3, and where the interrupted context is then."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import GENERAL_REGISTERS, CpuId, VirtAddr, offset
from gdb_kprobe.target.protocols import Cpus

FRAME = struct.Struct("<5Q")
"""What the processor pushes for an exception of the kernel: RIP, CS, RFLAGS, RSP, SS."""

REGS_BELOW_RETURN = 8
"""At the gate in the region RSP points to the return address of the hooked call, and above it is ``struct pt_regs``."""

_IN_FRAME = frozenset(("rip", "eflags", "rsp"))


@dataclass(frozen=True, slots=True)
class Trap:
    """The context that an int3 interrupted; *rip* is the int3's own address.

    *saved* holds the general registers that the vCPU itself does not hold any more.
    """

    rip: VirtAddr
    cs: int
    eflags: int
    rsp: int
    saved: Mapping[str, int]

    @property
    def from_user(self) -> bool:
        return bool(self.cs & 3)

    @property
    def context(self) -> dict[str, int]:
        """The registers that undo the exception."""
        return {**self.saved, "eflags": self.eflags, "rip": self.rip, "rsp": self.rsp}


class Gate(Protocol):
    """The one address at which int3s stop for the host."""

    @property
    def addr(self) -> VirtAddr:
        """Where the stub's breakpoint belongs."""

    def trap_of(self, machine: Cpus, cpu: CpuId) -> Trap | None:
        """The trap that *cpu* stands at, or ``None`` when it does not stand at the gate."""


@dataclass(frozen=True, slots=True)
class EntryGate:
    """The #BP entry, IDT[3]: nothing of the handler has run, all registers but those in the frame are untouched."""

    addr: VirtAddr

    def trap_of(self, machine: Cpus, cpu: CpuId) -> Trap | None:
        if machine.read_register(cpu, "rip") != self.addr:
            return None
        rsp = machine.read_register(cpu, "rsp")
        frame = machine.read_current(cpu, VirtAddr(rsp), FRAME.size)
        if frame is None:
            raise TargetError(f"vCPU {cpu} stands at the #BP entry, but its stack at {rsp:#x} is not mapped")
        rip, cs, eflags, old_rsp, _ = FRAME.unpack(frame)
        return Trap(offset(VirtAddr(rip), -1), cs, eflags, old_rsp, {})


@dataclass(frozen=True, slots=True)
class RegionGate:
    """The dispatcher's own gate in the region: the registers are in a ``struct pt_regs`` on the stack.

    Only hits that the dispatcher sends there come to it, with what the entry code has done to the registers, and
    nothing else, behind them.
    """

    addr: VirtAddr

    def trap_of(self, machine: Cpus, cpu: CpuId) -> Trap | None:
        if machine.read_register(cpu, "rip") != self.addr:
            return None
        at = machine.read_register(cpu, "rsp") + REGS_BELOW_RETURN
        data = machine.read_current(cpu, VirtAddr(at), pt_regs.SIZE)
        if data is None:
            raise TargetError(f"vCPU {cpu} stands at the gate in the region, but its stack at {at:#x} is not mapped")
        regs = pt_regs.unpack(data)
        saved = {name: regs[name] for name in GENERAL_REGISTERS if name not in _IN_FRAME}
        return Trap(offset(VirtAddr(regs["rip"]), -1), regs["cs"], regs["eflags"], regs["rsp"], saved)
