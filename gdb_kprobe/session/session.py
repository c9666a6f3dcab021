"""A session: one guest, its region, its probes. Every act is verified, and undone by :meth:`Session.detach`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from gdb_kprobe.errors import KprobeError, RefusedError
from gdb_kprobe.kprobes.patch import CodePatch, TextMap
from gdb_kprobe.kprobes.plan import Facts, Plan, make_plan
from gdb_kprobe.language.spec import ProbeSpec
from gdb_kprobe.model import CpuId, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.session.dispatch import Outcome, StubDispatcher
from gdb_kprobe.session.guest import Guest, Place
from gdb_kprobe.session.header import Record
from gdb_kprobe.session.leave import step_out
from gdb_kprobe.session.probes import Hit, Probe, ProbeTable, Site
from gdb_kprobe.session.region import Region
from gdb_kprobe.session.transaction import apply, write_verified
from gdb_kprobe.target.protocols import Breakpoints, Machine
from gdb_kprobe.x86.decode import DecodeError, Insn, iter_insns

MAX_INSN = 15


@dataclass(frozen=True, slots=True)
class Detached:
    """What :meth:`Session.detach` did. *problems* names every site that could not be restored."""

    restored: int
    unmapped: bool
    problems: tuple[str, ...] = ()


class Session:
    """All state of one attachment. The machine must be stopped whenever a method is called."""

    def __init__(
        self,
        machine: Machine,
        guest: Guest,
        region: Region,
        breakpoints: Breakpoints,
        rungs: tuple[Rung, ...],
        interruptible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.machine = machine
        self.guest = guest
        self.region = region
        self.probes = ProbeTable()
        self.listeners: list[Callable[[Hit], None]] = []
        self.failed: list[Probe] = []
        """Probes that were disabled because their handler raised; for whoever tells the user, and takes them out."""
        self._breakpoints = breakpoints
        self._rungs = rungs
        self._sites: dict[VirtAddr, Site] = {}
        self._text = TextMap()
        self._gate_open = False
        self._dispatcher = StubDispatcher(machine, guest, self._sites, self._tell, interruptible)

    # -- probes -------------------------------------------------------------------------------------------------

    def plan(self, spec: ProbeSpec, strategy: Rung | None = None) -> tuple[Place, Plan]:
        """Plan a probe and change nothing. *strategy* is the one rung to use, if that is wanted.

        :raises RefusedError: a rule says no; the refusal says which.
        """
        self.guest.refresh()
        place = self.guest.resolve(spec.location)
        site = self._sites.get(place.addr)
        if site is not None:
            return place, site.plan
        plan = self._make_plan(place, False, strategy)
        self.region.slots.discard(plan.slot)
        return place, plan

    def add(self, probe: Probe, strategy: Rung | None = None) -> Probe:
        """Arm *probe* (or only define it, when it is not enabled). *strategy* is the one rung to use, if any.

        :raises RefusedError: a rule says no.
        :raises KprobeError: its name is taken, or the guest does not hold what it should; nothing was changed.
        """
        self.guest.refresh()
        place = self.guest.resolve(probe.spec.location)
        self.probes.add(probe)
        try:
            self._attach_to_site(probe, place, strategy)
        except BaseException:
            self.probes.remove(probe)
            raise
        return probe

    def set_enabled(self, probe: Probe, enabled: bool) -> None:
        """Enable or disable *probe*. A site whose last probe is disabled gets its original text back."""
        before, probe.enabled = probe.enabled, enabled
        try:
            self._match_text(self._site_of(probe))
        except BaseException:
            probe.enabled = before
            raise

    def delete(self, probe: Probe) -> None:
        """Take *probe* away; the site's text and slot go with its last probe."""
        site = self._site_of(probe)
        at = site.probes.index(probe)
        site.probes.remove(probe)
        try:
            self._match_text(site)
        except BaseException:
            site.probes.insert(at, probe)
            raise
        self.probes.remove(probe)
        self._drop_unused(site)

    def site_of(self, probe: Probe) -> Site | None:
        """The site of *probe*; ``None`` while it is pending."""
        return None if probe.place is None else self._sites[probe.place.addr]

    # -- stops --------------------------------------------------------------------------------------------------

    def on_breakpoint(self, cpu: CpuId) -> bool:
        """*cpu* stopped at the #BP entry: handle the hit, if it is one; whether the user gets the prompt.

        Other vCPUs may stand there too: they are not looked at. The stub's breakpoint is still there when the
        machine is resumed, and stops each of them in its turn.
        """
        outcome = self._dispatcher.dispatch(cpu)
        self._drop_failed()
        return outcome is Outcome.STOP

    def settle(self) -> bool:
        """The machine stopped for the user: bring every vCPU to where it would be without probes.

        A vCPU at the #BP entry because of us has its hit handled; one in a slot is stepped out of it. Returns
        whether anything was moved.
        """
        moved = False
        for cpu in self.machine.cpus():
            moved |= self._dispatcher.dispatch(cpu) in (Outcome.HANDLED, Outcome.STOP)
            moved |= step_out(self.machine, cpu, self.region.header.code)
        self._dispatcher.forget_stale_skips()
        self._drop_failed()
        return moved

    def detach(self) -> Detached:
        """Undo everything: text, records, mapping. What cannot be undone is left alone and named."""
        self.guest.refresh()
        problems: list[str] = []
        self._dispatcher.complete()
        for cpu in self.machine.cpus():
            self._dispatcher.undo_trap(cpu)
            step_out(self.machine, cpu, self.region.header.code)
        restored = 0
        for site in reversed(tuple(self._sites.values())):
            if site.armed:
                try:
                    self._disarm(site)
                    restored += 1
                except KprobeError as error:
                    problems.append(f"{self.guest.place_of(site.addr)}: {error.message}")
        self._close_gate()
        unmapped = not problems and self._unmap_if_unused()
        return Detached(restored, unmapped, tuple(problems))

    def armed_sites(self) -> tuple[Site, ...]:
        return tuple(site for site in self._sites.values() if site.armed)

    def original_text(self, addr: VirtAddr, size: int) -> bytes:
        """Guest text as it is without our patches."""
        return self._text.original(addr, self.guest.memory.read(addr, size))

    # -- private: sites -----------------------------------------------------------------------------------------

    def _attach_to_site(self, probe: Probe, place: Place, strategy: Rung | None) -> None:
        site = self._sites.get(place.addr)
        if site is not None and probe.post is not None and site.plan.rung is not Rung.SINGLE_STEP:
            self._replan(site, place)
        if site is None:
            plan = self._make_plan(place, probe.post is not None, strategy)
            site = self._sites[place.addr] = Site(plan, fixup=self.guest.fixup_of(place.addr))
        site.probes.append(probe)
        probe.place = place
        try:
            self._match_text(site)
        except BaseException:
            site.probes.remove(probe)
            probe.place = None
            self._drop_unused(site)
            raise

    def _drop_unused(self, site: Site) -> None:
        if not site.in_use:
            del self._sites[site.addr]
            self.region.slots.free(site.plan.slot)

    def _watch_fixup(self, site: Site) -> None:
        """Arm a site where a fault of *site*'s instruction is fixed up: a hit there ends the one that faulted.

        :raises RefusedError: that place cannot be probed.
        """
        if site.fixup is None:
            return
        place = self.guest.place_of(site.fixup)
        watch = self._sites.get(site.fixup)
        if watch is None:
            try:
                plan = self._make_plan(place, False, None)
            except RefusedError as error:
                detail = f"its fixup at {place} cannot be watched: {error.refusal}"
                refusal = Refusal(Reason.EX_TABLE, site.addr, detail, error.refusal.hint)
                raise RefusedError(f"cannot probe {self.guest.place_of(site.addr)}", refusal) from error
            watch = self._sites[site.fixup] = Site(plan, fixup=self.guest.fixup_of(site.fixup))
        watch.watchers.add(site.addr)
        try:
            self._match_text(watch)
        except BaseException:
            watch.watchers.discard(site.addr)
            self._drop_unused(watch)
            raise

    def _unwatch_fixup(self, site: Site) -> None:
        watch = self._sites.get(site.fixup) if site.fixup is not None else None
        if watch is not None:
            watch.watchers.discard(site.addr)
            self._match_text(watch)
            self._drop_unused(watch)

    def _replan(self, site: Site, place: Place) -> None:
        """A post-handler came to a boosted site: it needs the single step."""
        plan, old, armed = self._make_plan(place, True, None), site.plan, site.armed
        try:
            if armed:
                self._disarm(site)
            site.plan = plan
            if armed:
                self._arm(site)
        except BaseException:
            self.region.slots.discard(plan.slot)
            site.plan = old
            if armed and not site.armed:
                self._arm(site)
            raise
        self.region.slots.free(old.slot)

    def _site_of(self, probe: Probe) -> Site:
        site = self.site_of(probe)
        assert site is not None, f"{probe.name} has no site"
        return site

    def _match_text(self, site: Site) -> None:
        """Arm or disarm *site*, as its probes want."""
        if site.wanted and not site.armed:
            self._arm(site)
        elif not site.wanted and site.armed:
            self._disarm(site)
        self._close_unused_gate()

    def _arm(self, site: Site) -> None:
        """Record first, then the slot, the breakpoint, and the text last: at no moment is an int3 without a way out."""
        self.region.check()
        plan = site.plan
        with contextlib.ExitStack() as undo:
            self._watch_fixup(site)
            undo.callback(self._unwatch_fixup, site)
            self.region.store.add(Record(plan.patch, plan.slot, plan.rung), self.region.slots.high_water)
            undo.callback(self.region.store.remove, site.addr)
            found = self.guest.memory.read(plan.slot.start, plan.slot.size)
            write_verified(self.guest.memory, CodePatch(plan.slot.start, found, plan.slot_image))
            self._open_gate()
            undo.callback(self._close_unused_gate)
            apply(self.guest.memory, [plan.patch])
            undo.pop_all()
        self._text.add(plan.patch)
        site.armed = True

    def _disarm(self, site: Site) -> None:
        """Text first; a vCPU that has taken the int3 already is sent back to the instruction."""
        patch = site.plan.patch
        for cpu in self.machine.cpus():
            trap = self._dispatcher.trap_of(cpu)
            if trap is not None and self._dispatcher.site_of(trap) is site:
                self._dispatcher.undo_trap(cpu)
        apply(self.guest.memory, [patch.inverse])
        self._text.remove(patch)
        site.armed = False
        self.region.store.remove(site.addr)
        self._unwatch_fixup(site)

    def _make_plan(self, place: Place, needs_post: bool, strategy: Rung | None) -> Plan:
        insn = self._probeable_insn(place)
        rungs = tuple(rung for rung in self._rungs if strategy in (None, rung))
        facts = Facts(self.guest.fixup_of(insn.addr) is not None, needs_post, rungs)
        try:
            return make_plan(insn, facts, self.region.slots)
        except RefusedError as error:
            if error.refusal.reason is not Reason.REGION_FULL or not self._end_quarantine():
                raise
            return make_plan(insn, facts, self.region.slots)

    def _probeable_insn(self, place: Place) -> Insn:
        """The kernel's ``can_probe``: decode from the function's start; the address must be a boundary.

        :raises RefusedError: it is not one, or the guest's own rules forbid the place.
        """
        what = f"cannot probe {place}"
        found = self.guest.memory.walk(place.addr)
        if found is None or not found.executable:
            state = "is not mapped" if found is None else "is mapped, but not executable"
            raise RefusedError(what, Refusal(Reason.NOT_EXECUTABLE, place.addr, f"{place.addr:#x} {state}"))
        early = self.guest.refusal_at(place, 1)
        if early is not None:
            raise RefusedError(what, early)
        insn = self._decode_up_to(place, what)
        refusal = self.guest.refusal_at(place, insn.length)
        if refusal is not None:
            raise RefusedError(what, refusal)
        return insn

    def _decode_up_to(self, place: Place, what: str) -> Insn:
        size = place.offset + MAX_INSN
        if place.symbol is not None:
            size = min(size, max(place.end - place.start, place.offset + 1))
        text = self.original_text(place.start, size)
        before = place.start
        try:
            for insn in iter_insns(text, place.start):
                if insn.addr == place.addr:
                    return insn
                if insn.addr > place.addr:
                    raise RefusedError(
                        what,
                        Refusal(
                            Reason.NOT_A_BOUNDARY,
                            place.addr,
                            f"it is inside the instruction at {self.guest.place_of(before)}",
                            f"the nearest boundaries are {self.guest.place_of(before)} and "
                            f"{self.guest.place_of(insn.addr)}",
                        ),
                    )
                before = insn.addr
        except DecodeError as error:
            raise RefusedError(what, Refusal(Reason.UNDECODABLE, error.addr, error.detail)) from error
        raise RefusedError(what, Refusal(Reason.NOT_A_BOUNDARY, place.addr, "it is behind the function's last one"))

    # -- private: the gate, the region, failures ----------------------------------------------------------------

    def _open_gate(self) -> None:
        if not self._gate_open:
            self._breakpoints.insert(self.guest.bp_entry)
            self._gate_open = True

    def _close_unused_gate(self) -> None:
        if not self.armed_sites():
            self._close_gate()

    def _close_gate(self) -> None:
        if self._gate_open:
            self._breakpoints.remove(self.guest.bp_entry)
            self._gate_open = False

    def _stack_words(self) -> list[int] | None:
        pointers = {cpu: self.machine.read_register(cpu, "rsp") for cpu in self.machine.cpus()}
        return self.guest.stack_words_into(self.region.header.range, pointers)

    def _end_quarantine(self) -> bool:
        words = self._stack_words()
        if words is None:
            return False
        inside = [self.machine.read_register(cpu, "rip") for cpu in self.machine.cpus()]
        return self.region.slots.release(words + inside) > 0

    def _unmap_if_unused(self) -> bool:
        if self._stack_words() != []:
            return False
        self.region.unmap(self.machine)
        return True

    def _drop_failed(self) -> None:
        """Disable the probes whose handler raised; their sites get their text back."""
        while self._dispatcher.failed:
            probe = self._dispatcher.failed.pop()
            if probe.enabled:
                self.failed.append(probe)
                probe.enabled = False
                if any(probe is other for other in self.probes):  # it may have deleted itself before it raised
                    self._match_text(self._site_of(probe))

    def _tell(self, hit: Hit) -> None:
        for listener in self.listeners:
            listener(hit)
