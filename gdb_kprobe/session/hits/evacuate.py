"""Bring the vCPUs of a stopped machine out of what another session was doing when it was cut off.

All there is to go by is the records in the region and the vCPUs themselves. A vCPU may be

* at the #BP entry, or at the gate in the region, with a hit that nobody has handled: it is undone, or passes as a miss;
* between the #BP entry and the slot, in the guest's entry code or in our dispatcher: it is stepped on to the slot;
* at the start of a slot, to run there or to be stepped: it goes back to the instruction;
* behind the single step of a slot's copy, or at the exception that it raised, not yet fixed up: that is done now;
* anywhere else in a slot: it is stepped out.

It would go on right from each of them by itself, but for a trap with the guest's own #BP handler, and for an exception
whose fixup the guest does not find by an address in a slot. But the slots are about to go.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.guest.fault_entries import fault_entries
from gdb_kprobe.kprobes.action import UNDO_SIZE
from gdb_kprobe.kprobes.slots import INT3
from gdb_kprobe.model import AddressRange, CpuId, Rung, VirtAddr, offset
from gdb_kprobe.region.header import Header
from gdb_kprobe.region.records import Record, RecordKind
from gdb_kprobe.session.hits.stop_points import FRAME, EntryGate, RegionGate
from gdb_kprobe.system.idt import Gate
from gdb_kprobe.system.paging import PageTable
from gdb_kprobe.target.protocols import Cpus
from gdb_kprobe.x86 import step
from gdb_kprobe.x86.decode import DecodeError, decode
from gdb_kprobe.x86.encoding import MAX_LENGTH
from gdb_kprobe.x86.relocate import RelocateError, StepCopy, copy_for_step

_ALIGNMENT = 15
"""Bytes that an exception leaves free at the most above its frame: the CPU aligns the stack to 16."""

MAX_STEPS_OUT = 64
"""Steps that bring a vCPU out of a slot: one instruction, relocated, and a jump; one step in 500 does nothing."""

MAX_STEPS_OFF_PATH = 600
"""The same from anywhere on the #BP path: some 150 instructions, and a search of the table."""

_DEEPEST = 32
"""Words between RSP and the exception frame, at the most, on the #BP path: registers, return addresses, a gap."""

_GAP = 6 * 8
"""Bytes that asm_exc_int3 leaves free above its copy of the frame, for the emulation of a call."""


@dataclass(frozen=True, slots=True)
class BpCode:
    """The code that a vCPU runs between an int3 of ours and the slot.

    *entry_text* is the guest's part of it, *region* the code area of the region, *gate* where hits stop for the host
    (0: there is no dispatcher in the guest). *sites* are the addresses of our int3s.
    """

    entry_text: AddressRange
    region: AddressRange
    gate: VirtAddr
    sites: Container[int]

    def is_ours(self, ip: int) -> bool:
        """Whether *ip* is behind an int3 of ours, or where a handler of ours sends the vCPU: into the region."""
        return ip - 1 in self.sites or ip in self.region


class Trapping(Protocol):
    """What must be known of a guest to do that; a :class:`~gdb_kprobe.guest.guest.Guest` has it."""

    @property
    def memory(self) -> PageTable: ...

    @property
    def bp_entry(self) -> VirtAddr: ...

    @property
    def gates(self) -> Mapping[VirtAddr, Gate]: ...


def bring_out(machine: Cpus, guest: Trapping, records: Iterable[Record], header: Header) -> None:
    """Bring every vCPU out of traps and slots of *records*, which belong to the region of *header*.

    :raises TargetError: a vCPU does not come out.
    """
    known = tuple(records)
    sites = tuple(record for record in known if record.kind is RecordKind.SITE)
    machine.watch_faults(fault_entries(guest.gates))
    code = BpCode(header.entry_text, header.code, header.gate, frozenset(site.patch.addr for site in sites))
    for cpu in machine.cpus():
        _drop_trap_flag(machine, guest, cpu, sites, header.code)
        if not _undo_trap(machine, guest, cpu, sites, header) and not _undo_entry(machine, cpu, sites):
            _complete_step(machine, guest, cpu, sites)
        if header.gate and not step_off_path(machine, cpu, code):
            _undo_trap(machine, guest, cpu, sites, header)
        step_out(machine, cpu, header.code)


def step_off_path(machine: Cpus, cpu: CpuId, code: BpCode) -> bool:
    """Step *cpu* on until it has left the #BP path and the slot; ``False`` when it came to the gate and stays there.

    A vCPU that is not there because of an int3 of ours is not moved.

    :raises TargetError: it did not come out in a bounded number of steps.
    """
    for _ in range(MAX_STEPS_OFF_PATH):
        rip = machine.read_register(cpu, "rip")
        if rip == code.gate:
            return False
        if rip not in code.region and not (rip in code.entry_text and _has_frame_of_ours(machine, cpu, code)):
            return True
        machine.step(cpu)
    raise TargetError(f"vCPU {cpu} does not leave the #BP path at {machine.read_register(cpu, 'rip'):#x}")


def _has_frame_of_ours(machine: Cpus, cpu: CpuId, code: BpCode) -> bool:
    """Whether an exception frame of an int3 of ours lies where the #BP path has it: not far above RSP."""
    rsp = machine.read_register(cpu, "rsp")
    size = 8 * _DEEPEST
    data = machine.read_current(cpu, VirtAddr(rsp), size)
    if data is None:  # near the end of a stack, with nothing mapped above
        data = machine.read_current(cpu, VirtAddr(rsp), min(size, -rsp % 0x1000)) or b""
    for at in range(0, len(data) - FRAME.size + 1, 8):
        ip, cs, _, old_rsp, _ = FRAME.unpack_from(data, at)
        above = old_rsp - (rsp + at + FRAME.size)
        if code.is_ours(ip) and not cs & 3 and cs < 0x100 and 0 <= above <= _GAP + _ALIGNMENT:
            return True
    return False


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
    trap = EntryGate(bp_entry).trap_of(machine, cpu)
    return trap is not None and trap.rip == site and not trap.from_user


def _undo_trap(machine: Cpus, guest: Trapping, cpu: CpuId, sites: tuple[Record, ...], header: Header) -> bool:
    trap = EntryGate(guest.bp_entry).trap_of(machine, cpu)
    if trap is not None and trap.rip is not None:
        if trap.from_user or not any(site.patch.addr == trap.rip for site in sites):
            return False
        machine.write_registers(cpu, trap.context(trap.rip))
        return True
    trap = RegionGate(header.gate).trap_of(machine, cpu) if header.gate else None
    if trap is None or trap.answer is None:
        return False
    # What asks the host says in front of its answer where the hit may be taken back to; 0: it has happened in part.
    word = b"" if trap.answer not in header.code else guest.memory.read(offset(trap.answer, -UNDO_SIZE), UNDO_SIZE)
    undo = VirtAddr(int.from_bytes(word, "little"))
    if undo and not _is_the_guests(guest, undo, sites):
        machine.write_registers(cpu, trap.context(undo))
    else:
        machine.write_registers(cpu, trap.context(trap.answer))
    return True


def _is_the_guests(guest: Trapping, addr: VirtAddr, sites: tuple[Record, ...]) -> bool:
    """Whether there is an int3 of the guest's own at *addr*, where a jump of ours was: its kprobe has seen the hit."""
    was_a_jump = any(site.patch.addr == addr and not site.patch.new.startswith(INT3) for site in sites)
    return was_a_jump and guest.memory.walk(addr) is not None and guest.memory.read(addr, 1) == INT3


def _undo_entry(machine: Cpus, cpu: CpuId, sites: tuple[Record, ...]) -> bool:
    rip = machine.read_register(cpu, "rip")
    site = next((site for site in sites if rip == site.slot.code), None)
    if site is None:
        return False
    machine.write_registers(cpu, {"rip": site.patch.addr})
    return True


def _drop_trap_flag(machine: Cpus, guest: Trapping, cpu: CpuId, sites: tuple[Record, ...], code: AddressRange) -> None:
    """A step that was cut off may have left the flag that made it one: in a slot, or in the frame of an exception."""
    registers = machine.read_registers(cpu)
    if registers["rip"] in code:
        machine.drop_trap_flag(cpu)
    elif registers["rip"] in guest.gates:
        frame = machine.read_current(cpu, VirtAddr(registers["rsp"]), 16) or bytes(16)
        words = int.from_bytes(frame[:8], "little"), int.from_bytes(frame[8:], "little")
        if any(word in site.slot.range for word in words for site in sites):
            machine.drop_trap_flag(cpu)


def _complete_step(machine: Cpus, guest: Trapping, cpu: CpuId, sites: tuple[Record, ...]) -> None:
    registers = machine.read_registers(cpu)

    def read_stack(addr: int, size: int) -> bytes:
        return machine.read_current(cpu, VirtAddr(addr), size) or b""

    rip = registers["rip"]
    first, second = (int.from_bytes(read_stack(registers["rsp"] + at, 8), "little") for at in (0, 8))
    for record in sites:
        copy = _step_copy(guest, record) if record.rung is Rung.SINGLE_STEP else None
        if copy is None:
            continue
        if rip in guest.gates and copy.slot in (first, second):
            _write(machine, cpu, step.fix_up_fault(copy, registers, read_stack))
            return
        in_slot = rip in record.slot.range and copy.original_end(rip) is not None
        if in_slot or (copy.insn.is_call and first == copy.behind):
            _write(machine, cpu, step.fix_up(copy, registers, read_stack))
            return


def _write(machine: Cpus, cpu: CpuId, fix: step.StepFixup) -> None:
    for addr, data in fix.memory:
        if not machine.write_current(cpu, VirtAddr(addr), data):
            raise TargetError(f"vCPU {cpu}: cannot write the stack at {addr:#x} after a single step")
    machine.write_registers(cpu, fix.registers)


def _step_copy(guest: Trapping, record: Record) -> StepCopy | None:
    """What the record's slot, of the single-step rung, holds."""
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
        return copy_for_step(decode(old + rest, addr), record.slot.code)
    except (DecodeError, RelocateError):
        return None
