"""A session: one guest, its region, its probes. Every act is verified, and undone by :meth:`Session.detach`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from gdb_kprobe.errors import (
    ConnectionLostError,
    GuestStateError,
    KprobeError,
    RefusedError,
    RegionError,
)
from gdb_kprobe.kprobes.detour import Action
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.language.spec import Location, ProbeSpec
from gdb_kprobe.linux.ftrace import SITE_SIZE
from gdb_kprobe.model import AddressRange, Boost, CpuId, Reason, Refusal, Rung, VirtAddr, offset
from gdb_kprobe.session.borrows import Borrows
from gdb_kprobe.session.definitions import Definitions
from gdb_kprobe.session.dispatch import Outcome, StubDispatcher
from gdb_kprobe.session.guest import Guest, Place
from gdb_kprobe.session.guest_dispatch import GuestDispatch
from gdb_kprobe.session.header import Record
from gdb_kprobe.session.jumps import Jumps
from gdb_kprobe.session.leave import step_out
from gdb_kprobe.session.module_watch import Acts, ModuleWatch, module_of
from gdb_kprobe.session.moment import Memory, Moment, check_live, was_loaded, was_reset
from gdb_kprobe.session.planner import Planner
from gdb_kprobe.session.probes import Hit, Probe, ProbeTable, Site, State
from gdb_kprobe.session.programs import Programs
from gdb_kprobe.session.region import Region
from gdb_kprobe.session.restore import take_back
from gdb_kprobe.session.routes import Routes
from gdb_kprobe.session.transaction import apply, holds, verify, write_verified
from gdb_kprobe.session.windows import Wish
from gdb_kprobe.target.protocols import Breakpoints, LiveMemory, Machine

_JMP_QWORD = bytes.fromhex("ff2500000000")  # jmp [rip+0]: the address follows


@dataclass(frozen=True, slots=True)
class Detached:
    """What :meth:`Session.detach` did. *problems* names what could not be undone.

    *still_armed* are the sites that still hold our int3: then the breakpoint is still there, and the guest must not run
    without it. *notes* say what of the guest is not as it was, though nothing is wrong.
    """

    restored: int
    unmapped: bool
    problems: tuple[str, ...] = ()
    still_armed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
        in_guest: GuestDispatch | None = None,
        boost: Boost = Boost.RELOCATE,
        jumps: bool = True,
    ) -> None:
        """*in_guest* is the dispatcher in the guest; ``None``: every int3 stops at the #BP entry for the host.

        *jumps*: probes may be optimized, if *rungs* says so too.
        """
        self.machine = machine
        self.guest = guest
        self.region = region
        self.probes = ProbeTable()
        self.failed: list[Probe] = []
        """Probes that were disabled because their handler raised; for whoever tells the user, and takes them out."""
        self.failed_listeners: list[str] = []
        """What listeners raised that were dropped for it."""
        self.notes: list[str] = []
        """What else the user is to be told."""
        self._breakpoints = breakpoints
        self._sites: dict[VirtAddr, Site] = {}
        self._text = TextMap()
        self._planner = Planner(guest, self._text, region.slots, rungs, boost)
        self._listeners: list[Callable[[Hit], None]] = []
        jumps = jumps and Rung.OPTIMIZED in rungs
        self._programs = Programs()
        self._routes = Routes(
            machine,
            guest.memory,
            region,
            breakpoints,
            guest.bp_entry,
            self._sites,
            self._bring_out,
            in_guest,
            self._programs,
            self._listeners,
        )
        self._definitions = Definitions(region.memory, region.header)
        self._moment = Moment(machine, region.header.phys, lambda: self._routes.lifted)
        self._moment.change()
        self._borrows = Borrows(guest)
        self._jumps = Jumps(machine, guest, breakpoints, self._sites, self._programs, self._listeners, jumps)
        acts = Acts(self._attach_to_site, self._detach_from_site, self._forget, self._moment.act)
        self.modules = ModuleWatch(guest, self._sites, acts, self.notes)
        self._ways: dict[CpuId, Slot] = {}
        self._dispatcher = StubDispatcher(
            machine, guest, self._sites, self._tell, self._way_to, self._routes.gate, interruptible
        )

    # -- probes -------------------------------------------------------------------------------------------------

    def plan(self, spec: ProbeSpec, strategy: Rung | None = None) -> tuple[Place, Plan]:
        """Plan a probe and change nothing. *strategy* is the one rung to use, if that is wanted.

        :raises RefusedError: a rule says no; the refusal says which.
        """
        self._look()
        place = self._resolve(spec.location)
        site = self._sites.get(place.addr)
        if site is not None:
            return place, site.plan
        wish = self._jumps.wish(place.addr, ())
        if isinstance(wish, Wish):
            handler = self._programs.handler(spec.condition, self.region.header.counters.start)
            wish = replace(wish, action=Action((handler,)))
        plan = self._make_plan(place, False, strategy, wish)
        self.region.slots.discard(plan.slot)
        return place, plan

    def add(self, probe: Probe) -> Probe:
        """Arm *probe* (or only define it, when it is not enabled).

        :raises RefusedError: a rule says no.
        :raises KprobeError: its name is taken, or the guest does not hold what it should; nothing was changed.
        """
        self._look()
        with self._moment.act():
            self._add(probe)
        return probe

    def add_many(
        self, probes: Iterable[Probe], progress: Callable[[int], None] = lambda done: None
    ) -> list[tuple[Probe, KprobeError]]:
        """Arm *probes*; returns those that cannot be, with the reason. *progress* is told how many were tried.

        Cut off by an error of another kind or a Ctrl-C, it has added none.
        """
        self._look()
        added: list[Probe] = []
        refused: list[tuple[Probe, KprobeError]] = []
        with self._batch():
            try:
                for done, probe in enumerate(probes):
                    progress(done)
                    try:
                        self._add(probe)
                    except ConnectionLostError:
                        raise
                    except KprobeError as error:
                        refused.append((probe, error))
                    else:
                        added.append(probe)
            except BaseException:
                for probe in reversed(added):
                    self._delete(probe)
                raise
        return refused

    def set_enabled(self, probe: Probe, enabled: bool) -> None:
        """Enable or disable *probe*. A site whose last probe is disabled gets its original text back."""
        self._look()
        if probe in self.modules.waiting:
            probe.enabled = enabled
            return
        site = self._site_of(probe)
        before, probe.enabled = probe.enabled, enabled
        try:
            with self._moment.act():
                if probe.counter is not None:
                    probe.counter.enable(enabled)
                self._match_text(site)
        except BaseException:
            probe.enabled = before
            raise

    def switch(self, probe: Probe, enabled: bool, memory: LiveMemory) -> None:
        """Enable or disable *probe* while the machine runs: one store. The text stays as it is until it stops.

        :raises GuestStateError: that needs more than a store, or the machine's memory cannot be reached.
        :raises GuestResetError: that memory is not what it was.
        """
        site = self.site_of(probe)
        handlers = () if site is None or not site.armed else site.handlers
        counter = probe.counter
        if counter is None or not any(handler.data == counter.addr for handler in handlers):
            raise GuestStateError(
                f"{probe.name} has no handler in the guest now, and text is changed only while the guest is stopped",
                "stop it first (Ctrl-C, or 'interrupt')",
            )
        self.check_live(memory)
        self._moment.change_live(memory)
        counter.enable(enabled, memory)
        probe.enabled = enabled

    def delete(self, probe: Probe) -> None:
        """Take *probe* away; the site's text and slot go with its last probe."""
        self._look()
        with self._moment.act():
            self._delete(probe)

    def delete_many(self, probes: Iterable[Probe]) -> None:
        """Take *probes* away."""
        self._look()
        with self._batch():
            for probe in probes:
                self._delete(probe)

    def check_live(self, memory: LiveMemory) -> None:
        """Before the region is read or written while the machine runs: is it still this session's?

        :raises GuestResetError: it is not, as far as *memory* can tell.
        """
        check_live(self.region, self._moment, memory)

    @property
    def text(self) -> TextMap:
        """Which bytes of the guest's text are ours."""
        return self._text

    def site_of(self, probe: Probe) -> Site | None:
        """The site of *probe*; ``None`` when it has none (yet, any more, or for now)."""
        return None if probe.place is None or probe.gone else self._sites[probe.place.addr]

    def state_of(self, probe: Probe) -> State:
        """Where *probe* is in its life."""
        site = self.site_of(probe)
        if site is None:
            return State.GONE if probe.gone else State.PENDING
        return State.ARMED if site.armed and probe.enabled else State.DISABLED

    def listen(self, listener: Callable[[Hit], None]) -> None:
        """Have *listener* told of every hit, which the host handles then. One that raises is dropped."""
        self._check_memory()
        self._listeners.append(listener)
        with self._moment.act():
            self._serve_all()

    def unlisten(self, listener: Callable[[Hit], None]) -> None:
        """Do not tell *listener* any more; also while the machine runs. Nothing happens when it was dropped."""
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    @property
    def gate(self) -> VirtAddr:
        """Where hits that the host handles stop."""
        return self._routes.gate.addr

    @property
    def dispatches_in_guest(self) -> bool:
        return self._routes.in_guest is not None

    @property
    def is_quiet(self) -> bool:
        """Nobody is on the way through the region: no word on any kernel stack points into it, as far as is known.

        So no hit is under way that is not counted yet. vCPUs are out of it at every stop of the user's.
        """
        return self._stack_words() == []

    # -- stops --------------------------------------------------------------------------------------------------

    def on_breakpoint(self, cpu: CpuId) -> bool:
        """*cpu* stopped at the gate: handle the hit, if it is one; whether the user gets the prompt.

        Other vCPUs may stand there too: they are not looked at. The stub's breakpoint is still there when the
        machine is resumed, and stops each of them in its turn.

        :raises GuestResetError: the guest's memory is not what it was. Nothing was done.
        """
        self._check_memory()
        if self._routes.lifted:
            return True  # the guest's own text was loaded: no probe is armed until the user resumes
        outcome = self._dispatcher.dispatch(cpu)
        self._drop_failed()
        return outcome is Outcome.STOP

    def settle(self) -> None:
        """The machine stopped for the user: bring every vCPU to where it would be without probes.

        A vCPU at the gate has its hit handled; one on the way from an int3 of ours to its slot, or in the slot, is
        stepped out of it.

        :raises GuestResetError: the guest is not the one that was attached to any more.
        """
        self._look()
        self._settle_all()
        self._drop_failed()

    def lift(self) -> None:
        """Put the original text back while the machine stays stopped. The sites count as armed: :meth:`lower` does it.

        So whoever looks at a stopped guest sees its own text. A debugger would take our int3 for the guest's own, and
        step over it by adding one to RIP. And nothing is left behind if we are killed, or cut off, while it is stopped.

        :raises GuestResetError: the guest's memory is not what it was. Nothing was written.
        """
        self._check_memory()
        self._lift()

    def lower(self) -> tuple[str, ...]:
        """Patch the text of all armed sites, before the machine runs; returns what could not be, and why.

        :raises GuestResetError: the guest is not the one that was attached to any more.
        """
        if not self._routes.lifted:
            return ()
        self._check_boot()
        sites = self.armed_sites()
        problems: list[str] = []
        try:
            problems = self._lower()
        finally:
            if self._moment.was_lost:
                patches = [*self._routes.hooks, *(site.plan.patch for site in (*sites, *self.armed_sites()))]
                take_back(self.region.memory, self.guest, self.region.header.phys, patches)
        if self._moment.was_lost:
            raise was_loaded()
        return tuple(problems)

    def _lower(self) -> list[str]:
        with self._moment.act(changes=False):
            before = self._shape()
            self.modules.update()
            self._serve_all()
            problems = self._match_jumps()
            rebuilt = self._routes.lower()
            with self.region.memory.batch():
                for site in self.armed_sites():
                    try:
                        apply(self.guest.memory, [site.plan.patch])
                    except ConnectionLostError:
                        raise
                    except KprobeError as error:
                        if self._moment.is_lost():
                            raise  # it is other memory: nothing more is written there
                        self._mark_disarmed(site)
                        problems.append(f"{self.guest.place_of(site.addr)} is not probed any more: {error.message}")
            if rebuilt or self._shape() != before:
                self._moment.change()
        return problems

    def moved(self) -> None:
        """The user has made a vCPU go on somewhere else: a probe that it was stopped at counts its next hit."""
        self._dispatcher.forget_stopped()

    def detach(self) -> Detached:
        """Undo everything: text, records, mapping. What cannot be undone is left alone and named."""
        self._look()
        with self._moment.act():
            return self._detach()

    def original_of(self, addr: int) -> VirtAddr | None:
        """The instruction that a vCPU at *addr* in a slot is at, or has just executed; ``None`` outside of slots."""
        if addr not in self.region.header.code:
            return None
        for site in self._sites.values():
            insn = site.plan.insn
            if addr in site.plan.slot.range:
                at_it = addr == site.plan.slot.code or insn.is_branch or site.is_jump
                return insn.addr if at_it else insn.end
            if site.service is not None and addr in site.service.handler.range:
                return insn.addr
        return None

    def armed_sites(self) -> tuple[Site, ...]:
        return tuple(site for site in self._sites.values() if site.armed)

    def _detach(self) -> Detached:
        problems: list[str] = []
        self._dispatcher.complete()
        self._bring_out()
        was_lifted = self._routes.lifted
        # All text first, and only then what tells of it.
        try:
            self._lift()
        except ConnectionLostError:
            raise
        except KprobeError:
            pass  # what is not restored is told below, site by site
        restored = 0
        with self.region.memory.batch():
            for site in reversed(tuple(self._sites.values())):
                if site.armed:
                    try:
                        self._disarm(site, trapped=False)
                        restored += 1
                    except ConnectionLostError:
                        raise
                    except KprobeError as error:
                        problems.append(f"{self.guest.place_of(site.addr)}: {error.message}")
        still_armed = tuple(
            str(self.guest.place_of(site.addr)) for site in self.armed_sites() if self._holds_ours(site)
        )
        if still_armed:
            if not was_lifted:
                self._routes.lower()
            return Detached(restored, False, tuple(problems), still_armed)
        self._definitions.clear()
        notes = tuple(self._borrows.kept.values())
        self._routes.tidy()
        for probe in self.probes:
            probe.take_counter()
        unmapped = False
        try:
            unmapped = not problems and self._unmap_if_unused()
        except ConnectionLostError:
            raise
        except KprobeError as error:
            problems.append(f"the region is not taken away: {error.message}")
        return Detached(restored, unmapped, tuple(problems), notes=notes)

    # -- private: the guest as it is now ------------------------------------------------------------------------

    def _look(self) -> None:
        """The guest may have run since the last act: is it still the same, and what of its text is gone?

        :raises GuestResetError: it is another boot. Nothing may be written any more.
        """
        self._check_boot()
        self.guest.refresh()
        self._jumps.forget()
        self._borrows.forget()
        self._borrows.retry()
        for site in tuple(self._sites.values()):
            if self._is_gone(site):
                with self._moment.act():
                    self._forget(site)
        self.modules.look()

    def _check_boot(self) -> None:
        """:raises GuestResetError: the machine does not run what was attached to."""
        if not self.guest.is_same_boot(self.machine):
            raise was_reset()
        self._check_memory()

    def _check_memory(self) -> None:
        """The part of :meth:`_check_boot` that costs next to nothing, and needs no vCPU.

        :raises GuestResetError: the guest's memory is not of this session, as it is.
        """
        if not self.region.is_mapped(self.machine):
            raise was_reset()
        found = self._moment.look()
        if found is Memory.OTHER:
            raise was_loaded()
        if found is not Memory.NOW:
            self._go_on(lifted=found is Memory.LIFTED)

    def _go_on(self, *, lifted: bool) -> None:
        """A snapshot of this session was loaded, with the sites that it has now: go on from there."""
        for_user, self._routes.lifted = self._routes.lifted, lifted
        self._moment.go_on()
        self.notes.append(
            "a snapshot was loaded that has the probes of this session: they go on, with the counts of the snapshot"
        )
        self.guest.refresh()
        self._jumps.forget()
        self._dispatcher.forget_all()
        if for_user and not lifted:
            self._settle_all()
            self._lift()

    def _is_gone(self, site: Site) -> bool:
        """Whether the module that *site* is in was unloaded, or unloaded and loaded again: its text is not ours."""
        if not site.owner:
            return False  # the core kernel's stays
        if self.guest.owner_of(site.addr) != site.owner:
            return True
        patch = site.plan.patch
        return site.armed and not holds(self.guest.memory, site.addr, patch.old if self._routes.lifted else patch.new)

    def _holds_ours(self, site: Site) -> bool:
        return holds(self.guest.memory, site.addr, site.plan.patch.new)

    def _forget(self, site: Site) -> None:
        """Drop *site* and write nothing to its text: it belongs to somebody else now."""
        del self._sites[site.addr]
        self._borrows.drop(site.plan.patch.range)
        if site.armed:
            self._mark_disarmed(site)
        for probe in site.probes:
            probe.gone = True
            if module_of(probe):
                self.modules.wait(probe)
            else:
                self._unnote(probe)
        self._free_slots(site)
        self._routes.tidy()

    # -- private: sites -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _batch(self) -> Iterator[None]:
        """Around changes to many sites.

        While the machine is stopped for the user the text is not ours, and nothing else that is written is in use.
        """
        with contextlib.ExitStack() as around:
            around.enter_context(self._moment.act())
            if self._routes.lifted:
                around.enter_context(self.region.memory.batch())
            yield

    def _add(self, probe: Probe) -> None:
        if self.modules.may_come(probe):
            self.probes.add(probe)
            try:
                self._note(probe)
            except BaseException:
                self.probes.remove(probe)
                raise
            self.modules.wait(probe)
            return
        place = self._resolve(probe.spec.location)
        self.probes.add(probe)
        try:
            self._attach_to_site(probe, place)
        except BaseException:
            self.probes.remove(probe)
            raise

    def _resolve(self, location: Location) -> Place:
        """Where the user wants a probe: of a function whose entry calls a tracer now, behind that call."""
        place = self.guest.resolve(location)
        if location.offset or place.symbol is None or place.addr in self._sites:
            return place
        for site in self.guest.ftrace_sites(AddressRange(place.addr, offset(place.addr, 1))):
            if site.is_enabled and site.ip == place.addr:
                return self.guest.resolve(replace(location, offset=SITE_SIZE))
        return place

    def _delete(self, probe: Probe) -> None:
        if probe.gone or probe in self.modules.waiting:
            self.probes.remove(probe)
            self._unnote(probe)
            with contextlib.suppress(ValueError):
                self.modules.waiting.remove(probe)
            return
        self._detach_from_site(probe)
        self.probes.remove(probe)

    def _detach_from_site(self, probe: Probe) -> None:
        site = self._site_of(probe)
        at = site.probes.index(probe)
        site.probes.remove(probe)
        try:
            self._match_text(site)
        except BaseException:
            site.probes.insert(at, probe)
            raise
        self._unnote(probe)
        self._drop_unused(site)

    def _note(self, probe: Probe) -> None:
        """Give *probe* a counter and write down what it is, before there is a site for it.

        :raises RegionError: there is no room.
        """
        self._allocate_counter(probe)
        if not probe.hidden:
            self._definitions.add(probe)

    def _unnote(self, probe: Probe) -> None:
        """Undo that; nothing happens when it was not done."""
        self._definitions.remove(probe)
        self._routes.free_counter(probe)

    def _attach_to_site(self, probe: Probe, place: Place) -> None:
        site, strategy = self._sites.get(place.addr), probe.strategy
        if site is not None and probe.post is not None and site.plan.rung is not Rung.SINGLE_STEP:
            self._replan(site, self._make_plan(place, True, None))
        elif site is not None and not site.probes and strategy not in (None, site.plan.rung):
            # It is only a fixup that is watched: any rung will do.
            self._replan(site, self._make_plan(place, False, strategy))
        self._show(place.addr)
        probe.place = place
        try:
            self._note(probe)
            if site is None:
                wish = self._jumps.wish(place.addr, [probe])
                plan = self._make_plan(place, probe.post is not None, strategy, wish)
                site = self._sites[place.addr] = self._new_site(plan)
            elif strategy not in (None, site.strategy, site.plan.rung):
                raise KprobeError(
                    f"{place} is probed already, as {site.plan.rung}",
                    f"'set kprobe strategy auto', or delete {', '.join(other.name for other in site.probes)} first",
                )
            site.probes.append(probe)
            self._match_text(site)
        except BaseException:
            probe.place = None
            self._unnote(probe)
            if site is not None:
                if probe in site.probes:
                    site.probes.remove(probe)
                self._drop_unused(site)
            raise

    def _allocate_counter(self, probe: Probe) -> None:
        try:
            self._routes.allocate_counter(probe)
        except RegionError:
            if not self._end_quarantine():
                raise
            self._routes.allocate_counter(probe)

    def _new_site(self, plan: Plan) -> Site:
        addr = plan.insn.addr
        fixup = self.guest.fixup_of(addr)
        # Some are fixed up by being executed again, with another operand: nothing to watch.
        return Site(plan, fixup=None if fixup == addr else fixup, owner=self.guest.owner_of(addr))

    def _drop_unused(self, site: Site) -> None:
        if not site.in_use:
            del self._sites[site.addr]
            self._free_slots(site)

    def _free_slots(self, site: Site) -> None:
        self.region.slots.free(site.plan.slot)
        self._routes.free(site)

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
            watch = self._sites[site.fixup] = self._new_site(plan)
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

    def _replan(self, site: Site, plan: Plan) -> None:
        """Put *plan* in the place of the one that *site* has."""
        old, armed = site.plan, site.armed
        if not (plan.detour or old.detour) and plan.rung is old.rung:
            self.region.slots.discard(plan.slot)  # only the reason is another one
            site.plan = replace(old, declined=plan.declined)
            return
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
        if plan.detour:
            self._routes.free(site)

    def _fit(self, site: Site) -> None:
        """Have *site* on the rung that its probes want now, and that the moment allows."""
        if site.needs_post or not site.probes:
            return
        wish = self._jumps.wish(site.addr, site.probes, bool(site.watchers))
        detour, declined = site.plan.detour, site.plan.not_optimized
        if detour is None:
            if isinstance(wish, Refusal) or declined is None or not declined.reason.may_pass:
                return
        elif isinstance(wish, Wish) and wish.action == detour.action:
            why = None if site.armed else wish.check(detour.window)
            if why is None:
                return
            wish = why
        self._replan(site, self._make_plan(self.guest.place_of(site.addr), False, site.strategy, wish))

    def _show(self, addr: VirtAddr) -> None:
        """Take away the jump that hides the instruction at *addr*; it comes back when nobody needs that any more."""
        site = self._jumps.hiding(addr)
        if site is not None:
            self._lower_rung(site, Refusal(Reason.PROBED_INSIDE, site.addr, f"at {self.guest.place_of(addr)}"))

    def _lower_rung(self, site: Site, why: Refusal) -> None:
        """Have *site* use an int3 for now."""
        self._replan(site, self._make_plan(self.guest.place_of(site.addr), False, site.strategy, why))

    def _match_jumps(self) -> list[str]:
        """Before the machine runs: take jumps away that must not be there, and try those again that could not be.

        Returns what went wrong.
        """
        self._jumps.forget()
        for site, why in tuple(self._jumps.disturbed()):
            if site.is_jump:
                self._lower_rung(site, why)
        problems: list[str] = []
        for site in self.armed_sites():
            declined = site.plan.not_optimized
            if declined is not None and declined.reason.passes:
                try:
                    self._fit(site)
                except ConnectionLostError:
                    raise
                except KprobeError as error:
                    problems.append(f"{self.guest.place_of(site.addr)} stays {site.plan.rung}: {error.message}")
        return problems

    def _site_of(self, probe: Probe) -> Site:
        """:raises KprobeError: the module that it was in is gone."""
        site = self.site_of(probe)
        if site is None:
            raise KprobeError(
                f"{probe.name} is gone: the module of {probe.place} was unloaded",
                f"it is armed again when the module is back; 'kprobe delete {probe.name}' forgets it",
            )
        return site

    def _match_text(self, site: Site) -> None:
        """Arm or disarm *site*, as its probes want."""
        if site.wanted:
            self._fit(site)
        if site.wanted and not site.armed:
            self._arm(site)
        elif not site.wanted and site.armed:
            self._disarm(site)
        elif site.armed and not site.is_jump:
            self._routes.serve(site)
        self._routes.tidy()

    def _arm(self, site: Site) -> None:
        """Record first, then the slot, the breakpoint, and the text last: at no moment is an int3 without a way out."""
        plan = site.plan
        with contextlib.ExitStack() as undo:
            self._watch_fixup(site)
            undo.callback(self._unwatch_fixup, site)
            borrowed = self._borrows.needed(plan.patch.range)
            marked = next((site.record for site in borrowed), None)
            record = Record(plan.patch, plan.slot, plan.rung, borrowed=marked)
            self.region.store.add(record, self.region.slots.high_water)
            undo.callback(self.region.store.remove, site.addr)
            write_verified(self.guest.memory, plan.slot.start, plan.slot_image)
            if not site.is_jump:
                undo.callback(self._routes.tidy)
                undo.callback(self._routes.close, site)
                self._routes.open(site)
            undo.callback(self._borrows.give_back, plan.patch.range)
            self._borrows.borrow(plan.patch.range, borrowed)
            # It counts as armed from here: should the connection be lost in the middle of the write, whoever undoes
            # the session must know of it.
            self._text.add(plan.patch)
            self._jumps.add(site)
            site.armed = True
            undo.callback(self._mark_disarmed, site, keep_record=True)
            if self._routes.lifted:
                verify(self.guest.memory, [plan.patch])
            else:
                apply(self.guest.memory, [plan.patch])
            undo.pop_all()

    def _disarm(self, site: Site, *, trapped: bool = True) -> None:
        """Text first; a vCPU that has taken the int3 already is sent back to the instruction.

        *trapped*: there may be one. It is not, when all were brought out and the machine has not run since.
        """
        patch = site.plan.patch
        for cpu in self.machine.cpus() if trapped else ():
            trap = self._dispatcher.trap_of(cpu)
            if trap is not None and self._dispatcher.site_of(trap) is site:
                self._dispatcher.undo_trap(cpu)
        # A write that was cut off may have happened all the same.
        if self.guest.memory.read(patch.addr, len(patch.old)) != patch.old:
            apply(self.guest.memory, [patch.inverse])
        self._mark_disarmed(site)
        self._unwatch_fixup(site)

    def _mark_disarmed(self, site: Site, *, keep_record: bool = False) -> None:
        if not site.armed:
            return
        self._text.remove(site.plan.patch)
        self._jumps.remove(site)
        site.armed = False
        if not site.is_jump:
            self._routes.close(site)
        self._borrows.give_back(site.plan.patch.range)
        self._dispatcher.forget(site)
        if not keep_record:
            self.region.store.remove(site.addr)

    def _make_plan(
        self, place: Place, needs_post: bool, strategy: Rung | None, wish: Wish | Refusal | None = None
    ) -> Plan:
        """Plan *place*. Where a jump is asked for and must wait, it is planned for an int3 until then."""
        if wish is None:
            wish = Refusal(Reason.NEEDS_HOST, place.addr)
        try:
            return self._plan_in_room(place, needs_post, strategy, wish)
        except RefusedError as error:
            if strategy is not Rung.OPTIMIZED or not error.refusal.reason.passes:
                raise
            return self._plan_in_room(place, needs_post, None, error.refusal)

    def _plan_in_room(self, place: Place, needs_post: bool, strategy: Rung | None, wish: Wish | Refusal) -> Plan:
        """Plan *place*; where the region is full, once more without what waits in quarantine for nothing."""
        try:
            return self._planner.plan(place, needs_post=needs_post, strategy=strategy, wish=wish)
        except RefusedError as error:
            if error.refusal.reason is not Reason.REGION_FULL or not self._end_quarantine():
                raise
            return self._planner.plan(place, needs_post=needs_post, strategy=strategy, wish=wish)

    # -- private: vCPUs, the region, failures -------------------------------------------------------------------

    def _serve_all(self) -> None:
        for site in self.armed_sites():
            if site.is_jump:
                self._fit(site)
            if not site.is_jump:
                self._routes.serve(site)

    def _shape(self) -> list[object]:
        """What is armed, and how: equal before and after what has changed nothing."""
        return [(site.addr, site.armed, site.plan, site.service) for site in self._sites.values()]

    def _settle_all(self) -> None:
        for cpu in self.machine.cpus():
            self._routes.step_off(cpu)
            self._dispatcher.dispatch(cpu)
            step_out(self.machine, cpu, self.region.header.code)

    def _lift(self) -> None:
        if not self._routes.lifted:
            with self._moment.act(changes=False):
                with self.region.memory.batch():
                    for site in self.armed_sites():
                        if self._holds_ours(site):
                            apply(self.guest.memory, [site.plan.patch.inverse])
                self._routes.lift()

    def _bring_out(self) -> None:
        """No vCPU stays in a trap of ours, on the #BP path because of one, or in a slot. No handler runs."""
        for cpu in self.machine.cpus():
            self._dispatcher.undo_trap(cpu)
            if not self._routes.step_off(cpu):
                self._dispatcher.undo_trap(cpu)
            step_out(self.machine, cpu, self.region.header.code)

    def _stack_words(self) -> list[int] | None:
        pointers = {cpu: self.machine.read_register(cpu, "rsp") for cpu in self.machine.cpus()}
        return self.guest.stack_words_into(self.region.header.range, pointers)

    def _end_quarantine(self) -> bool:
        words = self._stack_words()
        if words is None:
            return False
        inside = [self.machine.read_register(cpu, "rip") for cpu in self.machine.cpus()]
        released = self.region.slots.release(words + inside) > 0
        if not self.region.slots.quarantined:
            # Whoever adds to one does it in a slot.
            released |= self.region.counters.release() > 0
        if released:
            self._moment.change()
        return released

    def _way_to(self, cpu: CpuId, addr: VirtAddr) -> VirtAddr:
        """Where *cpu* is to be resumed to get to *addr*: there, unless the user has a breakpoint at it.

        A debugger that resumes a program at a breakpoint steps over it, and the user would not stop. So it starts at a
        jump of ours that leads there.
        """
        if not self._breakpoints.is_taken(addr):
            return addr
        slot = self._ways.get(cpu)
        if slot is None:
            slot = self.region.slots.allocate(len(_JMP_QWORD) + 8)
            if slot is None:
                return addr
            self._ways[cpu] = slot
        image = slot.image(addr, _JMP_QWORD + addr.to_bytes(8, "little"))
        write_verified(self.guest.memory, slot.start, image)
        return slot.code

    def _unmap_if_unused(self) -> bool:
        if not self.is_quiet:
            return False

        def about_to() -> None:
            if self._moment.look() is not Memory.NOW:
                raise was_loaded()
            self._moment.end()  # it may be somebody else's memory in a moment

        self.region.unmap(self.machine, about_to)
        return True

    def _drop_failed(self) -> None:
        """Disable the probes whose handler raised; their sites get their text back."""
        while self._dispatcher.failed:
            probe = self._dispatcher.failed.pop()
            if probe.enabled:
                self.failed.append(probe)
                probe.enabled = False
                if probe.counter is not None:
                    probe.counter.enable(False)
                if any(probe is other for other in self.probes):  # it may have deleted itself before it raised
                    with self._moment.act():
                        self._match_text(self._site_of(probe))

    def _tell(self, hit: Hit) -> None:
        """Tell every listener. One that raises is not told again; a hit must not fail for it."""
        for listener in () if hit.probe.hidden else tuple(self._listeners):
            try:
                listener(hit)
            except Exception:
                self._listeners.remove(listener)
                self.failed_listeners.append(traceback.format_exc())
