"""The registers that say what a vCPU is doing, and the interrupt descriptor table they point to."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.target.protocols import Memory, Monitor

DEBUG_VECTOR = 1
NMI_VECTOR = 2
BREAKPOINT_VECTOR = 3
PAGE_FAULT_VECTOR = 14

ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
"""Exceptions for which the CPU pushes an error code (Intel SDM 6.3.1, AMD APM 8.2 for #VC and #SX)."""

_CR0_PAGING = 1 << 31
_EFER_LONG_MODE_ACTIVE = 1 << 10
_GATE_SIZE = 16


@dataclass(frozen=True, slots=True)
class SystemRegisters:
    """What QEMU's ``info registers`` says of one vCPU, numbered from 0 as QEMU does."""

    index: int
    cpl: int
    halted: bool
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gs_base: int
    idt_base: VirtAddr
    idt_limit: int

    @property
    def is_long_mode(self) -> bool:
        """Whether paging in 64-bit (or compatibility) mode is on: before that there is no kernel to look at."""
        return bool(self.cr0 & _CR0_PAGING and self.efer & _EFER_LONG_MODE_ACTIVE)


_FIELDS = {
    "cpl": (re.compile(r"\bCPL=(\d)"), 10),
    "halted": (re.compile(r"\bHLT=(\d)"), 10),
    "cr0": (re.compile(r"\bCR0=([0-9a-f]+)"), 16),
    "cr3": (re.compile(r"\bCR3=([0-9a-f]+)"), 16),
    "cr4": (re.compile(r"\bCR4=([0-9a-f]+)"), 16),
    "efer": (re.compile(r"\bEFER=([0-9a-f]+)"), 16),
    "gs_base": (re.compile(r"^GS =[0-9a-f]+ ([0-9a-f]+)", re.M), 16),
    "idt_base": (re.compile(r"^IDT= +([0-9a-f]+)", re.M), 16),
    "idt_limit": (re.compile(r"^IDT= +[0-9a-f]+ ([0-9a-f]+)", re.M), 16),
}


def parse_registers(text: str) -> tuple[SystemRegisters, ...]:
    """Read the answer to ``info registers`` (one vCPU) or ``info registers -a`` (all, each after ``CPU#n``).

    :raises TargetError: a field is missing: this is no x86 machine, or a QEMU that prints something else.
    """
    parts = re.split(r"^CPU#(\d+)\s*$", text.replace("\r", ""), flags=re.M)
    numbered = [("0", parts[0])] if len(parts) == 1 else list(zip(parts[1::2], parts[2::2], strict=True))
    return tuple(_parse_one(int(index), block) for index, block in numbered)


def _parse_one(index: int, block: str) -> SystemRegisters:
    values = {}
    for name, (pattern, base) in _FIELDS.items():
        match = pattern.search(block)
        if match is None:
            raise TargetError(
                f"QEMU's 'info registers' shows no {name} for CPU {index}",
                "only x86 machines are supported; is this the monitor of qemu-system-x86_64?",
            )
        values[name] = int(match[1], base)
    return SystemRegisters(
        index=index,
        cpl=values["cpl"],
        halted=bool(values["halted"]),
        cr0=values["cr0"],
        cr3=values["cr3"],
        cr4=values["cr4"],
        efer=values["efer"],
        gs_base=values["gs_base"],
        idt_base=VirtAddr(values["idt_base"]),
        idt_limit=values["idt_limit"],
    )


def read_registers(monitor: Monitor) -> tuple[SystemRegisters, ...]:
    """Ask QEMU for the system registers of all vCPUs.

    :raises TargetError: the answer is not understood.
    """
    return parse_registers(monitor.monitor("info registers -a"))


@dataclass(frozen=True, slots=True)
class Gate:
    """One descriptor of the IDT. *ist* is the interrupt stack's number, 0 for none."""

    vector: int
    handler: VirtAddr
    selector: int
    ist: int
    dpl: int
    is_trap: bool
    present: bool

    @property
    def pushes_error_code(self) -> bool:
        return self.vector in ERROR_CODE_VECTORS


def decode_gate(vector: int, data: bytes) -> Gate:
    """Decode the 16 bytes of a 64-bit interrupt or trap gate."""
    low, selector, ist, kind, middle, high = struct.unpack("<HHBBHI", data[:12])
    return Gate(
        vector=vector,
        handler=VirtAddr(high << 32 | middle << 16 | low),
        selector=selector,
        ist=ist & 7,
        dpl=kind >> 5 & 3,
        is_trap=kind & 0xF == 0xF,
        present=bool(kind & 0x80),
    )


@dataclass(frozen=True, slots=True)
class Idt:
    """All gates, by vector."""

    gates: tuple[Gate, ...]

    def handlers(self) -> dict[VirtAddr, Gate]:
        """The present gates by the address they enter at: "is this pc the first instruction of an exception?"."""
        return {gate.handler: gate for gate in reversed(self.gates) if gate.present}

    def breakpoint_handler(self) -> VirtAddr:
        """The entry of #BP.

        :raises GuestStateError: the gate is not there (yet).
        """
        if len(self.gates) <= BREAKPOINT_VECTOR or not self.gates[BREAKPOINT_VECTOR].present:
            raise GuestStateError(
                "the guest has no handler for #BP in its IDT",
                "it is still booting; let it run until its kernel is up",
            )
        return self.gates[BREAKPOINT_VECTOR].handler


def read_idt(memory: Memory, base: VirtAddr, limit: int) -> Idt:
    """Read the table at *base*, whose last byte is at *base* + *limit*.

    :raises UnmappedError: the table is not mapped.
    """
    count = min((limit + 1) // _GATE_SIZE, 256)
    data = memory.read(base, count * _GATE_SIZE)
    return Idt(tuple(decode_gate(i, data[i * _GATE_SIZE : (i + 1) * _GATE_SIZE]) for i in range(count)))


def find_breakpoint_handler(memory: Memory, registers: SystemRegisters) -> VirtAddr:
    """Return the entry of #BP on the vCPU of *registers*; *memory* maps the IDT (any table of the guest does).

    :raises GuestStateError: there is no 64-bit kernel yet, or its IDT has no such gate.
    """
    if not registers.is_long_mode:
        raise GuestStateError(
            f"CPU {registers.index} is not in 64-bit mode: the guest is in its firmware or has just been reset",
            "let it run until its kernel is up",
        )
    try:
        idt = read_idt(memory, registers.idt_base, registers.idt_limit)
    except TargetError as error:
        raise GuestStateError(
            f"the IDT of CPU {registers.index} at {registers.idt_base:#x} cannot be read: {error.message}",
            "the guest is in its firmware or booting; let it run until its kernel is up",
        ) from error
    return idt.breakpoint_handler()
