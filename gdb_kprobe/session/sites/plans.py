"""What a site is to be, in the guest as it is now: the plan, the jump that its probes ask for, room for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.detour import Flags
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import Boost, Entry, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.entries import Entries
from gdb_kprobe.session.sites.jumps import Jumps
from gdb_kprobe.session.sites.planner import Planner
from gdb_kprobe.session.sites.probe_store import ProbeStore
from gdb_kprobe.session.sites.windows import JumpRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """What the profile says of how places are probed (``policy`` in docs/reference/profiles.md).

    :ivar rungs: what may be used, best first.
    :ivar boost: by whose rules an instruction is boosted.
    :ivar entry: where a probe on a function goes.
    :ivar jumps: probes may be optimized, if *rungs* says so too; not where every hit is to be dispatched by the stub.
    """

    rungs: tuple[Rung, ...]
    boost: Boost = Boost.RELOCATE
    entry: Entry = Entry.BEHIND
    jumps: bool = True


class SitePlans:
    """Makes the plans of a session; nothing but slots is taken for one."""

    def __init__(
        self, guest: Guest, region: Region, sites: SiteTable, policy: Policy, jumps: Jumps, store: ProbeStore
    ) -> None:
        self._guest = guest
        self._sites = sites
        self._jumps = jumps
        self._store = store
        self._slots = region.slots
        self._counter = region.header.virt
        self._entries = Entries(guest, sites.text, policy.entry, sites)
        self._planner = Planner(guest, sites.text, region.slots, policy.rungs, policy.boost)

    def place_of(self, location: Location) -> Place:
        """Where the user wants a probe, and where it goes.

        :raises RefusedError: there is no such place.
        """
        return self._entries.place_of(location)

    def check_entry(self, place: Place) -> None:
        """:raises RefusedError: hits there would not be the calls of the function that the user named."""
        refusal = self._entries.refusal(place)
        if refusal is not None:
            raise RefusedError(f"cannot probe {place}", refusal)

    def explained(self, place: Place) -> AbstractContextManager[None]:
        """Around a plan of where the probe of *place* goes: a refusal says where that is."""
        return self._entries.explained(place)

    def redirected(self, probe: Probe) -> str:
        """Why the hits of *probe* are not the calls of its function, if they are not."""
        site = self._sites.of(probe)
        if site is None or probe.place is None:
            return ""
        return self._entries.redirected(probe.place, site.plan.patch.range)

    def preview(self, place: Place, condition: Condition | None, strategy: Rung | None) -> Plan:
        """What a probe at *place*, where there is none, would be; its slot is not taken.

        :raises RefusedError: a rule says no.
        """
        self.check_entry(place)
        request = self._jumps.preview(place, condition, self._counter)
        with self.explained(place):
            plan = self.plan(self._guest.place_of(place.at), False, strategy, request)
        self.discard(plan)
        return plan

    def request(self, addr: VirtAddr, probes: Iterable[Probe], watched: bool = False) -> JumpRequest | Refusal:
        """The jump for *probes* at *addr*, or why there must be none; *watched*: a hit there tells of a fixup."""
        return self._jumps.request(addr, probes, watched)

    def wants(self, site: Site) -> object:
        """What decides how the hits of *site* are to be handled: equal as long as there is nothing to be changed."""
        return site.plan, site.service, bool(site.watchers), self._jumps.wants(site.probes)

    def plan(
        self, place: Place, needs_post: bool, strategy: Rung | None, request: JumpRequest | Refusal | None = None
    ) -> Plan:
        """Plan *place*. Where a jump is asked for and must wait, it is planned for an int3 until then."""
        if request is None:
            request = Refusal(Reason.NEEDS_HOST, place.addr)
        try:
            return self._plan_in_room(place, needs_post, strategy, request)
        except RefusedError as error:
            if strategy is not Rung.OPTIMIZED or not error.refusal.reason.is_transient:
                raise
            return self._plan_in_room(place, needs_post, None, error.refusal)

    def discard(self, plan: Plan) -> None:
        """*plan* is not carried out: nothing was written to its slot."""
        self._slots.discard(plan.slot)

    def free(self, plan: Plan) -> None:
        """*plan* is replaced by another one: its slot waits until no task is in it."""
        self._slots.free(plan.slot)

    def steps_alone(self, site: Site) -> bool:
        """Whether a post-handler needs the instruction of *site* in a copy of its own, on the single-step rung."""
        return self._planner.steps_alone(site.plan.insn)

    def flags_under(self, place: Place) -> tuple[Flags, bool]:
        """How the detour of our jump at *place*, which has a kprobe of the guest's on it, saves the flags.

        And whether no instruction reads them before they are written.
        """
        return self._planner.flags_under(place)

    def disturbed(self) -> Iterator[tuple[Site, Refusal]]:
        """The sites whose jump must not be written before the machine runs, and why."""
        return self._jumps.disturbed()

    def forget(self, *, stepped: bool = False) -> None:
        """The machine may have run, and the user may have typed: who is where must be found out anew.

        *stepped*: it is about to run for a step of the user's.
        """
        self._jumps.forget(stepped=stepped)

    def _plan_in_room(
        self, place: Place, needs_post: bool, strategy: Rung | None, request: JumpRequest | Refusal
    ) -> Plan:
        """Plan *place*; where the region is full, once more without what waits in quarantine for nothing."""
        plan: Plan | None = None
        try:
            plan = self._planner.plan(place, needs_post=needs_post, strategy=strategy, request=request)
            refusal = plan.not_optimized
        except RefusedError as error:
            refusal = error.refusal
            if refusal.reason is not Reason.REGION_FULL or not self._store.make_room():
                raise
        if plan is not None:
            if refusal is None or refusal.reason is not Reason.REGION_FULL or not self._store.make_room():
                return plan
            self._slots.discard(plan.slot)
        return self._planner.plan(place, needs_post=needs_post, strategy=strategy, request=request)
