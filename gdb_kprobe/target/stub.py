"""QEMU's gdbstub, above any carrier of packets: memory, registers, stepping.

Memory is addressed physically (``Qqemu.PhyMemMode``), because a memory packet is translated with the CR3 of the
stopped vCPU, which under page-table isolation often is the user's and has no kernel text.

Registers are read all at once, by ``g``, once for each vCPU after each run, and all questions are answered from that.
An accelerator keeps a vCPU's registers to itself while it runs: QEMU's handlers of ``g`` and ``G`` fetch them first
(``cpu_synchronize_state``), those of ``p`` and ``P`` do not. Under KVM a ``p`` without a ``g`` since the last run tells
the registers of an earlier stop, and what such a ``P`` writes is lost.
"""

from __future__ import annotations

import contextlib
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.model import CpuId, PhysAddr, VirtAddr
from gdb_kprobe.target.protocols import PacketChannel
from gdb_kprobe.target.quirks import Quirks, ask

_READ_CHUNK = 2048
"""Bytes of one ``m`` packet: QEMU's PacketSize is 0x1000 characters, two for a byte."""

_WRITE_CHUNK = 2000
"""Bytes of one ``M`` packet, which has its address, too."""

_TOGETHER = 128
"""Writes of a batch that are sent in one exchange: so long does a Ctrl-C wait at the most."""

_XML_CHUNK = 0xFFB

_STEP_PATIENCE = 30.0
"""Seconds in which a step has come back: one instruction, on a host that may be busy."""

_BRIEFLY = 0.02
"""Seconds for which vCPUs run so that each has begun to."""

_TF = 1 << 8
"""RFLAGS: a trap after the next instruction."""
_PGE = 1 << 7
"""CR4: translations may be global. Changed either way, it empties the TLB (SDM volume 3, 4.10.4.1)."""
_PUSHF = re.compile(rb"(?:\x66|[\x40-\x4f])*\x9c", re.S)

_NEEDED_ENTRIES = 2
"""How many of the places where exceptions lead must be watched in a step by the trap flag: the first so many."""

_RUN_SLICE = 0.25
"""Seconds between two looks at where the vCPUs are, should a stop have told of another one than the one wanted."""


class QemuStub:
    """A stopped machine behind QEMU's gdbstub (a :class:`~gdb_kprobe.target.protocols.Machine`)."""

    def __init__(self, channel: PacketChannel) -> None:
        self._channel = channel
        self.shown: CpuId | None = None
        self._physical_depth = 0
        # QEMU keeps the mode over connections: a client that was killed may have left its memory packets physical.
        self._is_virtual = False
        self._selected: CpuId | None = None
        self._registers: dict[str, tuple[int, int, int]] = {}  # name -> number, offset in `g`, size
        self._cpus: tuple[CpuId, ...] = ()
        self.last_cpus: tuple[CpuId, ...] = ()
        """What :meth:`cpus` has answered last; for while the machine runs, when the stub answers nothing."""
        self._states: dict[CpuId, bytes] = {}  # what `g` has told since the machine last ran
        self._quirks: Quirks | None = None
        self._faults: dict[VirtAddr, int] = {}
        self._kept: list[bytes] | None = None
        """Packets of writes that a batch has not sent yet; ``None`` outside of one."""

    def use_channel(self, channel: PacketChannel) -> None:
        """Go on over another connection to the same machine (after the first was lost)."""
        self._channel = channel
        self._physical_depth = 0
        self._is_virtual = False
        self.forget()

    def forget(self) -> None:
        """Ask the stub anew for its vCPUs, which of them is selected, and their registers.

        To be called when the machine is handed to gdb, or taken back: gdb selects vCPUs and writes registers
        itself, and the machine runs, resets or loads a snapshot.
        """
        self._cpus = ()
        self._selected = None
        self._states.clear()

    # -- Cpus ---------------------------------------------------------------------------------------------------

    def cpus(self) -> tuple[CpuId, ...]:
        """All vCPUs. Asked once a stop (:meth:`forget`): the guest may get a CPU while it runs (hot-plug)."""
        if not self._cpus:
            ids: list[CpuId] = []
            reply = self._channel.send(b"qfThreadInfo")
            while reply[:1] == b"m":
                ids += [_cpu_of(item) for item in reply[1:].split(b",") if item]
                reply = self._channel.send(b"qsThreadInfo")
            self._cpus = self.last_cpus = tuple(sorted(ids))
        return self._cpus

    def select(self, cpu: CpuId) -> None:
        """Make *cpu* the one that register and memory packets speak of."""
        if self._selected != cpu:
            self._expect_ok(b"Hgp1.%x" % cpu, f"select vCPU {cpu}")
            self._selected = cpu

    def read_registers(self, cpu: CpuId) -> dict[str, int]:
        layout = self._register_layout()
        state = self._state(cpu)
        return {
            name: int.from_bytes(state[start : start + size], "little")
            for name, (_, start, size) in layout.items()
            if start + size <= len(state)
        }

    def read_register(self, cpu: CpuId, name: str) -> int:
        number, start, size = self._register_layout()[name]
        state = self._state(cpu)
        if start + size <= len(state):
            return int.from_bytes(state[start : start + size], "little")
        # `g` leaves out what QEMU adds to the core registers; but it has fetched them.
        self.select(cpu)
        return int.from_bytes(_unhex(self._channel.send(b"p%x" % number), f"{name} of vCPU {cpu}"), "little")

    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None:
        if not values:
            return
        layout = self._register_layout()
        state = bytearray(self._state(cpu))
        self.select(cpu)
        # QEMU makes of some values what the processor would: the registers are read again when they are asked for.
        del self._states[cpu]
        if len(values) == 1:
            ((name, value),) = values.items()
            number, _, size = layout[name]
            raw = value.to_bytes(size, "little").hex().encode()
            self._expect_ok(b"P%x=%b" % (number, raw), f"write {name} of vCPU {cpu}")
            return
        end = 0
        for name, value in values.items():
            _, start, size = layout[name]
            state[start : start + size] = value.to_bytes(size, "little")
            end = max(end, start + size)
        # Only as many as that: QEMU 8.0 and later give x87 registers in another order than they take them.
        self._expect_ok(b"G" + state[:end].hex().encode(), f"write the registers of vCPU {cpu}")

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        self._be_virtual()
        self.select(cpu)
        parts: list[bytes] = []
        for start, count in _chunks(addr, size, _READ_CHUNK):
            reply = self._channel.send(b"m%x,%x" % (start, count))
            if _is_error(reply) or len(reply) != 2 * count:
                return None
            parts.append(bytes.fromhex(reply.decode()))
        return b"".join(parts)

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        self._be_virtual()
        self.select(cpu)
        for start, count in _chunks(addr, len(data), _WRITE_CHUNK):
            chunk = data[start - addr : start - addr + count]
            if self._channel.send(b"M%x,%x:%b" % (start, count, chunk.hex().encode())) != b"OK":
                return False
        return True

    def step(self, cpu: CpuId) -> None:
        if self.quirks.steps_by_trap_flag:
            self._step_by_trap_flag(cpu)
        else:
            self._step(cpu)

    def watch_faults(self, entries: Mapping[VirtAddr, int]) -> None:
        self._faults = dict(entries)

    def drop_trap_flag(self, cpu: CpuId) -> None:
        if not self.quirks.steps_by_trap_flag:
            return
        registers = self.read_registers(cpu)
        if registers["eflags"] & _TF:
            self.write_registers(cpu, {"eflags": registers["eflags"] & ~_TF})
        if registers["rip"] in self._faults:
            self._clear_pushed_flag(cpu, VirtAddr(registers["rsp"] + self._faults[VirtAddr(registers["rip"])]))

    def run_briefly(self) -> None:
        self.forget()
        self._channel.run_for(_BRIEFLY, heed=False)

    @contextlib.contextmanager
    def flushed(self) -> Iterator[None]:
        # CR4 and not CR3: where a vCPU runs code of 32 bits, the stub takes 32 bits only of a control register, and
        # CR3 may have more (gdb_write_reg_cs64 in QEMU's target/i386/gdbstub.c).
        before = {cpu: self.read_register(cpu, "cr4") for cpu in self.cpus()}
        for cpu, cr4 in before.items():
            self.write_registers(cpu, {"cr4": cr4 ^ _PGE})
        try:
            yield
        finally:
            for cpu, cr4 in before.items():
                self.write_registers(cpu, {"cr4": cr4 & _PGE | self.read_register(cpu, "cr4") & ~_PGE})

    @property
    def quirks(self) -> Quirks:
        if self._quirks is None:
            self._quirks = ask(self._channel)
        return self._quirks

    def check_can_run(self) -> None:
        self._channel.check_can_run()

    def run_to(self, addrs: Collection[VirtAddr], seconds: float, *, heed: bool = True) -> CpuId | None:
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as undo:
            for addr in addrs:
                # Of the hardware kind: no accelerator writes to memory for it, so that it may be anywhere.
                undo.callback(self._channel.send, b"z1,%x,1" % addr)
                self._expect_ok(b"Z1,%x,1" % addr, f"set a breakpoint at {addr:#x}")
            while (left := deadline - time.monotonic()) > 0:
                self.forget()
                self._channel.run_for(min(left, _RUN_SLICE), heed=heed)
                for cpu in self.cpus():
                    if self.read_register(cpu, "rip") in addrs:
                        return cpu
        return None

    def drop_breakpoints(self) -> None:
        # '?' drops those of one vCPU, the one of the last Hc (QEMU 7.2, gdbstub.c handle_target_halt); at a connection
        # that is the first one, and the others keep theirs.
        for cpu in reversed(self.cpus()):
            self._expect_ok(b"Hcp1.%x" % cpu, f"choose vCPU {cpu}")
            self._channel.send(b"?")

    # -- PhysicalMemory -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def physical_mode(self) -> Iterator[None]:
        """Make memory packets physical. It holds for everybody on the stub, so it is left at once, come what may."""
        if self._physical_depth == 0:
            self._is_virtual = False
            try:
                self._expect_ok(b"Qqemu.PhyMemMode:1", "switch to physical addresses")
            except BaseException:
                with contextlib.suppress(TargetError, ConnectionLostError):  # it may have been heard all the same
                    self._channel.send(b"Qqemu.PhyMemMode:0")
                raise
        self._physical_depth += 1
        try:
            yield
        finally:
            self._physical_depth -= 1
            if self._physical_depth == 0:
                self._be_virtual()

    def _be_virtual(self) -> None:
        """Make memory packets virtual, outside of :meth:`physical_mode`."""
        if not self._physical_depth and not self._is_virtual:
            self._expect_ok(b"Qqemu.PhyMemMode:0", "switch to virtual addresses")
            self._is_virtual = True

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        parts: list[bytes] = []
        self._send_kept()
        with self.physical_mode():
            for start, count in _chunks(addr, size, _READ_CHUNK):
                reply = self._channel.send(b"m%x,%x" % (start, count))
                if _is_error(reply) or len(reply) != 2 * count:
                    raise TargetError(f"no guest memory at physical {start:#x} ({count} bytes): {reply[:16]!r}")
                parts.append(bytes.fromhex(reply.decode()))
        return b"".join(parts)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        with self.physical_mode():
            for start, count in _chunks(addr, len(data), _WRITE_CHUNK):
                chunk = data[start - addr : start - addr + count]
                packet = b"M%x,%x:%b" % (start, count, chunk.hex().encode())
                if self._kept is None:
                    self._expect_ok(packet, f"write {count} bytes at physical {start:#x}")
                else:
                    self._kept.append(packet)
                    if len(self._kept) >= _TOGETHER:
                        self._send_kept()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        if self._kept is not None:
            yield
            return
        with self.physical_mode():
            self._kept = []
            try:
                yield
            finally:
                try:
                    self._send_kept()
                finally:
                    self._kept = None

    def _send_kept(self) -> None:
        """Send the writes that a batch has kept, if there are any.

        :raises TargetError: one was not possible.
        """
        if not self._kept:
            return
        packets, self._kept = self._kept, []
        for packet, reply in zip(packets, self._channel.send_all(packets), strict=True):
            if reply != b"OK":
                what = packet[1 : packet.index(b":")].decode()
                raise TargetError(f"the gdbstub would not write to physical memory ({what}): it answered {reply!r}")

    # -- Monitor ------------------------------------------------------------------------------------------------

    def monitor(self, command: str) -> str:
        return self._channel.monitor(command)

    # -- private ------------------------------------------------------------------------------------------------

    def _state(self, cpu: CpuId) -> bytes:
        """All registers of *cpu*, as ``g`` gives them."""
        if cpu not in self._states:
            self.select(cpu)
            self._states[cpu] = _unhex(self._channel.send(b"g"), f"the registers of vCPU {cpu}")
        return self._states[cpu]

    def _step(self, cpu: CpuId) -> None:
        self._selected = None
        self._states.clear()
        reply = self._channel.run_for(_STEP_PATIENCE, heed=False, how=b"vCont;s:p1.%x" % cpu)
        if reply is None:
            raise TargetError(
                f"vCPU {cpu} has not come back from a step in {_STEP_PATIENCE:g} s: it ran away, and was stopped",
                "the instruction has raised an exception that was not watched; see docs/kvm.md",
            )
        if reply[:1] not in (b"T", b"S"):
            raise TargetError(f"vCPU {cpu} did not step: the stub answered {reply!r}")

    def _step_by_trap_flag(self, cpu: CpuId) -> None:
        """A step that looks like one of TCG: it ends at an exception, and no trap flag of ours is left anywhere."""
        before = self.read_registers(cpu)
        rip, flags = VirtAddr(before["rip"]), before["eflags"]
        pushes = _PUSHF.match(self.read_current(cpu, rip, 4) or b"") is not None
        with contextlib.ExitStack() as undo:
            for number, entry in enumerate(self._faults):
                if self._channel.send(b"Z1,%x,1" % entry) == b"OK":
                    undo.callback(self._channel.send, b"z1,%x,1" % entry)
                elif number < _NEEDED_ENTRIES:
                    raise TargetError(
                        f"vCPU {cpu} cannot be stepped: a step under KVM needs {_NEEDED_ENTRIES} of the processor's "
                        f"{self.quirks.hardware_breakpoints} breakpoints, and they are in use",
                        "delete hardware breakpoints or watchpoints of yours",
                    )
            if not flags & _TF:
                self.write_registers(cpu, {"eflags": flags | _TF})
            self._step(cpu)
        if flags & _TF:
            return  # it was the guest's own
        self.drop_trap_flag(cpu)
        after = self.read_registers(cpu)
        if pushes and after["rip"] != rip and after["rip"] not in self._faults:
            self._clear_pushed_flag(cpu, VirtAddr(after["rsp"]))

    def _clear_pushed_flag(self, cpu: CpuId, addr: VirtAddr) -> None:
        pushed = self.read_current(cpu, addr, 2)
        if pushed is None:
            raise TargetError(f"vCPU {cpu}: the RFLAGS that a step has left at {addr:#x} cannot be read")
        word = int.from_bytes(pushed, "little")
        if word & _TF and not self.write_current(cpu, addr, (word & ~_TF).to_bytes(2, "little")):
            raise TargetError(f"vCPU {cpu}: the RFLAGS that a step has left at {addr:#x} cannot be written")

    def _expect_ok(self, packet: bytes, what: str) -> None:
        reply = self._channel.send(packet)
        if reply != b"OK":
            raise TargetError(
                f"the gdbstub would not {what}: it answered {reply.decode(errors='replace') or 'nothing'}"
            )

    def _register_layout(self) -> dict[str, tuple[int, int, int]]:
        if not self._registers:
            position = 0
            for number, (name, bits) in enumerate(self._described("target.xml")):
                if bits <= 64:
                    self._registers.setdefault(name, (number, position, bits // 8))
                position += bits // 8
        return self._registers

    def _described(self, annex: str) -> Iterator[tuple[str, int]]:
        """(name, bits) of every register of the target description, in order, includes followed."""
        root = ET.fromstring(self._read_annex(annex))
        for element in root.iter():
            if element.tag == "include":
                yield from self._described(element.attrib["href"])
            elif element.tag == "reg":
                yield element.attrib["name"], int(element.attrib["bitsize"])

    def _read_annex(self, annex: str) -> str:
        text = b""
        while True:
            reply = self._channel.send(b"qXfer:features:read:%b:%x,%x" % (annex.encode(), len(text), _XML_CHUNK))
            if reply[:1] not in (b"l", b"m"):
                raise ConnectionLostError(f"the gdbstub does not describe its registers: {reply[:40]!r}")
            text += reply[1:]
            if reply[:1] == b"l":
                # QEMU declares neither the DTD's file nor the prefix of its includes.
                return re.sub(r"<!DOCTYPE[^>]*>", "", text.decode()).replace("<xi:include", "<include")


def _chunks(addr: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """Split *size* bytes at *addr* into (address, count) of at most *most* bytes."""
    for start in range(addr, addr + size, most):
        yield start, min(most, addr + size - start)


def _unhex(reply: bytes, what: str) -> bytes:
    """:raises TargetError: *reply* is an error, or nothing."""
    if not reply or _is_error(reply):
        raise TargetError(f"the gdbstub does not tell {what}: it answered {reply.decode() or 'nothing'}")
    return bytes.fromhex(reply.decode())


def _is_error(reply: bytes) -> bool:
    return len(reply) == 3 and reply[:1] == b"E"


def _cpu_of(thread_id: bytes) -> CpuId:
    """``p01.02`` or ``02`` -> 2."""
    return CpuId(int(thread_id.rpartition(b".")[2], 16))
