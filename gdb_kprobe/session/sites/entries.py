"""Where a probe on a function goes: behind what its entry is for others.

At a function's start may be a landing pad (:mod:`gdb_kprobe.kprobes.landing`), which is never replaced, and behind it
the 5-byte nop of the guest's ftrace (:mod:`gdb_kprobe.linux.ftrace`). Both do nothing, so the registers behind them are
those of the call. A probe on the function goes behind the nop: then the guest's tracers, kprobes, BPF programs and live
patches of that function work as if we were not there. The nop itself is patched, borrowed of the guest's ftrace, only
when the profile says so (``policy.entry: borrow``).

The address that the user named stays the probe's: it is what the list, a trace and ``%ip`` show, as a kprobe of the
guest's own has the address of the nop wherever it is called from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Final

from gdb_kprobe.errors import RefusedError, UnmappedError
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.landing import LANDING_PAD_SIZE, landing_pad_size
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.ftrace import SITE_SIZE
from gdb_kprobe.model import AddressRange, Entry, Reason, Refusal, VirtAddr, offset

_BORROW: Final = "'policy: {entry: borrow}' in the profile, which takes the function's nop from the guest's ftrace"


class Entries:
    """The entries of *guest*'s functions, of whose text *text* knows what is ours; *sites* are our probed addresses."""

    def __init__(self, guest: Guest, text: TextMap, policy: Entry, sites: Container[VirtAddr]) -> None:
        self._guest = guest
        self._text = text
        self._policy = policy
        self._sites = sites

    def place_of(self, location: Location) -> Place:
        """Where the user wants a probe, and where it goes (:attr:`Place.at`).

        :raises RefusedError: there is no such place.
        """
        place = self._guest.resolve(location)
        if place.symbol is None:
            return place
        nop = offset(place.start, self._pad(place))
        if place.addr not in (place.start, nop):
            return place
        return replace(place, behind=self._where(nop) - place.addr)

    def refusal(self, place: Place) -> Refusal | None:
        """Why hits at :attr:`Place.at` would not be the calls of the function, if they would not."""
        if not place.behind:
            return None
        known = self._guest.references(self._text)
        if known is None or not known.is_target(place.at, place.at + 1):
            return None
        return Refusal(
            Reason.LOOP_HEAD,
            place.at,
            f"{self._guest.place_of(place.at)}, behind its entry",
            f"name {self._guest.place_of(place.at)} to have each of its rounds counted; or {_BORROW}",
        )

    @contextlib.contextmanager
    def explained(self, place: Place) -> Iterator[None]:
        """Have a refusal at :attr:`Place.at` say what else there is for a probe on the function."""
        try:
            yield
        except RefusedError as error:
            if self._policy is Entry.BORROW or place.behind < SITE_SIZE:
                raise
            refusal = error.refusal
            hint = f"{refusal.hint}; or {_BORROW}" if refusal.hint else _BORROW
            what = f"cannot probe {place}, behind its entry"
            raise RefusedError(what, replace(refusal, hint=hint)) from error

    def redirected(self, place: Place, text: AddressRange) -> str:
        """Why hits of a probe at *place*, which has patched *text*, are not the calls of the function; empty: they are.

        Whatever the function's calls go to instead (a live patch) is not probed; or is never called, where our patch is
        on the nop that leads there.
        """
        redirects = self._guest.redirects()
        if not redirects or place.symbol is None:
            return ""
        nop = next((at for at in (place.start, offset(place.start, LANDING_PAD_SIZE)) if at in redirects), None)
        if nop is None:
            return ""
        redirect = redirects[nop]
        name = place.symbol.name
        if text.overlaps(AddressRange(nop, offset(nop, SITE_SIZE))):
            return f"{redirect.by} of {name} has no effect while this probe is on the function's nop"
        to = "elsewhere" if redirect.to is None else f"to {self._guest.place_of(redirect.to)}"
        still = ", but for those of tasks that still run the old one" if redirect.changing else ""
        return f"calls of {name} go {to} ({redirect.by}){still}: what is probed here is not executed"

    def _pad(self, place: Place) -> int:
        try:
            return landing_pad_size(self._guest.memory.read(place.start, LANDING_PAD_SIZE))
        except UnmappedError:
            return 0

    def _where(self, nop: VirtAddr) -> VirtAddr:
        """Where the probe goes of a function whose nop, if it has one, is at *nop*."""
        site = next(
            (site for site in self._guest.ftrace_sites(AddressRange(nop, offset(nop, 1))) if site.ip == nop), None
        )
        if site is None:
            return nop
        # Where a tracer's call is there, it is not to be had; nor where there is nothing of ours yet to share it with.
        if self._policy is Entry.BORROW and (nop in self._sites or not site.is_enabled):
            return nop
        return offset(nop, SITE_SIZE)
