"""The sites of a session: each as its probes and the moment want it, moved from rung to rung."""

from __future__ import annotations

from dataclasses import replace

from gdb_kprobe.errors import KprobeError, RefusedError, RegionError
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.arming import Arming, counted_in
from gdb_kprobe.session.sites.plans import SitePlans
from gdb_kprobe.session.sites.probe_store import ProbeStore
from gdb_kprobe.session.sites.saved_sites import SavedSites
from gdb_kprobe.session.sites.windows import JumpRequest


class Sites:
    """Puts probes at sites, and has each site of *sites* as it is wanted: no other one decides what is armed, and how.

    The machine must be stopped whenever a method is called.
    """

    def __init__(
        self, guest: Guest, sites: SiteTable, plans: SitePlans, arming: Arming, saved: SavedSites, store: ProbeStore
    ) -> None:
        self._guest = guest
        self._sites = sites
        self._plans = plans
        self._arming = arming
        self._saved = saved
        self._store = store

    def forget_moment(self) -> None:
        """The machine may have run: who is where, and who traces, must be found out anew."""
        self._plans.forget()
        self._arming.forget()

    def begin(self) -> None:
        """An act begins: :meth:`forget_moment`, and give back to the guest's ftrace what could not be given back."""
        self._plans.forget()
        self._arming.begin()

    def shape(self) -> list[object]:
        """What is armed, and how: equal before and after what has changed nothing."""
        return [(site.addr, site.armed, site.plan, site.service) for site in self._sites.values()]

    def preview(self, place: Place, condition: Condition | None, strategy: Rung | None) -> Plan:
        """What a probe at *place* would be; nothing is changed.

        :raises RefusedError: a rule says no.
        """
        site = self._sites.get(place.at)
        if site is not None and site.saved:
            return self._saved.preview(site, place, condition)
        if site is not None:
            return site.plan
        return self._plans.preview(place, condition, strategy)

    def put(self, probe: Probe, place: Place) -> None:
        """Have *probe* at *place*: with those that are there already, or at a new site.

        :raises RefusedError: a rule says no.
        :raises RegionError: the region is full, also without what waits in quarantine for nothing.
        :raises KprobeError: the site is of another rung than *probe* asks for, or the guest does not hold what it must.
        """
        try:
            self._put(probe, place)
        except RegionError:
            if not self._store.make_room():
                raise
            self._put(probe, place)

    def _put(self, probe: Probe, place: Place) -> None:
        site, strategy = self._sites.get(place.at), probe.strategy
        at = self._guest.place_of(place.at)
        self._plans.check_entry(place)
        is_saved = site is not None and site.saved
        if is_saved:
            pass  # its plan stays
        elif (
            site is not None
            and probe.post is not None
            and site.plan.rung is not Rung.SINGLE_STEP
            and self._plans.steps_alone(site)
        ):
            self._replan(site, self._plans.plan(at, True, None))
        elif site is not None and not site.probes and strategy not in (None, site.plan.rung):
            # It is only a fixup that is watched: any rung will do.
            self._replan(site, self._plans.plan(at, False, strategy))
        self._show(at.addr)
        probe.place = place
        try:
            self._store.enter(probe)
            if site is None:
                request = self._plans.request(at.addr, [probe])
                with self._plans.explained(place):
                    plan = self._plans.plan(at, probe.post is not None, strategy, request)
                site = self._sites.add(self._new_site(plan))
            elif is_saved:
                site.plan = self._saved.join(site, probe)
            elif strategy not in (None, site.strategy, site.plan.rung):
                raise KprobeError(
                    f"{at} is probed already, as {site.plan.rung}",
                    f"'set kprobe strategy auto', or delete {', '.join(other.name for other in site.probes)} first",
                )
            site.probes.append(probe)
            self.match(site)
        except BaseException:
            probe.place = None
            self._store.strike(probe)
            if site is not None:
                if probe in site.probes:
                    site.probes.remove(probe)
                self._drop_unused(site)
            raise

    def take(self, probe: Probe) -> None:
        """Take *probe* away; the site's text and slot go with its last probe. No room is needed for that.

        :raises KprobeError: the module that it was in is gone.
        """
        site = self._sites.need(probe)
        at = site.probes.index(probe)
        site.probes.remove(probe)
        try:
            self.match_fewer(site)
        except BaseException:
            site.probes.insert(at, probe)
            raise
        counter = probe.counter
        if counter is not None and (site.saved or counter.addr in counted_in(site)):
            self._store.retire(probe)
            site.retired.append(counter)
        else:
            self._store.strike(probe)
        self._drop_unused(site)

    def forget(self, site: Site) -> tuple[Probe, ...]:
        """Drop *site* and write nothing to its text: it is other text now. Returns its probes.

        They are gone; :meth:`Int3Dispatch.tidy` takes away what nobody needs any more.
        """
        self._sites.drop(site)
        self._arming.lose(site)
        for probe in site.probes:
            probe.gone = True
        self._arming.free(site)
        return tuple(site.probes)

    def settle_saved(self, site: Site) -> None:
        """No kprobe of the guest's has the jump of *site* saved any more: have it as its probes want."""
        self._arming.put_back(site)
        self.match(site)
        self._drop_unused(site)

    # -- rungs ----------------------------------------------------------------------------------------------------

    def match(self, site: Site) -> None:
        """Arm or disarm *site*, as its probes want; one that is saved stays, and its counters do what they are told."""
        if site.saved:
            if site.armed:
                self._arming.serve(site)
            return
        if site.wanted:
            self._fit(site)
        if site.wanted and not site.armed:
            self._arm(site)
        elif not site.wanted and site.armed:
            self.disarm(site)
        elif site.armed:
            self._arming.serve(site)
        self._arming.settle(site)

    def match_fewer(self, site: Site) -> None:
        """As :meth:`match`, where less is wanted of *site* than before: that needs no room in the region.

        Where there is none, the code stays that there is: the counters of what is not wanted any more do not count. At
        each resume it is tried again.
        """
        try:
            self.match(site)
        except (RefusedError, RegionError) as error:
            is_full = isinstance(error, RegionError) or error.refusal.reason is Reason.REGION_FULL
            if not (is_full and site.armed and site.wanted):
                raise

    def serve_all(self) -> list[str]:
        """Have the hits of all handled as their probes and listeners want now; returns what went wrong."""
        problems = []
        for site in self._sites.armed():
            if site.served is not None and not site.retired and site.served == self._plans.wants(site):
                continue
            site.served = None
            try:
                self.serve(site)
            except KprobeError as error:
                problems.append(f"{self._guest.place_of(site.addr)} is handled as before: {error.message}")
            else:
                site.served = self._plans.wants(site)
        return problems

    def serve(self, site: Site) -> None:
        """Have the hits of *site*, which is armed, handled as its probes and listeners want now."""
        if site.is_jump:
            self._fit(site)
        if site.is_jump:
            self._arming.settle(site)
        else:
            self._arming.serve(site)

    def match_jumps(self, *, stepped: bool = False) -> list[str]:
        """Before the machine runs: take jumps away that must not be there, and try those again that could not be.

        *stepped*: it runs for a step of the user's. Returns what went wrong.
        """
        self._plans.forget(stepped=stepped)
        problems: list[str] = []
        for site, refusal in tuple(self._plans.disturbed()):
            if site.is_jump and not site.saved:
                try:
                    self._lower_rung(site, refusal)
                except KprobeError as error:
                    self.disarm(site, trapped=False)
                    problems.append(
                        f"{self._guest.place_of(site.addr)} is not probed any more: its jump must go ({refusal}), and "
                        f"there can be no int3: {error.message}"
                    )
        for site in self._sites.armed():
            declined = site.plan.not_optimized
            if (declined is not None and declined.reason.is_transient) or (
                stepped and site.is_jump and site.needs_post
            ):
                try:
                    self._fit(site)
                except KprobeError as error:
                    problems.append(f"{self._guest.place_of(site.addr)} stays {site.plan.rung}: {error.message}")
        return problems

    def disarm(self, site: Site, *, trapped: bool = True, comes_back: bool = False) -> None:
        """Restore the text of *site* (:meth:`Arming.disarm`), and end the watch of its fixup."""
        self._arming.disarm(site, trapped=trapped, comes_back=comes_back)
        self._unwatch_fixup(site)

    # -- private --------------------------------------------------------------------------------------------------

    def _arm(self, site: Site) -> None:
        self._watch_fixup(site)
        try:
            self._arming.arm(site)
        except BaseException:
            self._unwatch_fixup(site)
            raise

    def _new_site(self, plan: Plan) -> Site:
        addr = plan.insn.addr
        fixup = self._guest.fixup_of(addr)
        # Some are fixed up by being executed again, with another operand: nothing to watch.
        watched = None if fixup == addr else fixup
        return Site(plan, fixup=watched, owner=self._guest.owner_of(addr), faults=fixup is not None)

    def _drop_unused(self, site: Site) -> None:
        if not site.in_use and not site.saved:
            self._sites.drop(site)
            self._arming.free(site)

    def _fit(self, site: Site) -> None:
        """Have *site* on the rung that its probes want now, and that the moment allows."""
        if not site.probes or site.saved:
            return
        request = self._plans.request(site.addr, site.probes, bool(site.watchers))
        detour, declined = site.plan.detour, site.plan.not_optimized
        if detour is None:
            if isinstance(request, Refusal) or declined is None or not declined.reason.may_pass:
                return
        elif isinstance(request, JumpRequest) and request.action == detour.action:
            why = None if site.armed else request.check(detour.window)
            if why is None:
                return
            request = why
        place = self._guest.place_of(site.addr)
        plan = self._plans.plan(place, site.needs_post, site.strategy, request)
        full = plan.not_optimized
        if detour is not None and plan.detour is None and full is not None and full.reason is Reason.REGION_FULL:
            self._plans.discard(plan)
            raise RefusedError(f"{place} keeps the jump that it has", full)
        self._replan(site, plan)

    def _show(self, addr: VirtAddr) -> None:
        """Take away the jump that hides the instruction at *addr*; it comes back when nobody needs that any more."""
        site = self._sites.hiding(addr)
        self._saved.check_not_saved(site, addr)
        if site is not None:
            self._lower_rung(site, Refusal(Reason.PROBED_INSIDE, site.addr, f"at {self._guest.place_of(addr)}"))

    def _lower_rung(self, site: Site, why: Refusal) -> None:
        """Have *site* use an int3 for now."""
        self._replan(site, self._plans.plan(self._guest.place_of(site.addr), site.needs_post, site.strategy, why))

    def _replan(self, site: Site, plan: Plan) -> None:
        """Put *plan* in the place of the one that *site* has."""
        old, armed = site.plan, site.armed
        if not (plan.detour or old.detour) and plan.rung is old.rung:
            self._plans.discard(plan)  # only the reason is another one
            site.plan = replace(old, declined=plan.declined)
            return
        try:
            if armed:
                self.disarm(site, comes_back=True)
            site.plan = plan
            if armed:
                self._arm(site)
        except BaseException:
            self._plans.discard(plan)
            site.plan = old
            if armed and not site.armed:
                self._arm(site)
            raise
        self._plans.free(old)
        if plan.detour:
            self._arming.serves_no_int3(site)

    def _watch_fixup(self, site: Site) -> None:
        """Arm a site where a fault of *site*'s instruction is fixed up: a hit there ends the one that faulted.

        :raises RefusedError: that place cannot be probed.
        """
        if site.fixup is None:
            return
        place = self._guest.place_of(site.fixup)
        watch = self._sites.get(site.fixup)
        if watch is None:
            try:
                plan = self._plans.plan(place, False, None)
            except RefusedError as error:
                detail = f"its fixup at {place} cannot be watched: {error.refusal}"
                refusal = Refusal(Reason.EX_TABLE, site.addr, detail, error.refusal.hint)
                raise RefusedError(f"cannot probe {self._guest.place_of(site.addr)}", refusal) from error
            watch = self._sites.add(self._new_site(plan))
        watch.watchers.add(site.addr)
        try:
            self.match(watch)
        except BaseException:
            watch.watchers.discard(site.addr)
            self._drop_unused(watch)
            raise

    def _unwatch_fixup(self, site: Site) -> None:
        watch = self._sites.get(site.fixup) if site.fixup is not None else None
        if watch is not None:
            watch.watchers.discard(site.addr)
            self.match(watch)
            self._drop_unused(watch)
