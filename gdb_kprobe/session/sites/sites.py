"""The sites of a session: planned, armed, moved from rung to rung, restored; each as its probes and the moment want it.

The text of an armed site is ours only while the machine runs for the user (:attr:`Int3Dispatch.all_disarmed`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

from gdb_kprobe.errors import KprobeError, RefusedError, RegionError
from gdb_kprobe.guest.function_text import guest_kprobe_in
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.kprobes.slots import SLOT_HEADER
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import Reason, Refusal, Rung, VirtAddr, offset
from gdb_kprobe.region.records import Record
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.hits.int3_dispatch import Int3Dispatch
from gdb_kprobe.session.hits.stepping import Stepping
from gdb_kprobe.session.hits.stub import StubDispatcher
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.sites.entries import Entries
from gdb_kprobe.session.sites.ftrace_borrows import FtraceBorrows
from gdb_kprobe.session.sites.jumps import Jumps
from gdb_kprobe.session.sites.planner import Planner
from gdb_kprobe.session.sites.probe_store import ProbeStore
from gdb_kprobe.session.sites.quarantine import Quarantine
from gdb_kprobe.session.sites.saved_jumps import HINT, is_as_saved, plan_of, savers, some, why, why_perhaps
from gdb_kprobe.session.sites.windows import JumpRequest
from gdb_kprobe.session.transaction import apply, holds, verify, write_verified
from gdb_kprobe.target.protocols import Machine


class Sites:
    """All sites, by address in *table*, which is shared with who finds them by that.

    The machine must be stopped whenever a method is called.
    """

    def __init__(
        self,
        machine: Machine,
        guest: Guest,
        region: Region,
        table: dict[VirtAddr, Site],
        text: TextMap,
        planner: Planner,
        int3: Int3Dispatch,
        jumps: Jumps,
        dispatcher: StubDispatcher,
        store: ProbeStore,
        quarantine: Quarantine,
        entries: Entries,
        stepping: Stepping,
    ) -> None:
        """*text* is kept in step with what is armed."""
        self._stepping = stepping
        self._machine = machine
        self._guest = guest
        self._region = region
        self._table = table
        self._text = text
        self._planner = planner
        self._int3 = int3
        self._jumps = jumps
        self._dispatcher = dispatcher
        self._store = store
        self._quarantine = quarantine
        self._entries = entries
        self._borrows = FtraceBorrows(guest)

    def all(self) -> tuple[Site, ...]:
        """Those that are disabled, or only there to be told of something, included."""
        return tuple(self._table.values())

    def armed(self) -> tuple[Site, ...]:
        return tuple(site for site in self._table.values() if site.armed)

    def of(self, probe: Probe) -> Site | None:
        """The site of *probe*; ``None`` when it has none (yet, any more, or for now)."""
        site = None if probe.place is None or probe.gone else self._table.get(probe.place.at)
        return site if site is not None and any(other is probe for other in site.probes) else None

    def need(self, probe: Probe) -> Site:
        """The site of *probe*, which must have one.

        :raises KprobeError: the module that it was in is gone, or the probe was deleted.
        """
        site = self.of(probe)
        if site is None:
            if not probe.gone:
                raise KprobeError(f"{probe.name} is not there: it was deleted", "'kprobe list' shows those that are")
            raise KprobeError(
                f"{probe.name} is gone: the module of {probe.place} was unloaded",
                f"the probe is armed again when the module is back; 'kprobe delete {probe.name}' forgets the probe",
            )
        return site

    def original_of(self, addr: int) -> VirtAddr | None:
        """The instruction that a vCPU at *addr* in a slot is at, or has just executed; ``None`` outside of slots.

        In a detour that of the displaced instructions; in front of them, where the programs are, the probed one.
        """
        if addr not in self._region.header.code:
            return None
        for site in self._table.values():
            insn = site.plan.insn
            if addr in site.plan.slot.range:
                if site.plan.detour is not None:
                    original = site.plan.detour.code(site.plan.slot.code).displaced.original(VirtAddr(addr))
                    return insn.addr if original is None else original
                return insn.addr if addr == site.plan.slot.code or insn.is_branch else insn.end
            if site.service is not None and addr in site.service.handling.slot.range:
                return insn.addr
        # One that no probe has any more says by itself what it was made for.
        freed = next((slot for slot in self._region.slots.quarantined if addr in slot.range), None)
        if freed is None:
            return None
        return VirtAddr(int.from_bytes(self._guest.memory.read(freed.start, SLOT_HEADER), "little"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the guest is not as it was, though its text is."""
        return tuple(self._borrows.kept.values())

    def forget_moment(self) -> None:
        """The machine may have run: who is where, and who traces, must be found out anew."""
        self._jumps.forget()
        self._borrows.forget()

    def begin(self) -> None:
        """An act begins: :meth:`forget_moment`, and give back to the guest's ftrace what could not be given back."""
        self.forget_moment()
        self._borrows.retry()

    def look_at_saved(self) -> tuple[list[str], list[Site]]:
        """Which jumps have kprobes of the guest's own saved by now? What to tell of them, and the sites that are free.

        The latter were saved before: they are to be :meth:`settle_saved`.
        """
        kprobes = self._guest.own_kprobes()
        saved = {kprobe.addr for kprobe in savers(kprobes, self._region.header.code)}
        notes = []
        for site in self._unsaved_jumps(self._table.get(addr) for addr in saved):
            site.saved = True
            names = ", ".join(probe.name for probe in site.probes)
            notes.append(
                f"{names}: {why(self._guest.place_of(site.addr))}. Both count all hits; until it is removed in the "
                "guest the jump stays as it is, also at stops and after a detach"
            )
        if kprobes.unread is not None:
            # Not one that is away while the machine is stopped: no kprobe has come since it was there.
            there = [site for site in self._unsaved_jumps(self._table.values()) if self._is_as_saved(site)]
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
            for site in self._table.values()
            if site.saved and site.addr not in saved and not self._jumps.is_behind_an_int3(offset(site.addr, 1))
        ]

    @staticmethod
    def _unsaved_jumps(sites: Iterable[Site | None]) -> list[Site]:
        return [site for site in sites if site is not None and site.armed and site.is_jump and not site.saved]

    def _is_as_saved(self, site: Site) -> bool:
        return is_as_saved(self._guest.memory, site.addr, site.plan.patch.new)

    def redirected(self, probe: Probe) -> str:
        """Why the hits of *probe* are not the calls of its function, if they are not."""
        site = self.of(probe)
        if site is None or probe.place is None:
            return ""
        return self._entries.redirected(probe.place, site.plan.patch.range)

    def settle_saved(self, site: Site) -> None:
        """No kprobe of the guest's has the jump of *site* saved any more: have it as its probes want."""
        site.saved = False
        if (
            self._int3.all_disarmed
            and self._guest.memory.read(site.addr, len(site.plan.patch.new)) == site.plan.patch.new
        ):
            # As all others while the machine stays stopped.
            apply(self._guest.memory, [site.plan.patch.inverse])
        self.match(site)
        self._drop_unused(site)

    def keep_saved(self, record: Record) -> None:
        """Have the jump of *record*, which another session has left because a kprobe of the guest's has saved it."""
        self._region.slots.claim(record.slot)
        plan = plan_of(self._guest.memory, record)
        if plan is None:
            return  # the record stays, and with it the region
        site = Site(plan, armed=True, owner=self._guest.owner_of(plan.insn.addr), saved=True)
        self._region.records.add(record)
        self._table[site.addr] = site
        self._text.add(plan.patch)
        self._jumps.add(site)
        self._quieten(site)

    def leave_saved(self) -> list[str]:
        """The session ends: have the jumps that are saved do nothing but what they replace. Returns what to tell."""
        saved = [site for site in self._table.values() if site.saved and site.armed]
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

    def _quieten(self, site: Site) -> None:
        """Have the detour of *site* count nothing, if nobody is in it; what it counts in may become somebody else's."""
        assert site.plan.detour is not None
        if self._quarantine.is_clear(site.plan.slot.range):
            code = replace(site.plan.detour, action=Action()).emit(site.plan.slot.code)
            write_verified(self._guest.memory, site.plan.slot.code, code)

    def _join_saved(self, site: Site, probe: Probe) -> Plan:
        """Have the detour of *site*, whose jump is saved, count the hits of *probe* too; returns what it is then.

        No byte of the jump changes for that, but the code that it leads to: as far as there is room for it, and while
        nobody is there. So the probes that were there are adopted, and others are added.

        :raises RefusedError: that cannot be.
        """
        if probe.post is not None:
            raise self._is_saved(site, site.addr, f"{probe.name} has a post-handler, which a jump does not call")
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

    def _joined(self, site: Site, action: Action) -> Plan:
        """What *site*, whose jump is saved, would be with another *action*.

        :raises RefusedError: it cannot have that.
        """
        if self._guest.own_kprobes().unread is not None:
            raise self._is_saved(site, site.addr)
        assert site.plan.detour is not None
        flags, dead = self._planner.flags_under(self._guest.place_of(site.addr))
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

    def _check_not_saved(self, site: Site | None, addr: VirtAddr) -> None:
        """:raises RefusedError: *site* cannot change for a probe at *addr*, for its jump is saved."""
        if site is not None and site.saved:
            raise self._is_saved(site, addr)

    def is_gone(self, site: Site) -> bool:
        """Whether the module that *site* is in was unloaded, or unloaded and loaded again: its text is not ours."""
        if not site.owner:
            return False  # the core kernel's stays
        if self._guest.owner_of(site.addr) != site.owner:
            return True
        if site.addr in self._stepping.watched:
            return False
        patch = site.plan.patch
        if site.saved:
            return not self._is_as_saved(site)
        return site.armed and not holds(
            self._guest.memory, site.addr, patch.old if self._int3.all_disarmed else patch.new
        )

    def holds_ours(self, site: Site) -> bool:
        """Whether the text of *site* is ours, and the guest must not run without us."""
        if site.saved:
            return False
        return holds(self._guest.memory, site.addr, site.plan.patch.new)

    def shape(self) -> list[object]:
        """What is armed, and how: equal before and after what has changed nothing."""
        return [(site.addr, site.armed, site.plan, site.service) for site in self._table.values()]

    # -- plans ----------------------------------------------------------------------------------------------------

    def place_of(self, location: Location) -> Place:
        """Where the user wants a probe, and where it goes.

        :raises RefusedError: there is no such place.
        """
        return self._entries.place_of(location)

    def preview(self, place: Place, condition: Condition | None, strategy: Rung | None) -> Plan:
        """What a probe at *place* would be; nothing is changed.

        :raises RefusedError: a rule says no.
        """
        site = self._table.get(place.at)
        if site is not None and site.saved:
            counted = self._jumps.counting(place, condition, self._region.header.virt)
            action = self._jumps.action(site.addr, site.probes) or Action()
            return self._joined(site, replace(action, handlers=(*action.handlers, counted)))
        if site is not None:
            return site.plan
        self._check_entry(place)
        request = self._jumps.preview(place, condition, self._region.header.virt)
        with self._entries.explained(place):
            plan = self._plan(self._guest.place_of(place.at), False, strategy, request)
        self._region.slots.discard(plan.slot)
        return plan

    def _check_entry(self, place: Place) -> None:
        """:raises RefusedError: hits there would not be the calls of the function that the user named."""
        refusal = self._entries.refusal(place)
        if refusal is not None:
            raise RefusedError(f"cannot probe {place}", refusal)

    def _plan(
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
            if refusal.reason is not Reason.REGION_FULL or not self._quarantine.end():
                raise
        if plan is not None:
            if refusal is None or refusal.reason is not Reason.REGION_FULL or not self._quarantine.end():
                return plan
            self._region.slots.discard(plan.slot)
        return self._planner.plan(place, needs_post=needs_post, strategy=strategy, request=request)

    # -- probes ---------------------------------------------------------------------------------------------------

    def put(self, probe: Probe, place: Place) -> None:
        """Have *probe* at *place*: with those that are there already, or at a new site.

        :raises RefusedError: a rule says no.
        :raises RegionError: the region is full, also without what waits in quarantine for nothing.
        :raises KprobeError: the site is of another rung than *probe* asks for, or the guest does not hold what it must.
        """
        try:
            self._put(probe, place)
        except RegionError:
            if not self._quarantine.end():
                raise
            self._put(probe, place)

    def _put(self, probe: Probe, place: Place) -> None:
        site, strategy = self._table.get(place.at), probe.strategy
        at = self._guest.place_of(place.at)
        self._check_entry(place)
        is_saved = site is not None and site.saved
        if is_saved:
            pass  # its plan stays
        elif site is not None and probe.post is not None and site.plan.rung is not Rung.SINGLE_STEP:
            self._replan(site, self._plan(at, True, None))
        elif site is not None and not site.probes and strategy not in (None, site.plan.rung):
            # It is only a fixup that is watched: any rung will do.
            self._replan(site, self._plan(at, False, strategy))
        self._show(at.addr)
        probe.place = place
        try:
            self._store.enter(probe)
            if site is None:
                request = self._jumps.request(at.addr, [probe])
                with self._entries.explained(place):
                    plan = self._plan(at, probe.post is not None, strategy, request)
                site = self._table[at.addr] = self._new_site(plan)
            elif is_saved:
                site.plan = self._join_saved(site, probe)
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
        site = self.need(probe)
        at = site.probes.index(probe)
        site.probes.remove(probe)
        try:
            self.match_fewer(site)
        except BaseException:
            site.probes.insert(at, probe)
            raise
        counter = probe.counter
        if counter is not None and (site.saved or counter.addr in _counted_in(site)):
            self._store.retire(probe)
            site.retired.append(counter)
        else:
            self._store.strike(probe)
        self._drop_unused(site)

    def _new_site(self, plan: Plan) -> Site:
        addr = plan.insn.addr
        fixup = self._guest.fixup_of(addr)
        # Some are fixed up by being executed again, with another operand: nothing to watch.
        watched = None if fixup == addr else fixup
        return Site(plan, fixup=watched, owner=self._guest.owner_of(addr), faults=fixup is not None)

    def _drop_unused(self, site: Site) -> None:
        if not site.in_use and not site.saved:
            del self._table[site.addr]
            self._free_slots(site)

    def _free_slots(self, site: Site) -> None:
        self._region.slots.free(site.plan.slot)
        self._int3.free(site)
        while site.retired:
            self._store.release(site.retired.pop())

    def forget(self, site: Site) -> tuple[Probe, ...]:
        """Drop *site* and write nothing to its text: it belongs to somebody else now. Returns its probes.

        They are gone; :meth:`Int3Dispatch.tidy` takes away what nobody needs any more.
        """
        del self._table[site.addr]
        self._borrows.drop(site.plan.patch.range)
        if site.armed:
            self._mark_disarmed(site)
        for probe in site.probes:
            probe.gone = True
        self._free_slots(site)
        return tuple(site.probes)

    # -- rungs ----------------------------------------------------------------------------------------------------

    def match(self, site: Site) -> None:
        """Arm or disarm *site*, as its probes want; one that is saved stays, and its counters do what they are told."""
        if site.saved:
            if site.armed:
                self._int3.serve(site)
            return
        if site.wanted:
            self._fit(site)
        if site.wanted and not site.armed:
            self._arm(site)
        elif not site.wanted and site.armed:
            self.disarm(site)
        elif site.armed:
            self._int3.serve(site)
        self._release_retired(site)
        self._int3.tidy()

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

    def _release_retired(self, site: Site) -> None:
        """Give back the counters of probes that are gone, and that the code of *site* does not lead to any more."""
        if not site.retired or site.saved:
            return
        counted = _counted_in(site)
        for counter in [counter for counter in site.retired if counter.addr not in counted]:
            site.retired.remove(counter)
            self._store.release(counter)

    def serve_all(self) -> list[str]:
        """Have the hits of all handled as their probes and listeners want now; returns what went wrong."""
        problems = []
        for site in self.armed():
            try:
                self.serve(site)
            except KprobeError as error:
                problems.append(f"{self._guest.place_of(site.addr)} is handled as before: {error.message}")
        return problems

    def serve(self, site: Site) -> None:
        """Have the hits of *site*, which is armed, handled as its probes and listeners want now."""
        if site.is_jump:
            self._fit(site)
        if not site.is_jump:
            self._int3.serve(site)
        self._release_retired(site)

    def match_jumps(self) -> list[str]:
        """Before the machine runs: take jumps away that must not be there, and try those again that could not be.

        Returns what went wrong.
        """
        self._jumps.forget()
        problems: list[str] = []
        for site, refusal in tuple(self._jumps.disturbed()):
            if site.is_jump and not site.saved:
                try:
                    self._lower_rung(site, refusal)
                except KprobeError as error:
                    self.disarm(site, trapped=False)
                    problems.append(
                        f"{self._guest.place_of(site.addr)} is not probed any more: its jump must go ({refusal}), and "
                        f"there can be no int3: {error.message}"
                    )
        for site in self.armed():
            declined = site.plan.not_optimized
            if declined is not None and declined.reason.is_transient:
                try:
                    self._fit(site)
                except KprobeError as error:
                    problems.append(f"{self._guest.place_of(site.addr)} stays {site.plan.rung}: {error.message}")
        return problems

    def _fit(self, site: Site) -> None:
        """Have *site* on the rung that its probes want now, and that the moment allows."""
        if site.needs_post or not site.probes or site.saved:
            return
        request = self._jumps.request(site.addr, site.probes, bool(site.watchers))
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
        plan = self._plan(place, False, site.strategy, request)
        full = plan.not_optimized
        if detour is not None and plan.detour is None and full is not None and full.reason is Reason.REGION_FULL:
            self._region.slots.discard(plan.slot)
            raise RefusedError(f"{place} keeps the jump that it has", full)
        self._replan(site, plan)

    def _show(self, addr: VirtAddr) -> None:
        """Take away the jump that hides the instruction at *addr*; it comes back when nobody needs that any more."""
        site = self._jumps.hiding(addr)
        self._check_not_saved(site, addr)
        if site is not None:
            self._lower_rung(site, Refusal(Reason.PROBED_INSIDE, site.addr, f"at {self._guest.place_of(addr)}"))

    def _lower_rung(self, site: Site, why: Refusal) -> None:
        """Have *site* use an int3 for now."""
        self._replan(site, self._plan(self._guest.place_of(site.addr), False, site.strategy, why))

    def _replan(self, site: Site, plan: Plan) -> None:
        """Put *plan* in the place of the one that *site* has."""
        old, armed = site.plan, site.armed
        if not (plan.detour or old.detour) and plan.rung is old.rung:
            self._region.slots.discard(plan.slot)  # only the reason is another one
            site.plan = replace(old, declined=plan.declined)
            return
        try:
            if armed:
                self.disarm(site, comes_back=True)
            site.plan = plan
            if armed:
                self._arm(site)
        except BaseException:
            self._region.slots.discard(plan.slot)
            site.plan = old
            if armed and not site.armed:
                self._arm(site)
            raise
        self._region.slots.free(old.slot)
        if plan.detour:
            self._int3.free(site)

    # -- text -----------------------------------------------------------------------------------------------------

    def write_patches(self, is_lost: Callable[[], bool], check: Callable[[Site], None]) -> list[str]:
        """Patch the text of all armed sites; returns what could not be, and why.

        *check* raises a KprobeError for a site that must not be hit when the machine runs now.

        :raises KprobeError: *is_lost* says that it is other memory: nothing more is written there.
        """
        problems = []
        with self._region.memory.batch():
            for site in self.armed():
                if site.saved:
                    continue  # it was never taken away
                if site.addr in self._stepping.watched:
                    continue
                try:
                    check(site)
                    apply(self._guest.memory, [site.plan.patch])
                except KprobeError as error:
                    if is_lost():
                        raise
                    self._mark_disarmed(site)
                    problems.append(f"{self._guest.place_of(site.addr)} is not probed any more: {error.message}")
        return problems

    def write_originals(self) -> None:
        """Restore the text of all armed sites; they stay armed."""
        with self._region.memory.batch():
            for site in self.armed():
                if not site.saved and self.holds_ours(site):
                    apply(self._guest.memory, [site.plan.patch.inverse])

    def _arm(self, site: Site) -> None:
        """Record first, then the slot, the breakpoint, and the text last: at no moment is an int3 without a way out."""
        plan = site.plan
        # What the guest has put there since the plan was made.
        refusal = guest_kprobe_in(self._guest, plan.patch.range)
        if refusal is not None:
            raise RefusedError(f"cannot probe {self._guest.place_of(site.addr)}", refusal)
        with contextlib.ExitStack() as undo:
            self._watch_fixup(site)
            undo.callback(self._unwatch_fixup, site)
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
            # It counts as armed from here: should the connection be lost in the middle of the write, whoever undoes
            # the session must know of it.
            self._text.add(plan.patch)
            self._jumps.add(site)
            site.armed = True
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
        for cpu in self._machine.cpus() if trapped else ():
            trap = self._dispatcher.trap_of(cpu)
            if trap is not None and self._dispatcher.site_of(trap) is site:
                self._dispatcher.undo_trap(cpu, wholly=True)
        # A write that was cut off may have happened all the same.
        if self._guest.memory.read(patch.addr, len(patch.old)) != patch.old:
            apply(self._guest.memory, [patch.inverse])
        self._mark_disarmed(site, comes_back=comes_back)
        self._unwatch_fixup(site)

    def _mark_disarmed(self, site: Site, *, keep_record: bool = False, comes_back: bool = False) -> None:
        if not site.armed:
            return
        self._text.remove(site.plan.patch)
        self._jumps.remove(site)
        site.armed = False
        self._int3.close(site)
        self._borrows.give_back(site.plan.patch.range)
        if not comes_back:
            self._dispatcher.forget(site)
        if not keep_record:
            self._region.records.remove(site.addr)

    def _watch_fixup(self, site: Site) -> None:
        """Arm a site where a fault of *site*'s instruction is fixed up: a hit there ends the one that faulted.

        :raises RefusedError: that place cannot be probed.
        """
        if site.fixup is None:
            return
        place = self._guest.place_of(site.fixup)
        watch = self._table.get(site.fixup)
        if watch is None:
            try:
                plan = self._plan(place, False, None)
            except RefusedError as error:
                detail = f"its fixup at {place} cannot be watched: {error.refusal}"
                refusal = Refusal(Reason.EX_TABLE, site.addr, detail, error.refusal.hint)
                raise RefusedError(f"cannot probe {self._guest.place_of(site.addr)}", refusal) from error
            watch = self._table[site.fixup] = self._new_site(plan)
        watch.watchers.add(site.addr)
        try:
            self.match(watch)
        except BaseException:
            watch.watchers.discard(site.addr)
            self._drop_unused(watch)
            raise

    def _unwatch_fixup(self, site: Site) -> None:
        watch = self._table.get(site.fixup) if site.fixup is not None else None
        if watch is not None:
            watch.watchers.discard(site.addr)
            self.match(watch)
            self._drop_unused(watch)


def _counted_in(site: Site) -> frozenset[VirtAddr]:
    """The counters that the code of *site* leads to."""
    return frozenset(handler.data for handler in site.handlers)
