"""The text and the code of a site: written, verified, and taken back in the order in which that is safe.

The text of an armed site is ours only while the machine runs for the user (:attr:`Int3Dispatch.all_disarmed`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from gdb_kprobe.errors import KprobeError, RefusedError
from gdb_kprobe.guest.function_text import guest_kprobe_in
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.region.records import Record
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.hits.int3_dispatch import Int3Dispatch
from gdb_kprobe.session.hits.stepping import Stepping
from gdb_kprobe.session.hits.stub import StubDispatcher
from gdb_kprobe.session.probes import Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.ftrace_borrows import FtraceBorrows
from gdb_kprobe.session.sites.saved_jumps import is_as_saved
from gdb_kprobe.session.transaction import apply, apply_by_page, holds, verify, write_verified


class Arming:
    """Arms and disarms the sites of *sites*, as they are planned. The machine must be stopped."""

    def __init__(
        self,
        guest: Guest,
        region: Region,
        sites: SiteTable,
        int3: Int3Dispatch,
        dispatcher: StubDispatcher,
        stepping: Stepping,
    ) -> None:
        self._guest = guest
        self._region = region
        self._sites = sites
        self._int3 = int3
        self._dispatcher = dispatcher
        self._stepping = stepping
        self._borrows = FtraceBorrows(guest)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the guest is not as it was, though its text is."""
        return tuple(self._borrows.kept.values())

    def begin(self) -> None:
        """An act begins: give back to the guest's ftrace what could not be given back."""
        self._borrows.forget()
        self._borrows.retry()

    def forget(self) -> None:
        """The machine may have run: who traces must be found out anew."""
        self._borrows.forget()

    def arm(self, site: Site) -> None:
        """Record first, then the slot, the breakpoint, and the text last: at no moment is an int3 without a way out."""
        plan = site.plan
        # What the guest has put there since the plan was made.
        refusal = guest_kprobe_in(self._guest, plan.patch.range)
        if refusal is not None:
            raise RefusedError(f"cannot probe {self._guest.place_of(site.addr)}", refusal)
        with contextlib.ExitStack() as undo:
            borrowed = self._borrows.needed(plan.patch.range)
            marked = next((site.record for site in borrowed), None)
            record = Record(plan.patch, plan.slot, plan.rung, borrowed=marked)
            self._region.commit()
            self._region.records.add(record)
            undo.callback(self._region.records.remove, site.addr)
            write_verified(self._guest.memory, plan.slot.start, plan.slot_image)
            undo.callback(self._int3.tidy)
            undo.callback(self._int3.close, site)
            self._int3.open(site)
            undo.callback(self._borrows.give_back, plan.patch.range)
            self._borrows.borrow(plan.patch.range, borrowed)
            # It counts as armed from here: should the connection be lost in the middle of the write, what undoes
            # the session must know of it.
            self._sites.mark_armed(site)
            undo.callback(self._mark_disarmed, site, keep_record=True)
            if self._int3.all_disarmed:
                verify(self._guest.memory, [plan.patch])
            else:
                apply(self._guest.memory, [plan.patch])
            undo.pop_all()

    def disarm(self, site: Site, *, trapped: bool = True, comes_back: bool = False) -> None:
        """Text first; a vCPU that has taken the int3 already is sent back to the instruction.

        *trapped*: there may be one. It is not, when all were brought out and the machine has not run since.
        *comes_back*: the site is armed again, with another plan; what is known of hits stays.
        """
        patch = site.plan.patch
        if trapped:
            self._dispatcher.undo_traps(site)
        # A write that was cut off may have happened all the same.
        if self._guest.memory.read(patch.addr, len(patch.old)) != patch.old:
            apply(self._guest.memory, [patch.inverse])
        self._mark_disarmed(site, comes_back=comes_back)

    def lose(self, site: Site) -> None:
        """The text of *site* is other text now, or gone: nothing is written there."""
        self._borrows.drop(site.plan.patch.range)
        self._mark_disarmed(site)

    def serve(self, site: Site) -> None:
        """Have the hits of *site*, which is armed, handled as its probes want now."""
        self._int3.serve(site)
        self._release_retired(site)

    def settle(self, site: Site) -> None:
        """*site* was armed, disarmed or served: take away what it, and all others, need no more."""
        self._release_retired(site)
        self._int3.tidy()

    def serves_no_int3(self, site: Site) -> None:
        """*site* is a jump now: what served its int3 is not needed any more."""
        self._int3.free(site)

    def free(self, site: Site) -> None:
        """*site* is dropped: give back what it has in the region."""
        self._region.slots.free(site.plan.slot)
        self._int3.free(site)
        while site.retired:
            self._region.counters.free(site.retired.pop())

    def put_back(self, site: Site) -> None:
        """No kprobe of the guest's has saved the jump of *site* any more: it goes as all others, while all are away."""
        site.saved = False
        if (
            self._int3.all_disarmed
            and self._guest.memory.read(site.addr, len(site.plan.patch.new)) == site.plan.patch.new
        ):
            apply(self._guest.memory, [site.plan.patch.inverse])

    def is_gone(self, site: Site) -> bool:
        """Whether the module that *site* is in was unloaded, or unloaded and loaded again: its text is not ours."""
        if site.owner is None:
            return False  # the core kernel's stays
        if self._guest.owner_of(site.addr) != site.owner:
            return True
        if site.addr in self._stepping.watched:
            return False
        patch = site.plan.patch
        if site.saved:
            return not is_as_saved(self._guest.memory, site.addr, patch.new)
        return site.armed and not holds(
            self._guest.memory, site.addr, patch.old if self._int3.all_disarmed else patch.new
        )

    def holds_ours(self, site: Site) -> bool:
        """Whether the text of *site* is ours, and the guest must not run without us."""
        if site.saved:
            return False
        return holds(self._guest.memory, site.addr, site.plan.patch.new)

    def write_patches(self, is_lost: Callable[[], bool], check: Callable[[Site], None]) -> list[str]:
        """Patch the text of all armed sites; returns what could not be, and why.

        *check* raises a KprobeError for a site that must not be hit when the machine runs now.

        :raises KprobeError: *is_lost* says that it is other memory: nothing more is written there.
        """
        problems: list[str] = []

        def fail(site: Site, error: KprobeError) -> None:
            if is_lost():
                raise error
            self._mark_disarmed(site)
            problems.append(f"{self._guest.place_of(site.addr)} is not probed any more: {error.message}")

        with self._region.memory.batch():
            sites: dict[VirtAddr, Site] = {}
            for site in self._sites.armed():
                # One that is saved was never taken away.
                if site.saved or site.addr in self._stepping.watched:
                    continue
                try:
                    check(site)
                except KprobeError as error:
                    fail(site, error)
                else:
                    sites[site.plan.patch.addr] = site
            for patch in apply_by_page(self._guest.memory, [site.plan.patch for site in sites.values()]):
                try:
                    apply(self._guest.memory, [patch])
                except KprobeError as error:
                    fail(sites[patch.addr], error)
        return problems

    def write_originals(self) -> None:
        """Restore the text of all armed sites; they stay armed."""
        with self._region.memory.batch():
            ours = [site.plan.patch.inverse for site in self._sites.armed() if not site.saved]
            for patch in apply_by_page(self._guest.memory, ours):
                if holds(self._guest.memory, patch.addr, patch.old):
                    apply(self._guest.memory, [patch])

    def _release_retired(self, site: Site) -> None:
        """Give back the counters of probes that are gone, and that the code of *site* does not lead to any more."""
        if not site.retired or site.saved:
            return
        counted = counted_in(site)
        for counter in [counter for counter in site.retired if counter.addr not in counted]:
            site.retired.remove(counter)
            self._region.counters.free(counter)

    def _mark_disarmed(self, site: Site, *, keep_record: bool = False, comes_back: bool = False) -> None:
        if not site.armed:
            return
        self._sites.mark_disarmed(site)
        self._int3.close(site)
        self._borrows.give_back(site.plan.patch.range)
        if not comes_back:
            self._dispatcher.forget(site)
        if not keep_record:
            self._region.records.remove(site.addr)


def counted_in(site: Site) -> frozenset[VirtAddr]:
    """The counters that the code of *site* leads to."""
    return frozenset(handler.data for handler in site.handlers)
