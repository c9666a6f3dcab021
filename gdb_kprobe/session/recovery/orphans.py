"""Probes that another session has left armed, found before anything is known of the guest's kernel.

A debugger that connects to such a guest must not let it run: its next hit would be an int3 that nothing handles. So
the region is looked for at every connection, by what costs milliseconds: the page tables, and the magic of a header
where a mapping begins. No symbols are read, and no profile is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.model import CpuId, PhysAddr, Rung, VirtAddr
from gdb_kprobe.region.definitions import forget_definitions
from gdb_kprobe.region.header import MAGIC, Header, damaged, read_header
from gdb_kprobe.region.records import Record, RecordKind, clear_records, iter_records, read_records
from gdb_kprobe.region.region import mapped_slots, why_not_mapped
from gdb_kprobe.session.hits.evacuate import bring_out, trapped_at
from gdb_kprobe.session.recovery.restore import is_armed, restore_site
from gdb_kprobe.system import idt
from gdb_kprobe.system.paging import PageTable, kernel_root, loaded_table
from gdb_kprobe.target.protocols import Machine, PhysicalMemory


@dataclass(frozen=True, slots=True)
class Leftover:
    """A region with armed sites in a guest that has no session.

    (A :class:`~gdb_kprobe.session.hits.evacuate.Trapping`.)
    """

    header: Header
    records: tuple[Record, ...]
    memory: PageTable
    bp_entry: VirtAddr
    gates: Mapping[VirtAddr, idt.Gate]

    @property
    def sites(self) -> int:
        """How many probed instructions there are."""
        return sum(record.kind is RecordKind.SITE for record in self.records)

    @property
    def dispatches_itself(self) -> bool:
        """The guest has a dispatcher of its own, or needs none for jumps: it may run with nobody watching."""
        sites = [record for record in self.records if record.kind is RecordKind.SITE]
        if all(site.rung is Rung.OPTIMIZED for site in sites):
            return True
        hooks = (record for record in self.records if record.kind is RecordKind.HOOK)
        return any(is_armed(self.memory, hook) for hook in hooks)

    def is_hit(self, machine: Machine, cpu: CpuId) -> bool:
        """Whether *cpu* stands at the #BP entry because of one of the sites."""
        return any(trapped_at(machine, cpu, self.bp_entry, record.patch.addr) for record in self.records)

    def bring_out(self, machine: Machine) -> None:
        """Send vCPUs that took one of the int3s back to it, and bring them out of the slots."""
        bring_out(machine, self, self.records, self.header)

    def let_go(self, machine: Machine) -> tuple[str, ...]:
        """Have the guest ready to run with nobody watching; returns what was left alone, and why.

        The records stay for who takes the probes over. A guest that dispatches by itself counts a miss where it would
        need us. But what is to be single-stepped may be an instruction of the exception table, which must not fault
        in our code: the guest would not find its fixup.

        :raises TargetError: the machine did not do as asked.
        """
        self.bring_out(machine)
        by_itself = self.dispatches_itself
        needing = (
            record
            for record in self.records
            if record.kind is RecordKind.SITE
            and record.rung is not Rung.OPTIMIZED
            and (record.rung is Rung.SINGLE_STEP or not by_itself)
        )
        return tuple(note for record in needing if (note := restore_site(self.memory, record)))

    def restore(self, machine: Machine) -> tuple[str, ...]:
        """Put the text back; the region stays mapped, empty. Returns what was left alone, and why.

        Not when the guest is another one meanwhile, or another program has restored it: then nothing is written.

        :raises TargetError: the machine did not do as asked.
        """
        now = find_leftover(machine)
        if now is None or now.header != self.header or now.records != self.records:
            return ("the guest is not what it was (a reset, a snapshot, another gdb); nothing was written",)
        self.memory.invalidate()
        self.bring_out(machine)
        notes = list(read_records(machine, self.header)[1])
        notes += [note for record in self.records if (note := restore_site(self.memory, record))]
        borrowed = sum(bool(record.borrowed) for record in self.records)
        if borrowed:
            notes.append(f"the guest's ftrace leaves {borrowed} function(s) alone until its next boot")
        forget_definitions(machine, self.header)
        clear_records(machine, self.header)
        return tuple(notes)


def find_leftover(machine: Machine) -> Leftover | None:
    """Look for armed sites in the stopped *machine*; ``None`` when there are none, or no kernel.

    :raises TargetError: this is no machine that we know.
    :raises RegionError: there is a region of another version of this project, or its header is damaged.
    """
    cpus = idt.read_registers(machine)
    cpu = next((cpu for cpu in cpus if cpu.is_long_mode), cpus[0])
    try:
        loaded = loaded_table(machine, cpu.cr3, cpu.cr4)
        entry = idt.find_breakpoint_handler(loaded, cpu)
        table = kernel_root(machine, cpu.cr3, cpu.cr4, entry)
        gates = idt.read_idt(table, cpu.idt_base, cpu.idt_limit).handlers()
    except GuestStateError:
        return None
    header = find_header(machine, table, entry)
    if header is None:
        return None
    records = tuple(iter_records(machine, header))
    armed = any(is_armed(table, record) for record in records)
    return Leftover(header, records, table, entry, gates) if armed else None


def find_header(memory: PhysicalMemory, table: PageTable, entry: VirtAddr) -> Header | None:
    """The header of a region that is mapped in *table*, in the kernel whose #BP entry is *entry*.

    :raises RegionError: there is a region of another version of this project, or its header is damaged.
    """
    for virt, phys in mapped_slots(table):
        header = _header_at(memory, virt, phys)
        if header is not None and header.identity.bp_entry == entry and _hangs_on_its_entry(memory, header):
            why = why_not_mapped(table, header)
            if why:
                raise damaged(replace(header, damage=why), phys)
            return header
    return None


def _header_at(memory: PhysicalMemory, virt: VirtAddr, phys: PhysAddr) -> Header | None:
    try:
        if memory.read_physical(phys, len(MAGIC)) != MAGIC:
            return None
        header = read_header(memory, phys)
    except TargetError:
        return None  # no RAM there
    if header is not None and header.damage:
        raise damaged(header, phys)
    return header if header is not None and header.virt == virt else None


def _hangs_on_its_entry(memory: PhysicalMemory, header: Header) -> bool:
    identity = header.identity
    if not identity.entry_addr:
        return True  # premapped: no entry of ours
    try:
        found = memory.read_physical(identity.entry_addr, 8)
    except TargetError:
        return False  # no RAM there
    return int.from_bytes(found, "little") == identity.entry_value
