"""QEMU's gdbstub over KVM, as a carrier of packets to a machine of a test: who holds a vCPU's registers is KVM's rule.

While a vCPU runs, KVM has its registers and QEMU has those of an earlier stop. ``g`` and ``G`` fetch KVM's first
(``cpu_synchronize_state``, which also notes that QEMU's are to be handed back); ``p`` and ``P`` work on QEMU's,
whatever they are. So a ``p`` may tell the registers of an earlier stop, and what a ``P`` writes may be lost; neither is
an error. With :attr:`KvmStub.strict` both are.

A step is one by the trap flag, which KVM sets only where RIP is what it was when QEMU asked for the step, and QEMU asks
before it hands over RIP: without a trap flag of the client's own, a step after RIP was written runs away.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final, Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import CpuId, PhysAddr, VirtAddr
from gdb_kprobe.target.packets import RUN

LAYOUT: Final = (
    *((name, 8) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp")),
    *((f"r{number}", 8) for number in range(8, 16)),
    ("rip", 8),
    *((name, 4) for name in ("eflags", "cs", "ss")),
    ("cr3", 8),
    ("cr4", 8),
)
"""The registers of the target description, with their sizes in bytes."""


TF: Final = 0x100
DEBUG_REGISTERS: Final = 4


class Vcpus(Protocol):
    """The machine behind the stub."""

    runs: int
    """Changes with everything that executes instructions or sets registers."""
    exception_entries: Collection[int]
    """Where the handlers of exceptions begin."""

    def cpus(self) -> tuple[CpuId, ...]: ...
    def read_registers(self, cpu: CpuId) -> dict[str, int]: ...
    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None: ...
    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None: ...
    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool: ...
    def read_physical(self, addr: PhysAddr, size: int) -> bytes: ...
    def write_physical(self, addr: PhysAddr, data: bytes) -> None: ...
    def step(self, cpu: CpuId) -> None: ...
    def monitor(self, command: str) -> str: ...
    def drop_breakpoints(self) -> None: ...


class StaleRegistersError(AssertionError):
    """A ``p`` or ``P`` came without a ``g`` since the vCPU has run."""


class RanAwayError(AssertionError):
    """A vCPU was to be stepped, and nothing stopped it behind its instruction."""


class KvmStub:
    """A :class:`~gdb_kprobe.target.protocols.PacketChannel` to *machine*."""

    strict = False
    """A packet that speaks of stale registers raises, and does not just tell or lose something."""

    def __init__(self, machine: Vcpus) -> None:
        self._machine = machine
        self._selected = machine.cpus()[0]
        self._held: dict[CpuId, dict[str, int]] = {cpu: machine.read_registers(cpu) for cpu in machine.cpus()}
        self._fetched: dict[CpuId, int] = {}
        self._is_physical = False
        self._moved: set[CpuId] = set()
        self.breakpoints: set[int] = set()
        """Those of the hardware kind that the client has set."""
        self.packets: list[bytes] = []

    def send(self, packet: bytes) -> bytes:
        self.packets.append(packet)
        if packet.startswith(b"vCont;s:p1."):
            return self._step(CpuId(int(packet[11:], 16)))
        if packet.startswith(b"qXfer:features:read:target.xml:"):
            return b"l" + _description().encode()
        if packet == b"qqemu.sstepbits":
            return b"ENABLE=1,NOIRQ=2,NOTIMER=4"
        if packet.startswith(b"Qqemu.PhyMemMode:"):
            self._is_physical = packet.endswith(b"1")
            return b"OK"
        match packet[:1]:
            case b"H":
                self._selected = CpuId(int(packet.rpartition(b".")[2], 16))
                return b"OK"
            case b"q" if packet in (b"qfThreadInfo", b"qsThreadInfo"):
                ids = b",".join(b"p01.%02x" % cpu for cpu in self._machine.cpus())
                return b"m" + ids if packet[1:2] == b"f" else b"l"
            case b"g":
                self._fetch()
                return _packed(self._held[self._selected]).hex().encode()
            case b"p":
                self._complain(packet)
                name, size = LAYOUT[int(packet[1:], 16)]
                return self._held[self._selected][name].to_bytes(size, "little").hex().encode()
            case b"G":
                self._fetch()
                return self._write(_unpacked(bytes.fromhex(packet[1:].decode())))
            case b"P":
                self._complain(packet)
                number, _, data = packet[1:].partition(b"=")
                name, _ = LAYOUT[int(number, 16)]
                return self._write({name: int.from_bytes(bytes.fromhex(data.decode()), "little")})
            case b"m" | b"M":
                return self._memory(packet)
            case b"Z" | b"z":
                addr = int(packet[3:].partition(b",")[0], 16)
                if packet[:1] == b"z":
                    self.breakpoints.discard(addr)
                elif len(self.breakpoints) >= DEBUG_REGISTERS:
                    return b"E22"
                else:
                    self.breakpoints.add(addr)
                return b"OK"
            case b"?":
                self._machine.drop_breakpoints()
                return b"T05thread:p01.01;"
        return b""

    def monitor(self, command: str) -> str:
        return self._machine.monitor(command)

    def check_can_run(self) -> None:
        """A machine of a test always can."""

    def send_all(self, packets: Sequence[bytes]) -> list[bytes]:
        return [self.send(packet) for packet in packets]

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        """The machine executes nothing by itself; it may be stepped."""
        return None if how == RUN else self.send(how)

    # -- private ------------------------------------------------------------------------------------------------

    def _is_fresh(self) -> bool:
        return self._fetched.get(self._selected) == self._machine.runs

    def _complain(self, packet: bytes) -> None:
        if self.strict and not self._is_fresh():
            raise StaleRegistersError(
                f"{packet!r} speaks of registers that vCPU {self._selected} had at an earlier stop"
            )

    def _fetch(self) -> None:
        if not self._is_fresh():
            self._moved.discard(self._selected)
            self._held[self._selected] = self._machine.read_registers(self._selected)
            self._fetched[self._selected] = self._machine.runs

    def _write(self, values: dict[str, int]) -> bytes:
        cpu, held = self._selected, self._held[self._selected]
        if self._is_fresh():  # else the next fetch takes it back
            others = [other for other, runs in self._fetched.items() if runs == self._machine.runs]
            self._machine.write_registers(cpu, values)
            if values.get("rip", held["rip"]) != held["rip"]:
                self._moved.add(cpu)
            self._fetched.update(dict.fromkeys(others, self._machine.runs))
        held |= values
        return b"OK"

    def _step(self, cpu: CpuId) -> bytes:
        machine = self._machine
        before = machine.read_registers(cpu)
        if cpu in self._moved and not before["eflags"] & TF:
            raise RanAwayError(f"vCPU {cpu} at {before['rip']:#x}: RIP was written, and TF was not")
        if not before["eflags"] & TF:
            machine.write_registers(cpu, {"eflags": before["eflags"] | TF})
        machine.step(cpu)
        after = machine.read_registers(cpu)
        if after["rip"] in machine.exception_entries and after["rip"] not in self.breakpoints:
            raise RanAwayError(f"vCPU {cpu} is in the handler of an exception at {after['rip']:#x}")
        if after["eflags"] & TF:
            machine.write_registers(cpu, {"eflags": after["eflags"] & ~TF})
        self._moved.discard(cpu)
        self._fetched.pop(cpu, None)
        return b"T05thread:p01.%02x;" % cpu

    def _memory(self, packet: bytes) -> bytes:
        found = re.fullmatch(rb"[mM]([0-9a-f]+),([0-9a-f]+)(?::([0-9a-f]*))?", packet)
        assert found is not None, packet
        addr, size = int(found[1], 16), int(found[2], 16)
        try:
            if packet[:1] == b"m":
                read = (
                    self._machine.read_physical(PhysAddr(addr), size)
                    if self._is_physical
                    else self._machine.read_current(self._selected, VirtAddr(addr), size)
                )
                return b"E14" if read is None else read.hex().encode()
            data = bytes.fromhex(found[3].decode())
            if self._is_physical:
                self._machine.write_physical(PhysAddr(addr), data)
                return b"OK"
            return b"OK" if self._machine.write_current(self._selected, VirtAddr(addr), data) else b"E14"
        except TargetError:
            return b"E14"


def _description() -> str:
    registers = "".join(f'<reg name="{name}" bitsize="{8 * size}"/>' for name, size in LAYOUT)
    return f'<?xml version="1.0"?><target><feature name="core">{registers}</feature></target>'


def _packed(values: dict[str, int]) -> bytes:
    return b"".join(values[name].to_bytes(size, "little") for name, size in LAYOUT)


def _unpacked(data: bytes) -> dict[str, int]:
    values: dict[str, int] = {}
    at = 0
    for name, size in LAYOUT:
        if at + size > len(data):
            break
        values[name] = int.from_bytes(data[at : at + size], "little")
        at += size
    return values
