"""The nops that are borrowed from the guest's ftrace, for as long as a probe of ours is in one.

Why and how is in :mod:`gdb_kprobe.linux.ftrace`. A record that the guest has marked itself is not used by its ftrace:
there is nothing to borrow then, and nothing to give back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gdb_kprobe.errors import StaleTextError, UnmappedError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.linux.ftrace import SITE_SIZE, FtraceSite, FtraceTracers
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.session.guest import Guest
from gdb_kprobe.session.transaction import apply


@dataclass(slots=True)
class _Loan:
    """A record that is marked, and the patched places that share a byte with its nop."""

    site: FtraceSite
    users: set[VirtAddr] = field(default_factory=set)


class Borrows:
    """What is borrowed of *guest*. The machine must be stopped whenever a method is called."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._loans: dict[int, _Loan] = {}
        """By the address of the nop."""
        self._tracers: FtraceTracers | None = None
        self.kept: dict[VirtAddr, str] = {}
        """The nops that are ftrace's again but for their mark, and why: it leaves these functions alone."""

    def forget(self) -> None:
        """The machine may have run: who traces must be found out anew."""
        self._tracers = None

    def record_in(self, text: AddressRange) -> VirtAddr | None:
        """The record that must be marked before *text* is patched."""
        return next((loan.site.record for loan in self._loans_for(text)), None)

    def borrow(self, text: AddressRange) -> None:
        """Mark what *text*, which is about to be patched, shares with ftrace.

        :raises StaleTextError: the guest has changed a record since it was asked whether it may be borrowed.
        """
        for loan in self._loans_for(text):
            ip = loan.site.ip
            if ip not in self._loans:
                apply(self._guest.memory, [CodePatch(loan.site.record, loan.site.data, loan.site.borrowed)])
                self._loans[ip] = loan
            self.kept.pop(ip, None)
            loan.users.add(text.start)

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

    def _loans_for(self, text: AddressRange) -> list[_Loan]:
        free = (site for site in self._guest.ftrace_sites(text) if not site.is_disabled)
        return self._loans_in(text) or [_Loan(site) for site in free]

    def _return(self, site: FtraceSite) -> None:
        if self._tracers is None:
            self._tracers = self._guest.ftrace_tracers()
        why = self._tracers.why_not_return(site.ip)
        if why is None:
            try:
                now = replace(site, data=self._guest.memory.read(site.record, len(site.data)))
                why = now.why_not_return(site.ip, self._guest.memory.read(site.ip, SITE_SIZE))
                if why is None:
                    apply(self._guest.memory, [CodePatch(now.record, now.data, now.returned)])
                    del self._loans[site.ip]
            except (StaleTextError, UnmappedError) as error:
                why = error.message
        if why is not None:
            self.kept[site.ip] = why
