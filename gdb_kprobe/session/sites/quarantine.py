"""Tasks and vCPUs on the way through the region: what was freed is used again, or unmapped, when there are none."""

from __future__ import annotations

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.model import AddressRange
from gdb_kprobe.region.generation import Generation
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.sites.saved_jumps import savers
from gdb_kprobe.target.protocols import Cpus


class Quarantine:
    """Whether a task or a vCPU may still come back to the freed slots and counters of *region*."""

    def __init__(self, machine: Cpus, guest: Guest, region: Region, generation: Generation) -> None:
        self._machine = machine
        self._guest = guest
        self._region = region
        self._generation = generation

    def why_not_quiet(self) -> str | None:
        """Why the region must stay: what may come back to it; ``None`` when nothing does, as far as is known.

        The vCPUs themselves may be in it.
        """
        words = ways_back(self._machine, self._guest, self._region)
        if words is None:
            return "whether a task comes back to it cannot be read"
        if words:
            return f"{len(words)} word(s) on kernel stacks, or in kprobes of the guest's own, lead into it"
        return None

    def end(self) -> bool:
        """Free for use what no task can come back to; whether there was any."""
        words = ways_back(self._machine, self._guest, self._region)
        if words is None:
            return False
        words += _positions(self._machine)
        released = self._region.slots.release(words) > 0
        released |= self._region.release_left(words) > 0
        if not self._region.slots.quarantined and not self._region.left:
            # Only code in a slot adds to one.
            released |= self._region.counters.release() > 0
        if released:
            self._generation.change()
        return released

    def is_clear(self, code: AddressRange) -> bool:
        """Whether no vCPU or task is in *code*, of the region, or comes back to it; a kprobe of the guest's apart."""
        words = _words(self._machine, self._guest, self._region)
        return words is not None and not any(word in code for word in words + _positions(self._machine))


def make_room(machine: Cpus, guest: Guest, region: Region) -> None:
    """Free for use what earlier sessions have left in *region*, as far as no task can come back to it.

    Before this session puts anything there. Of a guest in which that is never known, what they have not used is used.
    """
    if not region.left:
        return
    words = ways_back(machine, guest, region)
    if words is None:
        region.use_rest()
    else:
        region.release_left(words + _positions(machine))


def ways_back(machine: Cpus, guest: Guest, region: Region) -> list[int] | None:
    """Where a task or a vCPU comes back to in *region*; also a kprobe of the guest's own that has saved a jump there.

    ``None``: that is not known.
    """
    words = _words(machine, guest, region)
    kprobes = guest.own_kprobes()
    if words is None or kprobes.unread is not None:
        return None
    saved = savers(kprobes, region.header.code)
    return words + [kprobe.leads_to for kprobe in saved if kprobe.leads_to is not None]


def _positions(machine: Cpus) -> list[int]:
    return [machine.read_register(cpu, "rip") for cpu in machine.cpus()]


def _words(machine: Cpus, guest: Guest, region: Region) -> list[int] | None:
    """All words on stacks that point into the region; ``None`` when stacks cannot be found, or not be read."""
    pointers = {cpu: machine.read_register(cpu, "rsp") for cpu in machine.cpus()}
    try:
        return guest.stack_words_into(region.header.range, pointers)
    except (UnmappedError, GuestStateError):
        return None
