"""The nops that are borrowed from the guest's ftrace, for as long as a probe of ours is in one.

Why and how is in :mod:`gdb_kprobe.linux.ftrace`. A record that the guest has marked itself is not used by its ftrace:
there is nothing to borrow then, and nothing to give back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gdb_kprobe.errors import StaleTextError, UnmappedError
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.linux.ftrace import SITE_SIZE, FtraceSite, FtraceTracers
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.session.transaction import apply


def give_back(guest: Guest, site: FtraceSite, tracers: FtraceTracers) -> str | None:
    """Take our mark from the record of *site*, whose text is restored; returns why it must stay, for the user."""
    try:
        now = replace(site, data=guest.memory.read(site.record, len(site.data)))
        text = guest.memory.read(site.ip, SITE_SIZE)
        why = tracers.why_not_return(site.ip) or now.why_not_return(site.ip, text)
        if why is None:
            apply(guest.memory, [CodePatch(now.record, now.data, now.returned)])
            return None
    except (StaleTextError, UnmappedError) as error:
        why = error.message
    return f"the guest's ftrace leaves {guest.place_of(site.ip)} alone from now on: {why}"


@dataclass(slots=True)
class _Loan:
    """A record that is marked, and the patched places that share a byte with its nop."""

    site: FtraceSite
    users: set[VirtAddr] = field(default_factory=set)


class FtraceBorrows:
    """What is borrowed of *guest*. The machine must be stopped whenever a method is called."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._loans: dict[int, _Loan] = {}
        """By the address of the nop."""
        self._tracers: FtraceTracers | None = None
        self.kept: dict[VirtAddr, str] = {}
        """The nops that are ftrace's again but for their mark, and what the user is to know of it."""

    def forget(self) -> None:
        """The machine may have run: who traces must be found out anew."""
        self._tracers = None

    def needed(self, text: AddressRange) -> tuple[FtraceSite, ...]:
        """What must be marked while *text* is patched, as it is without our mark."""
        held = self._loans_in(text)
        if held:
            return tuple(loan.site for loan in held)
        return tuple(site for site in self._guest.ftrace_sites(text) if not site.is_disabled)

    def borrow(self, text: AddressRange, sites: Iterable[FtraceSite]) -> None:
        """Mark *sites*, which are :meth:`needed` for *text*, for it is about to be patched.

        :raises StaleTextError: the guest has changed a record since it was asked whether it may be borrowed.
        """
        for site in sites:
            if site.ip not in self._loans:
                apply(self._guest.memory, [CodePatch(site.record, site.data, site.borrowed)])
                self._loans[site.ip] = _Loan(site)
            self.kept.pop(site.ip, None)
            self._loans[site.ip].users.add(text.start)

    def give_back(self, text: AddressRange) -> None:
        """*text*, which was patched, is as it was."""
        for loan in self._loans_in(text):
            loan.users.discard(text.start)
            if not loan.users:
                self._return(loan.site)

    def drop(self, text: AddressRange) -> None:
        """*text* is gone, and its record with it."""
        for loan in self._loans_in(text):
            self._loans.pop(loan.site.ip)
            self.kept.pop(loan.site.ip, None)

    def retry(self) -> None:
        """Give back what could not be before."""
        for ip in tuple(self.kept):
            del self.kept[ip]
            self._return(self._loans[ip].site)

    def _loans_in(self, text: AddressRange) -> list[_Loan]:
        near = range(text.start - SITE_SIZE + 1, text.end)
        return [self._loans[ip] for ip in near if ip in self._loans]

    def _return(self, site: FtraceSite) -> None:
        if self._tracers is None:
            self._tracers = self._guest.ftrace_tracers()
        told = give_back(self._guest, site, self._tracers)
        if told is None:
            del self._loans[site.ip]
        else:
            self.kept[site.ip] = told
