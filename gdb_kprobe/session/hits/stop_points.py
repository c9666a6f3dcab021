"""Where a vCPU stops because of a hit, and where the interrupted context is then."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.kprobes.action import ASK_JUMP
from gdb_kprobe.model import CpuId, VirtAddr, offset
from gdb_kprobe.target.protocols import Cpus

FRAME = struct.Struct("<5Q")
"""What the processor pushes for an exception of the kernel: RIP, CS, RFLAGS, RSP, SS."""

_RF = 1 << 16
"""RFLAGS: no breakpoint at the next instruction. A processor sets it where a breakpoint has stopped it."""

Read = Callable[[int, int], bytes | None]
"""Reads so many bytes at an address of the current address space; ``None``: not mapped."""

_MASK = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Trap:
    """The context of a hit for the host. All registers but those that are here are in the vCPU, untouched.

    :ivar rip: the int3's own address, if the vCPU stands at the #BP entry.
    :ivar answer: what the guest goes on with if no host answers, if the vCPU stands at the gate in the region.
    """

    cs: int
    eflags: int
    rsp: int
    rip: VirtAddr | None = None
    answer: VirtAddr | None = None

    @property
    def from_user(self) -> bool:
        return bool(self.cs & 3)

    @property
    def remains(self) -> VirtAddr | None:
        """Where a word of ours stays on the stack, below RSP, when the host has taken the hit."""
        return None if self.answer is None else VirtAddr(self.rsp - 8 & _MASK)

    def context(self, rip: VirtAddr) -> dict[str, int]:
        """The registers that undo the way to the host, for the interrupted code to go on at *rip*."""
        return {"eflags": self.eflags, "rip": rip, "rsp": self.rsp}


class Gate(Protocol):
    """The one address at which hits stop for the host."""

    @property
    def addr(self) -> VirtAddr:
        """Where the stub's breakpoint belongs."""

    def trap_of(self, machine: Cpus, cpu: CpuId) -> Trap | None:
        """The trap that *cpu* stands at, or ``None`` when it does not stand at the gate."""

    def again(self, trap: Trap) -> dict[str, int]:
        """The registers with which a vCPU that stands at the gate with *trap* comes to it once more."""

    def interrupted(self, rip: int, rsp: int, read: Read) -> tuple[VirtAddr, int] | None:
        """What a frame at the gate tells of its hit, the int3's address or the answer's, and RSP before it.

        ``None``: *rip* is somewhere else, or its stack cannot be read.
        """


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
        return Trap(cs, eflags, old_rsp, rip=offset(VirtAddr(rip), -1))

    def again(self, trap: Trap) -> dict[str, int]:
        assert trap.rip is not None
        # From user mode the stack and the segments were changed, too. It is no hit of ours, and may pass.
        return {} if trap.from_user else trap.context(trap.rip)

    def interrupted(self, rip: int, rsp: int, read: Read) -> tuple[VirtAddr, int] | None:
        frame = read(rsp, FRAME.size) if rip == self.addr else None
        if frame is None:
            return None
        ip, _, _, old_rsp, _ = FRAME.unpack(frame)
        return offset(VirtAddr(ip), -1), old_rsp


@dataclass(frozen=True, slots=True)
class RegionGate:
    """The gate in the region: all is as at the probe, but that the answer's address is on the stack."""

    addr: VirtAddr

    def trap_of(self, machine: Cpus, cpu: CpuId) -> Trap | None:
        if machine.read_register(cpu, "rip") != self.addr:
            return None
        registers = machine.read_registers(cpu)
        rsp = registers["rsp"]
        word = machine.read_current(cpu, VirtAddr(rsp), 8)
        if word is None:
            raise TargetError(f"vCPU {cpu} stands at the gate in the region, but its stack at {rsp:#x} is not mapped")
        answer = VirtAddr(int.from_bytes(word, "little"))
        return Trap(registers["cs"], registers["eflags"] & ~_RF, (rsp + 8) & _MASK, answer=answer)

    def again(self, trap: Trap) -> dict[str, int]:
        assert trap.answer is not None
        return {"rip": offset(trap.answer, -ASK_JUMP)}

    def interrupted(self, rip: int, rsp: int, read: Read) -> tuple[VirtAddr, int] | None:
        word = read(rsp, 8) if rip == self.addr else None
        return None if word is None else (VirtAddr(int.from_bytes(word, "little")), (rsp + 8) & _MASK)
