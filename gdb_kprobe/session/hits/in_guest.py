"""Dispatch inside the guest: the dispatcher, its table and its handlers, put into the guest and kept up to date.

The code itself is made by :mod:`gdb_kprobe.kprobes.guest_dispatch`. The guest gets to it by one patch, the *hook*: the
call of ``exc_int3`` in the #BP entry calls the dispatcher instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from gdb_kprobe.errors import RegionError
from gdb_kprobe.kprobes import guest_dispatch as code
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.linux.bp_path import BpPath
from gdb_kprobe.model import PAGE_SIZE, Rung, VirtAddr, offset
from gdb_kprobe.region.directory import Kind, RegionObject
from gdb_kprobe.region.records import Record, RecordKind
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.probes import Handling
from gdb_kprobe.session.transaction import write_verified
from gdb_kprobe.system.paging import PageTable
from gdb_kprobe.x86.assemble import rel32
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.relocate import relocate

_FEWEST_BITS: Final = 8
"""Of the first table: one page."""


@dataclass(slots=True)
class _Table:
    """A table as it is in the guest, of 2**bits entries: probed addresses by index."""

    place: RegionObject
    bits: int
    addrs: dict[int, VirtAddr] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether one more address would make searches long."""
        return 4 * (len(self.addrs) + 1) > 3 << self.bits

    def find(self, addr: VirtAddr) -> int:
        """The index of *addr*, or of where it is to be entered."""
        index = code.table_index(addr, self.bits)
        while self.addrs.get(index, addr) != addr:
            index = (index + 1) % (1 << self.bits)
        return index


class GuestDispatch:
    """The dispatcher of one region. The machine must be stopped whenever a method is called."""

    def __init__(self, region: Region, memory: PageTable, path: BpPath) -> None:
        """Put the dispatcher into *region*; the guest does not know of it before the :attr:`hook` is applied.

        :raises RegionError: the region has no room for it.
        """
        self.path = path
        self.unattended = region.counters.allocate().missed_addr
        """Counts the hits that no host was there for, and that are of no probe."""
        self._region = region
        self._memory = memory
        self._handlers: dict[VirtAddr, VirtAddr] = {}
        self._old: list[_Table] = []
        """Tables in which a vCPU may still be searching."""
        self._table = self._new_table(_FEWEST_BITS)
        self._use(self._table)
        # A breakpoint makes QEMU run the whole page that it is in one instruction at a time: the gate has its own.
        page = region.allocate(Kind.CODE, PAGE_SIZE).range(region.header.virt)
        gate = self._gate_slot = Slot(page.start, PAGE_SIZE)
        emitted = code.emit_gate(gate.code, path.handler)
        self._write(gate, path.call.addr, emitted.code)
        self.gate = emitted.gate
        region.describe_dispatch(path.entry_text, self.gate)
        self._retired = emitted.retired
        cell = region.header.table_cell
        slot = self._allocate(len(code.emit_dispatcher(gate.code, cell, path.handler)))
        self._write(slot, path.call.addr, code.emit_dispatcher(slot.code, cell, path.handler))
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

    @property
    def known(self) -> Collection[VirtAddr]:
        """The addresses in the table: a vCPU may be on its way from an int3 at each, also from one that is gone."""
        return self._handlers.keys()

    def serve(self, addr: VirtAddr, entry: VirtAddr) -> None:
        """Have hits at *addr* go to the handler whose *entry* this is from now on.

        :raises RegionError: there is no room for a larger table.
        """
        if self._handlers.get(addr) == entry:
            return
        if addr not in self._handlers and self._table.is_full:
            self._grow()
        self._set(addr, entry)

    def retire(self, addr: VirtAddr) -> None:
        """The int3 at *addr* is gone. A vCPU that has executed it before takes the original instruction instead."""
        if addr in self._handlers:
            self._set(addr, self._retired)

    def forget_retired(self) -> bool:
        """Take the retired addresses out of the table, if there are many; whether it did.

        No vCPU may be on the #BP path.
        """
        for old in self._old:
            self._region.remove(old.place)
        self._old.clear()
        kept = self._kept()
        if 8 * (len(self._handlers) - len(kept)) < 1 << self._table.bits:
            return False
        # No vCPU is searching: none reads what is written in between.
        start = offset(self._region.header.phys, self._table.place.start)
        self._region.memory.write_physical(start, bytes(self._table.place.size))
        self._table.addrs.clear()
        self._fill(self._table, kept)
        self._handlers = kept
        return True

    # -- private ------------------------------------------------------------------------------------------------

    def _kept(self) -> dict[VirtAddr, VirtAddr]:
        return {addr: handler for addr, handler in self._handlers.items() if handler != self._retired}

    def _grow(self) -> None:
        """Have a larger table, with all that is in this one: a vCPU that has just executed an int3 looks it up there.

        :raises RegionError: there is no room for it.
        """
        larger = self._new_table(self._table.bits + 1)
        self._fill(larger, self._handlers)
        self._old.append(self._table)
        self._table = larger
        self._use(larger)

    def _new_table(self, bits: int) -> _Table:
        return _Table(self._region.allocate(Kind.TABLE, code.ENTRY.size << bits), bits)

    def _use(self, table: _Table) -> None:
        header = self._region.header
        word = code.table_word(table.place.range(header.virt).start, table.bits)
        self._region.memory.write_physical(header.physical(header.table_cell), word.to_bytes(8, "little"))

    def _fill(self, table: _Table, handlers: Mapping[VirtAddr, VirtAddr]) -> None:
        image = bytearray(table.place.size)
        for addr, handler in handlers.items():
            index = table.find(addr)
            table.addrs[index] = addr
            code.ENTRY.pack_into(image, index * code.ENTRY.size, addr, handler)
        self._region.memory.write_physical(offset(self._region.header.phys, table.place.start), bytes(image))

    def _set(self, addr: VirtAddr, handler: VirtAddr) -> None:
        for table in (*self._old, self._table):
            index = table.find(addr)
            if index not in table.addrs and table is not self._table:
                continue
            self._write_word(table, index, 8, handler)
            if index not in table.addrs:
                self._write_word(table, index, 0, addr)
                table.addrs[index] = addr
        self._handlers[addr] = handler

    def _write_word(self, table: _Table, index: int, at: int, value: int) -> None:
        addr = offset(self._region.header.phys, table.place.start + index * code.ENTRY.size + at)
        self._region.memory.write_physical(addr, value.to_bytes(8, "little"))

    def _allocate(self, size: int) -> Slot:
        slot = self._region.slots.allocate(size)
        if slot is None:
            raise RegionError(
                f"the region has no room for {size} bytes of code",
                "reserve a larger region (region.size in the profile), or delete probes; 'kprobe info' says what "
                "fills it",
            )
        self._region.commit()
        return slot

    def _write(self, slot: Slot, original: VirtAddr, image: bytes) -> None:
        write_verified(self._memory, slot.start, slot.image(original, image))
