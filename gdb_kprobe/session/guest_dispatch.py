"""Dispatch inside the guest: the dispatcher, its table and its handlers, put into the guest and kept up to date.

The code itself is made by :mod:`gdb_kprobe.kprobes.guest_dispatch`. The guest gets to it by one patch, the *hook*: the
call of ``exc_int3`` in the #BP entry calls the dispatcher instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes import guest_dispatch as code
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.slots import SLOT_HEADER, Slot
from gdb_kprobe.linux.bp_path import BpPath
from gdb_kprobe.linux.paging import PageTable
from gdb_kprobe.model import PAGE_SIZE, Rung, VirtAddr, offset
from gdb_kprobe.session.header import Record, RecordKind
from gdb_kprobe.session.region import Region
from gdb_kprobe.session.transaction import write_verified
from gdb_kprobe.x86.assemble import rel32
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.relocate import relocate


@dataclass(frozen=True, slots=True)
class Handling:
    """A handler that was written to *slot*; see :class:`~gdb_kprobe.kprobes.guest_dispatch.HandlerCode`."""

    slot: Slot
    entry: VirtAddr
    answer: VirtAddr | None
    code: bytes
    """From the entry on."""


class GuestDispatch:
    """The dispatcher of one region. The machine must be stopped whenever a method is called."""

    def __init__(self, region: Region, memory: PageTable, path: BpPath) -> None:
        """Put the dispatcher into *region*; the guest does not know of it before the :attr:`hook` is applied.

        :raises RegionError: the region has no room for it.
        """
        self.path = path
        self.unattended = region.counters.allocate().missed_addr
        """Counts the hits that nobody was there for, and that are of no probe."""
        self._region = region
        self._memory = memory
        self._bits = (region.header.table.size // code.ENTRY.size).bit_length() - 1
        self._addrs: dict[int, VirtAddr] = {}
        """The table as it is in the guest: probed address by index."""
        self._handlers: dict[VirtAddr, VirtAddr] = {}
        self._clear_table()
        # A breakpoint makes QEMU run the whole page that it is in one instruction at a time: the gate has its own.
        before = -region.slots.high_water % PAGE_SIZE
        if before:
            self._allocate(before - SLOT_HEADER)
        gate = self._allocate(PAGE_SIZE - SLOT_HEADER)
        self._gate_slot = gate
        emitted = code.emit_gate(gate.code, path.handler)
        self._write(gate, path.call.addr, emitted.code)
        self.gate = emitted.gate
        region.store.describe_dispatch(path.entry_text, self.gate)
        self._retired = emitted.retired
        table = region.header.table.start
        size = len(code.emit_dispatcher(gate.code, table, self._bits, path.handler))
        slot = self._allocate(size)
        self._write(slot, path.call.addr, code.emit_dispatcher(slot.code, table, self._bits, path.handler))
        call = path.call
        self.hook = CodePatch(call.addr, call.raw, b"\xe8" + rel32("call", call.addr, call.end, slot.code))

    @property
    def hook_record(self) -> Record:
        return Record(self.hook, self._gate_slot, Rung.BOOSTED, RecordKind.HOOK)

    def make_handler(self, insn: Insn, action: Action, slot: VirtAddr | None) -> Handling:
        """Write what does *action* for the hits of *insn*, and goes on in *slot*.

        ``None``: what is there is to be stepped by the host. Without it the guest goes on in relocated code: no call of
        that leaves an address of ours.

        :raises RegionError: there is no room for it.
        """
        copy = partial(relocate, insn) if slot is None else None

        def emit(at: VirtAddr) -> code.HandlerCode:
            return code.emit_handler(at, action, insn.addr, at if slot is None else slot, copy)

        handler = self._allocate(len(emit(insn.addr if slot is None else slot).code))
        made = emit(handler.code)
        self._write(handler, insn.addr, made.code)
        return Handling(handler, made.entry, made.answer, made.code[made.entry - handler.code :])

    def serve(self, addr: VirtAddr, entry: VirtAddr) -> None:
        """Have hits at *addr* go to the handler whose *entry* this is from now on.

        :raises RegionError: the table is full.
        """
        self._set(addr, entry)

    def retire(self, addr: VirtAddr) -> None:
        """The int3 at *addr* is gone. A vCPU that has executed it before takes the original instruction instead."""
        if addr in self._handlers:
            self._set(addr, self._retired)

    def forget_retired(self) -> bool:
        """Take the retired addresses out of the table, if there are many; whether it did.

        No vCPU may be on the #BP path.
        """
        kept = {addr: handler for addr, handler in self._handlers.items() if handler != self._retired}
        if 8 * (len(self._handlers) - len(kept)) < 1 << self._bits:
            return False
        self._addrs.clear()
        self._handlers.clear()
        self._clear_table()
        for addr, handler in kept.items():
            self._set(addr, handler)
        return True

    # -- private ------------------------------------------------------------------------------------------------

    def _set(self, addr: VirtAddr, handler: VirtAddr) -> None:
        if self._handlers.get(addr) == handler:
            return
        index = self._find(addr)
        self._write_words(index, 8, handler)
        if index not in self._addrs:
            self._write_words(index, 0, addr)
            self._addrs[index] = addr
        self._handlers[addr] = handler

    def _find(self, addr: VirtAddr) -> int:
        """The index of *addr*, or of where it is to be entered.

        :raises RegionError: it is not in the table, and the table is full.
        """
        size = 1 << self._bits
        index = code.table_index(addr, self._bits)
        while self._addrs.get(index, addr) != addr:
            index = (index + 1) % size
        if index not in self._addrs and 4 * (len(self._addrs) + 1) > 3 * size:
            raise RegionError(
                f"the table of probed addresses is full ({len(self._addrs)} of {size} entries in use)",
                "delete probes and let the guest run, or reserve a larger region (region.size in the profile)",
            )
        return index

    def _write_words(self, index: int, at: int, value: int) -> None:
        addr = offset(self._region.header.table.start, index * code.ENTRY.size + at)
        self._region.memory.write_physical(self._region.header.physical(addr), value.to_bytes(8, "little"))

    def _clear_table(self) -> None:
        """The memory may hold anything; most often it is zero already, which is told faster than written."""
        table = self._region.header.table
        phys = self._region.header.physical(table.start)
        found = self._region.memory.read_physical(phys, table.size)
        for at in range(0, table.size, PAGE_SIZE):
            size = min(PAGE_SIZE, table.size - at)
            if any(found[at : at + size]):
                self._region.memory.write_physical(offset(phys, at), bytes(size))

    def _allocate(self, size: int) -> Slot:
        slot = self._region.slots.allocate(size)
        if slot is None:
            raise RegionError(
                f"the region has no room for {size} bytes of code",
                "reserve a larger region (region.size in the profile), or delete probes",
            )
        return slot

    def _write(self, slot: Slot, original: VirtAddr, image: bytes) -> None:
        write_verified(self._memory, slot.start, slot.image(original, image))
