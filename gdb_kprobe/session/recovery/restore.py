"""Put a guest right that another gdb left with probes armed, from what the region's header says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gdb_kprobe.errors import GuestStateError, NeedsTypesError, TargetError, UnmappedError
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.region.definitions import Definition, read_definitions
from gdb_kprobe.region.directory import why_damaged
from gdb_kprobe.region.header import Header, Identity, damaged, read_header
from gdb_kprobe.region.records import Record, RecordKind, iter_records, read_records
from gdb_kprobe.region.region import is_mapped_anywhere, links_of, unlink, why_not_mapped
from gdb_kprobe.session.hits.evacuate import bring_out
from gdb_kprobe.session.sites.ftrace_borrows import give_back
from gdb_kprobe.session.sites.saved_jumps import HINT, saved_records, some, why, why_perhaps
from gdb_kprobe.session.transaction import holds, write_verified
from gdb_kprobe.target.protocols import Machine, Memory, PhysicalMemory


@dataclass(frozen=True, slots=True)
class Restored:
    """What was found and done. *kept* is the header whose slots must stay, for a task may still be in one.

    *definitions* are the probes there were, with their counts. *saved* are the jumps that must stay, for kprobes of the
    guest's own have saved them (:mod:`gdb_kprobe.session.sites.saved_jumps`).
    """

    messages: tuple[str, ...] = ()
    kept: Header | None = None
    sites: int = 0
    definitions: tuple[Definition, ...] = ()
    saved: tuple[Record, ...] = ()


def restore(
    machine: Machine, memory: PhysicalMemory, guest: Guest, phys: PhysAddr, *, premapped: bool = False
) -> Restored:
    """Restore what the header at *phys* records, if it is of this boot; clear it if it is of an earlier one.

    A record that is damaged is told of, and the mapping stays then: something in text may still lead to it.

    :param premapped: the guest maps that memory itself, always.
    :raises TargetError: text could not be written; it names the sites that are left.
    :raises RegionError: the header is damaged, so that it is not known what is in text; nothing was written.
    """
    header = read_header(memory, phys)
    if header is None:
        return Restored()
    if header.damage:
        if premapped or is_mapped_anywhere(guest.memory, phys):
            raise damaged(header, phys)
        memory.write_physical(phys, bytes(8))
        return Restored((f"the region held a damaged header ({header.damage}) that is of no use to this boot; it was "
                         "cleared, no text was touched",))  # fmt: skip
    if not is_of_this_boot(memory, guest, header):
        memory.write_physical(phys, bytes(8))
        return Restored(("the region held a header of an earlier boot; it was cleared, no text was touched",))

    damage = why_not_mapped(guest.memory, header) or why_damaged(memory, header)
    if damage:
        raise damaged(replace(header, damage=damage), phys)

    machine.drop_breakpoints()
    records, damaged_records = read_records(memory, header)
    sites = tuple(record for record in records if record.kind is RecordKind.SITE)
    bring_out(machine, guest, records, header)
    kprobes = guest.own_kprobes()
    saved = tuple(saved_records(guest.memory, kprobes, header.code, records))
    sites = tuple(site for site in sites if site not in saved)
    armed = sum(is_armed(guest.memory, site) for site in sites)
    messages = [note for record in records if record not in saved and (note := restore_site(guest.memory, record))]
    if kprobes.unread is not None and saved:
        messages.append(
            f"{some(str(guest.place_of(record.patch.addr)) for record in saved)}: {why_perhaps(kprobes.unread)}: "
            "each jump stays, and the region's mapping; "
            f"{kprobes.unread.hint}"
        )
    else:
        messages += [
            f"{guest.place_of(record.patch.addr)}: {why('it')}: the jump stays, and the region's mapping; {HINT}"
            for record in saved
        ]
    messages += _return_records(guest, sites)
    messages += damaged_records
    definitions = read_definitions(memory, header)
    if armed:
        messages.insert(0, f"an earlier session left {armed} site(s) armed; their text is restored")
    elif sites:
        messages.insert(0, "an earlier session ended without a detach, while the guest was stopped with its own text")
    if not header.identity.entry_addr:
        # Mapped by the guest itself: there is nothing to unmap, and what is in the slots stays there.
        return Restored(tuple(messages), header, len(sites), definitions, saved)
    words: list[int] | None = None
    with contextlib.suppress(UnmappedError, GuestStateError):  # then it is not known who is where
        words = guest.stack_words_into(header.range, {cpu: machine.read_register(cpu, "rsp") for cpu in machine.cpus()})
    if words is None or words:
        messages.append("a task is still inside the old region: its mapping is kept")
    if words is None or words or saved or damaged_records:
        return Restored(tuple(messages), header, len(sites), definitions, saved)
    unlink(memory, machine, links_of(guest.memory, header.virt, header.phys, header.size))
    memory.write_physical(phys, bytes(8))
    guest.memory.invalidate()
    return Restored(tuple(messages), None, len(sites), definitions)


def take_back(memory: PhysicalMemory, guest: Guest, phys: PhysAddr, patches: Iterable[CodePatch]) -> None:
    """Undo those of *patches* that are in text and that the region at *phys* does not know of.

    For when the guest's memory was exchanged while they were being made: some may have been written to what came.
    """
    guest.memory.invalidate()
    header = read_header(memory, phys)
    known = set()
    if header is not None and not header.damage and is_of_this_boot(memory, guest, header):
        known = {record.patch for record in iter_records(memory, header)}
    for patch in patches:
        with contextlib.suppress(UnmappedError):
            if patch not in known and holds(guest.memory, patch.addr, patch.new):
                write_verified(guest.memory, patch.addr, patch.old)


def _return_records(guest: Guest, sites: Iterable[Record]) -> list[str]:
    """Give the guest's ftrace back what was borrowed for *sites*; their text is restored."""
    messages = []
    tracers = None
    for record in sites:
        for site in guest.ftrace_sites(record.patch.range) if record.borrowed else ():
            if not site.layout.knows_flags:
                messages.append(
                    f"the guest's ftrace may leave {guest.place_of(site.ip)} alone from now on: "
                    f"{NeedsTypesError('its record').message}"
                )
                continue
            if site.record != record.borrowed or not site.is_disabled:
                continue  # another record took its place, or it was given back for another site
            tracers = tracers or guest.ftrace_tracers()
            told = give_back(guest, site, tracers)
            if told is not None:
                messages.append(told)
    return messages


def is_of_this_boot(memory: PhysicalMemory, guest: Guest, header: Header) -> bool:
    """Whether *header* is that of a region in the guest as it is now, and not of an earlier boot."""
    found = header.identity
    now = Identity(guest.build_id, guest.text_base, guest.bp_entry, found.entry_addr, found.entry_value)
    if not found.same_boot(now):
        return False
    if not found.entry_addr:
        return True  # premapped: no entry of ours
    try:
        value = memory.read_physical(found.entry_addr, 8)
    except TargetError:
        return False
    return int.from_bytes(value, "little") == found.entry_value


def is_armed(memory: Memory, record: Record) -> bool:
    """Whether the site holds what we wrote there."""
    return holds(memory, record.patch.addr, record.patch.new)


def restore_site(memory: Memory, record: Record) -> str | None:
    """Put the text of one site back, if it still holds what we wrote; else say what it holds."""
    patch = record.patch
    try:
        found = memory.read(patch.addr, len(patch.new))
    except UnmappedError:
        return f"{patch.addr:#x} is not mapped any more; left alone"
    except TargetError as error:
        return f"{patch.addr:#x} cannot be read ({error.message}); left alone"
    if found == patch.old:
        return None
    if found != patch.new:
        return (
            f"{patch.addr:#x} holds {found.hex(' ')}, neither our {patch.new.hex(' ')} "
            f"nor the original {patch.old.hex(' ')}; left alone"
        )
    write_verified(memory, patch.addr, patch.old)
    return None
