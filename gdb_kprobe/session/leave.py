"""Bring the vCPUs of a stopped machine out of what another session was doing when it was cut off.

All there is to go by is the records in the region and the vCPUs themselves. A vCPU may be

* at the #BP entry, with a trap that nobody has handled: the trap is undone;
* at the start of a slot, its dispatch interrupted between the writes of two registers (RFLAGS, RIP, RSP is their order)
  or before the single step: it goes back to the instruction;
* behind the single step of a slot's copy, or at the exception that it raised, not yet fixed up: that is done now;
* anywhere in a boosted slot: it is stepped out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.linux.idt import Gate
from gdb_kprobe.linux.paging import PageTable
from gdb_kprobe.model import AddressRange, CpuId, Rung, VirtAddr, offset
from gdb_kprobe.session.header import Record
from gdb_kprobe.target.protocols import Cpus
from gdb_kprobe.x86 import step
from gdb_kprobe.x86.decode import DecodeError, Insn, decode
from gdb_kprobe.x86.encoding import MAX_LENGTH

_FRAME = struct.Struct("<5Q")
_ALIGNMENT = 15
"""Bytes that an exception leaves free at the most above its frame: the CPU aligns the stack to 16."""

MAX_STEPS_OUT = 64
"""Steps that bring a vCPU out of a slot: one instruction, relocated, and a jump; one step in 500 does nothing."""


class Trapping(Protocol):
    """What must be known of a guest to do that; a :class:`~gdb_kprobe.session.guest.Guest` has it."""

    @property
    def memory(self) -> PageTable: ...

    @property
    def bp_entry(self) -> VirtAddr: ...

    @property
    def gates(self) -> Mapping[VirtAddr, Gate]: ...


def bring_out(machine: Cpus, guest: Trapping, records: Iterable[Record], code: AddressRange) -> None:
    """Bring every vCPU out of traps and slots of *records*; *code* is the whole code area of the region.

    :raises TargetError: a vCPU does not come out.
    """
    known = tuple(records)
    for cpu in machine.cpus():
        if not _undo_trap(machine, guest, cpu, known) and not _undo_entry(machine, cpu, known):
            _complete_step(machine, guest, cpu, known)
        step_out(machine, cpu, code)


def step_out(machine: Cpus, cpu: CpuId, code: AddressRange) -> bool:
    """Step *cpu* out of a slot, as the guest itself would go on; whether it was in one.

    :raises TargetError: it did not come out in a bounded number of steps.
    """
    if machine.read_register(cpu, "rip") not in code:
        return False
    for _ in range(MAX_STEPS_OUT):
        machine.step(cpu)
        if machine.read_register(cpu, "rip") not in code:
            return True
    raise TargetError(f"vCPU {cpu} does not leave the slot at {machine.read_register(cpu, 'rip'):#x}")


def trapped_at(machine: Cpus, cpu: CpuId, bp_entry: VirtAddr, site: VirtAddr) -> bool:
    """Whether *cpu* stands at the #BP entry because of the int3 at *site*."""
    return machine.read_register(cpu, "rip") == bp_entry and _frame_of(machine, cpu, site, 1 << 64) is not None


def _undo_trap(machine: Cpus, guest: Trapping, cpu: CpuId, records: tuple[Record, ...]) -> bool:
    if machine.read_register(cpu, "rip") != guest.bp_entry:
        return False
    return any(_take_frame_off(machine, cpu, record.patch.addr, 1 << 64) for record in records)


def _undo_entry(machine: Cpus, cpu: CpuId, records: tuple[Record, ...]) -> bool:
    rip = machine.read_register(cpu, "rip")
    record = next((record for record in records if rip in (record.slot.code, record.patch.addr)), None)
    if record is None:
        return False
    # Back at the instruction with the frame still there: undoing the trap was itself cut off.
    if not _take_frame_off(machine, cpu, record.patch.addr, _FRAME.size + _ALIGNMENT):
        machine.write_registers(cpu, {"rip": record.patch.addr})
    return True


def _take_frame_off(machine: Cpus, cpu: CpuId, site: VirtAddr, most: int) -> bool:
    """Undo the exception of the int3 at *site*, if its frame is what RSP points to."""
    frame = _frame_of(machine, cpu, site, most)
    if frame is None:
        return False
    eflags, rsp = frame
    machine.write_registers(cpu, {"eflags": eflags, "rip": site, "rsp": rsp})
    return True


def _frame_of(machine: Cpus, cpu: CpuId, site: VirtAddr, most: int) -> tuple[int, int] | None:
    """RFLAGS and RSP in the exception frame of the int3 at *site*, if that is what RSP points to.

    *most* is how many bytes the frame may be away from the stack that was interrupted.
    """
    at = machine.read_register(cpu, "rsp")
    data = machine.read_current(cpu, VirtAddr(at), _FRAME.size)
    if data is None:
        return None
    ip, cs, eflags, rsp, _ = _FRAME.unpack(data)
    if offset(VirtAddr(ip), -1) != site or cs & 3 or abs(rsp - at) > most:
        return None
    return eflags, rsp


def _complete_step(machine: Cpus, guest: Trapping, cpu: CpuId, records: tuple[Record, ...]) -> None:
    registers = machine.read_registers(cpu)

    def read_stack(addr: int, size: int) -> bytes:
        return machine.read_current(cpu, VirtAddr(addr), size) or b""

    for record in records:
        slot = record.slot.code
        insn = _original(guest, record)
        if record.rung is not Rung.SINGLE_STEP or insn is None:
            continue
        if registers["rip"] in guest.gates:
            saved = (int.from_bytes(read_stack(registers["rsp"] + at, 8), "little") for at in (0, 8))
            if any(slot <= word < slot + insn.length for word in saved):
                _write(machine, cpu, step.fix_up_fault(insn, slot, registers, read_stack))
                return
        behind = offset(slot, insn.length)
        astray = None if insn.branch_target is None else offset(insn.branch_target, slot - insn.addr)
        top = int.from_bytes(read_stack(registers["rsp"], 8), "little") if insn.is_call else None
        # The return address is put right before RIP is.
        called = top == behind or (top == insn.end and registers["rip"] == astray)
        if called or (registers["rip"] in (behind, astray) and not insn.is_call):
            _write(machine, cpu, step.fix_up(insn, slot, registers, registers, read_stack))
            return


def _write(machine: Cpus, cpu: CpuId, fix: step.StepFixup) -> None:
    for addr, data in fix.memory:
        if not machine.write_current(cpu, VirtAddr(addr), data):
            raise TargetError(f"vCPU {cpu}: cannot write the stack at {addr:#x} after a single step")
    machine.write_registers(cpu, fix.registers)


def _original(guest: Trapping, record: Record) -> Insn | None:
    """The instruction that the record's slot is for."""
    old, addr = record.patch.old, record.patch.addr
    # Near the end of a mapping fewer bytes than the longest instruction has may be there.
    rest = next(
        (
            guest.memory.read(addr, size)[len(old) :]
            for size in (MAX_LENGTH, 0x1000 - (addr & 0xFFF))
            if guest.memory.walk(offset(addr, size - 1)) is not None
        ),
        b"",
    )
    try:
        return decode(old + rest, addr)
    except DecodeError:
        return None
