"""Who is on the way through the region: what was freed there is used again, or unmapped, only when nobody is."""

from __future__ import annotations

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.model import AddressRange
from gdb_kprobe.region.moment import Moment
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.guest import Guest
from gdb_kprobe.session.saved_jumps import savers
from gdb_kprobe.target.protocols import Cpus


class Quarantine:
    """Whether somebody may still come back to the freed slots and counters of *region*."""

    def __init__(self, machine: Cpus, guest: Guest, region: Region, moment: Moment) -> None:
        self._machine = machine
        self._guest = guest
        self._region = region
        self._moment = moment

    def is_quiet(self) -> bool:
        """No word on any kernel stack points into the region, as far as is known. The vCPUs themselves may be in it."""
        return self._stack_words() == []

    def end(self) -> bool:
        """Free for use what nobody can come back to; whether there was any."""
        words = self._stack_words()
        if words is None:
            return False
        inside = [self._machine.read_register(cpu, "rip") for cpu in self._machine.cpus()]
        released = self._region.slots.release(words + inside) > 0
        released |= self._region.release_left(words + inside) > 0
        if not self._region.slots.quarantined and not self._region.left:
            # Whoever adds to one does it in a slot.
            released |= self._region.counters.release() > 0
        if released:
            self._moment.change()
        return released

    def is_clear(self, code: AddressRange) -> bool:
        """Whether nobody is in *code*, which is in the region, or comes back to it, a kprobe of the guest's apart."""
        words = self._words()
        inside = [self._machine.read_register(cpu, "rip") for cpu in self._machine.cpus()]
        return words is not None and not any(word in code for word in words + inside)

    def _stack_words(self) -> list[int] | None:
        """Where somebody comes back to in the region; also a kprobe of the guest's own that has saved a jump there."""
        words = self._words()
        kprobes = self._guest.own_kprobes()
        if words is None or kprobes.unread is not None:
            return None
        saved = savers(kprobes, self._region.header.code)
        return words + [kprobe.leads_to for kprobe in saved if kprobe.leads_to is not None]

    def _words(self) -> list[int] | None:
        """All words on stacks that point into the region; ``None`` when stacks cannot be found, or not be read."""
        pointers = {cpu: self._machine.read_register(cpu, "rsp") for cpu in self._machine.cpus()}
        try:
            return self._guest.stack_words_into(self._region.header.range, pointers)
        except (UnmappedError, GuestStateError):
            return None
