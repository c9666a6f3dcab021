"""The sites whose jumps kprobes of the guest's own have saved (:mod:`gdb_kprobe.session.sites.saved_jumps`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import Reason, Refusal, VirtAddr, offset
from gdb_kprobe.region.records import Record
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.jumps import Jumps
from gdb_kprobe.session.sites.plans import SitePlans
from gdb_kprobe.session.sites.quarantine import Quarantine
from gdb_kprobe.session.sites.saved_jumps import HINT, is_as_saved, plan_of, savers, some, why, why_perhaps
from gdb_kprobe.session.transaction import holds, write_verified


class SavedSites:
    """The jumps of *sites* that kprobes of the guest's own have saved, or may have."""

    def __init__(
        self, guest: Guest, region: Region, sites: SiteTable, jumps: Jumps, plans: SitePlans, quarantine: Quarantine
    ) -> None:
        self._guest = guest
        self._region = region
        self._sites = sites
        self._jumps = jumps
        self._plans = plans
        self._quarantine = quarantine

    def look(self) -> tuple[list[str], list[Site]]:
        """Which jumps have kprobes of the guest's own saved by now? What to tell of them, and the sites that are free.

        The latter were saved before, and are not now.
        """
        kprobes = self._guest.own_kprobes()
        saved = {kprobe.addr for kprobe in savers(kprobes, self._region.header.code)}
        notes = []
        for site in self._unsaved_jumps(self._sites.get(addr) for addr in saved):
            site.saved = True
            names = ", ".join(probe.name for probe in site.probes)
            notes.append(
                f"{names}: {why(self._guest.place_of(site.addr))}. Both count all hits; until it is removed in the "
                "guest the jump stays as it is, also at stops and after a detach"
            )
        if kprobes.unread is not None:
            # Not one that is away while the machine is stopped: no kprobe has come since it was there.
            there = [site for site in self._unsaved_jumps(self._sites.values()) if self.is_as_saved(site)]
            for site in there:
                site.saved = True
            if there:
                names = some(probe.name for site in there for probe in site.probes)
                notes.append(
                    f"{names}: {why_perhaps(kprobes.unread)}. Each jump stays as it is, also at stops and after a "
                    f"detach. {kprobes.unread.hint}"
                )
            return notes, []
        # A vCPU that has taken the guest's int3 may be on its way to our detour after the kprobe has gone.
        return notes, [
            site
            for site in self._sites.values()
            if site.saved and site.addr not in saved and not self._jumps.is_behind_an_int3(offset(site.addr, 1))
        ]

    def is_as_saved(self, site: Site) -> bool:
        return is_as_saved(self._guest.memory, site.addr, site.plan.patch.new)

    def keep(self, record: Record) -> None:
        """Have the jump of *record*, which another session has left because a kprobe of the guest's has saved it."""
        self._region.slots.claim(record.slot)
        plan = plan_of(self._guest.memory, record)
        if plan is None:
            return  # the record stays, and with it the region
        site = Site(plan, armed=True, owner=self._guest.owner_of(plan.insn.addr), saved=True)
        self._region.records.add(record)
        self._sites.add(site)
        self._quieten(site)

    def leave(self) -> list[str]:
        """The session ends: have the jumps that are saved do nothing but what they replace. Returns what to tell."""
        saved = [site for site in self._sites.values() if site.saved and site.armed]
        for site in saved:
            self._quieten(site)
        unread = self._guest.own_kprobes().unread
        if unread is not None and saved:
            places = some(str(self._guest.place_of(site.addr)) for site in saved)
            return [
                f"{places}: {why_perhaps(unread)}: each jump stays, and with it the region; {unread.hint}, then "
                "'kprobe detach' takes all away"
            ]
        return [
            f"{self._guest.place_of(site.addr)}: {why('it')}: the jump stays, and with it the region; {HINT}, "
            "then 'kprobe attach' and 'kprobe detach' take both away"
            for site in saved
        ]

    def preview(self, site: Site, place: Place, condition: Condition | None) -> Plan:
        """What *site* would be with one more probe, at *place*.

        :raises RefusedError: it cannot have that.
        """
        counted = self._jumps.counting(place, condition, self._region.header.virt)
        action = self._jumps.action(site.addr, site.probes) or Action()
        return self._joined(site, replace(action, handlers=(*action.handlers, counted)))

    def join(self, site: Site, probe: Probe) -> Plan:
        """Have the detour of *site*, whose jump is saved, count the hits of *probe* too; returns what it is then.

        No byte of the jump changes for that, but the code that it leads to: as far as there is room for it, and while
        nobody is there. So the probes that were there are adopted, and others are added.

        :raises RefusedError: that cannot be.
        """
        if probe.post is not None and self._plans.steps_alone(site):
            raise self._is_saved(site, site.addr, f"{probe.name} has a post-handler, which the jump cannot call")
        if probe.strategy not in (None, site.plan.rung):
            raise self._is_saved(site, site.addr, f"so {probe.name} cannot be {probe.strategy}")
        action = self._jumps.action(site.addr, [*site.probes, probe])
        if action is None:
            raise self._is_saved(site, site.addr, f"{probe.name} needs the host, which the jump cannot ask")
        plan = self._joined(site, action)
        if not holds(self._guest.memory, plan.slot.code, plan.code):
            if not self._quarantine.is_clear(plan.slot.range):
                raise self._is_saved(
                    site, site.addr, "a vCPU or a task is where it leads; try again after the guest has run"
                )
            write_verified(self._guest.memory, plan.slot.start, plan.slot_image)
        return plan

    def check_not_saved(self, site: Site | None, addr: VirtAddr) -> None:
        """:raises RefusedError: *site* cannot change for a probe at *addr*, for its jump is saved."""
        if site is not None and site.saved:
            raise self._is_saved(site, addr)

    @staticmethod
    def _unsaved_jumps(sites: Iterable[Site | None]) -> list[Site]:
        return [site for site in sites if site is not None and site.armed and site.is_jump and not site.saved]

    def _quieten(self, site: Site) -> None:
        """Have the detour of *site*, if no task is in it, count nothing: its counters may be given to other probes."""
        assert site.plan.detour is not None
        if self._quarantine.is_clear(site.plan.slot.range):
            code = replace(site.plan.detour, action=Action()).emit(site.plan.slot.code)
            write_verified(self._guest.memory, site.plan.slot.code, code)

    def _joined(self, site: Site, action: Action) -> Plan:
        """What *site*, whose jump is saved, would be with another *action*.

        :raises RefusedError: it cannot have that.
        """
        if self._guest.own_kprobes().unread is not None:
            raise self._is_saved(site, site.addr)
        assert site.plan.detour is not None
        flags, dead = self._plans.flags_under(self._guest.place_of(site.addr))
        detour = replace(site.plan.detour, action=action, flags=flags, flags_dead=dead)
        if detour.size > site.plan.slot.end - site.plan.slot.code:
            raise self._is_saved(site, site.addr, "there is no room for another probe where it leads")
        return replace(site.plan, detour=detour, code=detour.emit(site.plan.slot.code))

    def _is_saved(self, site: Site, addr: VirtAddr, detail: str = "") -> RefusedError:
        """Why there can be no probe at *addr*: *site* cannot change for it, for its jump is saved."""
        unread = self._guest.own_kprobes().unread
        told = why(self._guest.place_of(site.addr)) if unread is None else why_perhaps(unread)
        told += f"; {detail}" if detail else ""
        refusal = Refusal(Reason.GUEST_KPROBE, addr, told, HINT if unread is None else unread.hint)
        return RefusedError(f"cannot probe {self._guest.place_of(addr)}", refusal)
