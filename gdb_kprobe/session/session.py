"""A session: one guest, its region, its probes. Every act is verified, and undone by :meth:`Session.detach`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import GuestResetError, GuestStateError, KprobeError, SessionOverError
from gdb_kprobe.guest.fault_entries import GATE_BREAKPOINTS, STEP_BREAKPOINTS, fault_entries
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.spec import Location, ProbeSpec
from gdb_kprobe.model import CpuId, Rung, VirtAddr
from gdb_kprobe.region.generation import Generation, MemoryState, check_live, was_loaded, was_reset
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.hits.evacuation import Evacuation
from gdb_kprobe.session.hits.handler_calls import HandlerCalls
from gdb_kprobe.session.hits.host_gate import HostGate
from gdb_kprobe.session.hits.in_guest import GuestDispatch
from gdb_kprobe.session.hits.int3_dispatch import Int3Dispatch
from gdb_kprobe.session.hits.programs import Programs
from gdb_kprobe.session.hits.resume_trampolines import ResumeTrampolines
from gdb_kprobe.session.hits.stepping import Step, Stepping
from gdb_kprobe.session.hits.stop_points import EntryGate, Read, RegionGate
from gdb_kprobe.session.hits.stub import Outcome, StubDispatcher
from gdb_kprobe.session.listeners import Listener, Listeners
from gdb_kprobe.session.probes import Probe, ProbeTable, Site, State
from gdb_kprobe.session.recovery.restore import take_back
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.arming import Arming
from gdb_kprobe.session.sites.jumps import Jumps
from gdb_kprobe.session.sites.modules import Acts, ModuleWatch, module_of
from gdb_kprobe.session.sites.originals import original_of
from gdb_kprobe.session.sites.plans import Policy, SitePlans
from gdb_kprobe.session.sites.probe_store import ProbeStore
from gdb_kprobe.session.sites.quarantine import Quarantine
from gdb_kprobe.session.sites.saved_sites import SavedSites
from gdb_kprobe.session.sites.sites import Sites
from gdb_kprobe.target.protocols import Debugger, LiveMemory, Machine

_MANY: Final = 1000
"""Probes that were added at once, whose objects Python's collector leaves out."""


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
        debugger: Debugger,
        policy: Policy,
        in_guest: GuestDispatch | None = None,
    ) -> None:
        """*in_guest* is the dispatcher in the guest; ``None``: every int3 stops at the #BP entry for the host."""
        self.machine = machine
        self.guest = guest
        self.region = region
        self.probes = ProbeTable()
        self.table = SiteTable()
        self.listeners = Listeners()
        self.failed: list[Probe] = []
        """Probes that were disabled because their handler raised; the adapter tells the user, and takes them out."""
        self.notes: list[str] = []
        """What else the user is to be told."""
        self.stops = 0
        """How often a vCPU has stopped for the host to handle its hit."""
        self._redirected: dict[str, str] = {}
        """By name of the probe, why its hits are not the calls of its function."""
        self._unseen: list[str] = []
        """What could not be looked at when the machine last stopped for the user."""
        self._debugger = debugger
        machine.watch_faults(fault_entries(guest.gates))
        self._generation = Generation(machine, region.header.phys, lambda: self._int3.all_disarmed)
        self._wire_hits(debugger, in_guest)
        self._wire_sites(debugger, policy)
        acts = Acts(self._put, self.sites.take, self._forget, self._generation.act)
        self.modules = ModuleWatch(guest, self.table, acts, self.notes)

    def _wire_hits(self, debugger: Debugger, in_guest: GuestDispatch | None) -> None:
        """Make what handles hits."""
        machine, guest, region = self.machine, self.guest, self.region
        self._programs = Programs(self.listeners, in_guest)
        self._gate = HostGate(debugger, EntryGate(guest.bp_entry) if in_guest is None else RegionGate(in_guest.gate))
        self._calls = HandlerCalls(machine, self.listeners, debugger.interruptible)
        trampolines = ResumeTrampolines(guest.memory, region, self._generation, debugger, self.table)
        self._dispatcher = StubDispatcher(machine, guest, self.table, self._gate, trampolines, self._calls)
        self._evacuation = Evacuation(machine, region, in_guest, self._dispatcher)
        self._int3 = Int3Dispatch(guest.memory, region, in_guest, self._programs, self._gate, self._evacuation)
        self._stepping = Stepping(machine, guest, debugger, self.table, self._dispatcher)

    def _wire_sites(self, debugger: Debugger, policy: Policy) -> None:
        """Make what plans and arms sites."""
        machine, guest, region, table = self.machine, self.guest, self.region, self.table
        self._quarantine = Quarantine(machine, guest, region, self._generation)
        self._store = ProbeStore(region, self._quarantine)
        self._generation.change()
        jumps = Jumps(machine, guest, debugger, table, self._programs, policy.jumps and Rung.OPTIMIZED in policy.rungs)
        self.plans = SitePlans(guest, region, table, policy, jumps, self._store)
        self.saved = SavedSites(guest, region, table, jumps, self.plans, self._quarantine)
        self.arming = Arming(guest, region, table, self._int3, self._dispatcher, self._stepping)
        self.sites = Sites(guest, table, self.plans, self.arming, self.saved, self._store)

    # -- probes -------------------------------------------------------------------------------------------------

    def plan(self, spec: ProbeSpec, strategy: Rung | None = None) -> tuple[Place, Plan]:
        """Plan a probe and change nothing. *strategy* is the one rung to use, if that is wanted.

        :raises RefusedError: a rule says no; the refusal says which.
        """
        self._look()
        place = self.plans.place_of(spec.location)
        return place, self.sites.preview(place, spec.condition, strategy)

    def add(self, probe: Probe) -> Probe:
        """Arm *probe* (or only define it, when it is not enabled).

        :raises RefusedError: a rule says no.
        :raises KprobeError: its name is taken, or the guest does not hold what it should; nothing was changed.
        """
        self._look()
        with self._generation.act():
            self._add(probe)
        self._tell_redirected()
        return probe

    def add_many(
        self, probes: Iterable[Probe], progress: Callable[[int], None] = lambda done: None
    ) -> list[tuple[Probe, KprobeError]]:
        """Arm *probes*; returns those that cannot be, with the reason. *progress* is told how many were tried.

        Cut off by an error of another kind or a Ctrl-C, it has added none; where the session is over, those so far.
        """
        self._look()
        added: list[Probe] = []
        refused: list[tuple[Probe, KprobeError]] = []
        with self._batch(), _collecting_nothing():
            try:
                for done, probe in enumerate(probes):
                    progress(done)
                    try:
                        self._add(probe)
                    except KprobeError as error:
                        refused.append((probe, error))
                    else:
                        added.append(probe)
                if len(added) >= _MANY:
                    # Nor later: it would find nothing, and take a second in the middle of a resume with all functions.
                    gc.freeze()
            except SessionOverError:
                raise
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
        site = self.table.need(probe)
        before, probe.enabled = probe.enabled, enabled
        try:
            with self._generation.act():
                if probe.counter is not None:
                    probe.counter.enable(enabled)
                (self.sites.match if enabled else self.sites.match_fewer)(site)
        except BaseException:
            probe.enabled = before
            if probe.counter is not None:
                with contextlib.suppress(KprobeError, SessionOverError):
                    probe.counter.enable(before)
            raise

    def switch(self, probe: Probe, enabled: bool, memory: LiveMemory) -> None:
        """Enable or disable *probe* while the machine runs: one store. The text stays as it is until it stops.

        :raises GuestStateError: that needs more than a store, or the machine's memory cannot be reached.
        :raises GuestResetError: that memory is not what it was.
        """
        site = self.table.of(probe)
        handlers = () if site is None or not site.armed else site.handlers
        counter = probe.counter
        if counter is None or not any(handler.data == counter.addr for handler in handlers):
            raise GuestStateError(
                f"{probe.name} has no handler in the guest now, and text is changed only while the guest is stopped",
                "stop it first (Ctrl-C, or 'interrupt')",
            )
        self.check_live(memory)
        self._generation.change_live(memory)
        counter.enable(enabled, memory)
        probe.enabled = enabled

    def delete(self, probe: Probe) -> None:
        """Take *probe* away; the site's text and slot go with its last probe."""
        self._look()
        with self._generation.act():
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
        check_live(self.region, self._generation, memory)

    def state_of(self, probe: Probe) -> State:
        """Where *probe* is in its life."""
        site = self.table.of(probe)
        if site is None:
            return State.GONE if probe.gone else State.PENDING
        return State.ARMED if site.armed and probe.enabled else State.DISABLED

    def redirected(self, probe: Probe) -> str:
        """Why the hits of *probe* are not the calls of its function, if they are not; as it was at the last stop."""
        return self.plans.redirected(probe)

    def listen(self, listener: Listener, probes: Iterable[Probe] | None = None) -> None:
        """Have *listener* told of every hit of *probes*, or of all probes; the host handles those hits then.

        The hits of all other probes are handled as before.
        """
        self._check_memory()
        self.listeners.add(listener, probes)
        try:
            with self._generation.act():
                for site in self.table.armed():
                    self.sites.serve(site)
        except BaseException:
            self.listeners.remove(listener)
            raise

    def unlisten(self, listener: Listener) -> None:
        """Do not tell *listener* any more; also while the machine runs. Nothing happens when it was dropped."""
        self.listeners.remove(listener)

    @property
    def gate(self) -> VirtAddr:
        """Where hits that the host handles stop."""
        return self._gate.gate.addr

    @property
    def dispatches_in_guest(self) -> bool:
        return self._int3.in_guest is not None

    @property
    def is_quiet(self) -> bool:
        """No task is on the way through the region: no word on any kernel stack points into it, as far as is known.

        So no hit is under way that is not counted yet. vCPUs are out of it at every stop of the user's.
        """
        return self._quarantine.why_not_quiet() is None

    def instruction_at(self, addr: int) -> VirtAddr | None:
        """The instruction that a vCPU at *addr* in our code is at, or has just executed; ``None`` outside of it."""
        return original_of(self.guest.memory, self.region, self.table, addr)

    def original_of(self, rip: int, rsp: int, read: Read) -> tuple[VirtAddr, int] | None:
        """RIP and RSP that those of a frame stand for: in a slot, or at the gate with a hit; ``None``: in neither."""
        original = self.instruction_at(rip)
        if original is not None:
            return original, rsp
        return self._dispatcher.hit_at(rip, rsp, read)

    # -- stops --------------------------------------------------------------------------------------------------

    def on_breakpoint(self, cpu: CpuId) -> bool:
        """*cpu* stopped at the gate: handle the hit, if it is one; whether the user gets the prompt.

        Other vCPUs may stand there too. The stub's breakpoint is still there when the machine is resumed, and stops
        each of them in its turn; where it would not, they are set back to before it.

        :raises GuestResetError: the guest's memory is not what it was. Nothing was done.
        """
        self._check_memory()
        self.stops += 1
        if self._int3.all_disarmed:
            return True  # the guest's own text was loaded: no probe is armed until the user resumes
        outcome = self._dispatcher.dispatch(cpu)
        self._drop_failed()
        return self._stops(outcome is Outcome.STOP, cpu)

    def on_place(self, cpu: CpuId, addr: VirtAddr) -> bool:
        """A step of the user's has brought *cpu* to *addr*, which :meth:`Breakpoints.watch` names; whether to stop.

        :raises GuestResetError: the guest's memory is not what it was. Nothing was done.
        """
        self._check_memory()
        stop = self._stepping.arrive(cpu, addr)
        self._drop_failed()
        return self._stops(stop, cpu)

    def _stops(self, stop: bool, cpu: CpuId) -> bool:
        """Whether the user gets the prompt; if not, the machine is resumed, *cpu* being where it is to go on."""
        if not stop and self.machine.quirks.stops_once:
            self._dispatcher.come_again(other for other in self.machine.cpus() if other != cpu)
        return stop

    def settle(self) -> None:
        """The machine stopped for the user: bring every vCPU to where it would be without probes.

        A vCPU at the gate has its hit handled; one on the way from an int3 of ours to its slot, or in the slot, is
        stepped out of it.

        :raises GuestResetError: the guest is not the one that was attached to any more.
        """
        self._tell_once(self._look_as_far_as_can_be())
        self._stepping.end()
        self._evacuation.settle()
        self._drop_failed()

    def disarm_all(self) -> None:
        """Put the original text back while the machine stays stopped (the kernel's ``disarm_all_kprobes``).

        The sites count as armed: :meth:`arm_all` writes their text again.

        So a user who looks at a stopped guest sees its own text. A debugger would take our int3 for the guest's, and
        step over it by adding one to RIP. And nothing is left behind if we are killed, or cut off, meanwhile.

        :raises GuestResetError: the guest's memory is not what it was. Nothing was written.
        """
        self._check_memory()
        self._disarm_all()

    def prepare_step(self, step: Step) -> None:
        """The user is about to make *step*: the places that it may come to keep the guest's text at :meth:`arm_all`."""
        self._check_memory()
        self._stepping.prepare(step)

    def arm_all(self) -> tuple[str, ...]:
        """Patch the text of all armed sites, before the machine runs; returns what could not be, and why.

        :raises GuestResetError: the guest is not the one that was attached to any more.
        """
        if not self._int3.all_disarmed:
            return ()
        self._check_boot()
        sites = self.table.armed()
        problems: list[str] = []
        try:
            problems = self._arm_all()
            self._dispatcher.resume(self._stepping.watched)
            self._stepping.start()
        finally:
            if self._generation.was_lost:
                patches = [*self._int3.hooks, *(site.plan.patch for site in (*sites, *self.table.armed()))]
                take_back(self.region.memory, self.guest, self.region.header.phys, patches)
        if self._generation.was_lost:
            raise was_loaded()
        return tuple(problems)

    def _arm_all(self) -> list[str]:
        with self._generation.act(changes=False):
            before = self.sites.shape(), self.region.changes
            self.modules.update()
            problems = self.sites.serve_all()
            problems += self.sites.match_jumps(stepped=self._stepping.is_prepared)
            rebuilt = self._int3.arm_all()
            problems += self.arming.write_patches(self._generation.is_lost, self._check_breakpoints)
            if rebuilt or (self.sites.shape(), self.region.changes) != before:
                self._generation.change()
        return problems

    def moved(self) -> None:
        """The user has made a vCPU go on somewhere else: a probe that it was stopped at counts its next hit."""
        self._dispatcher.forget_stopped()

    def detach(self) -> Detached:
        """Undo everything: text, records, mapping. What cannot be undone is left alone and named.

        :raises GuestResetError: the guest is not the one that was attached to any more. Nothing was written.
        """
        problems = self._look_as_far_as_can_be()
        with self._generation.act():
            return self._detach(problems)

    def _detach(self, problems: list[str]) -> Detached:
        self._dispatcher.complete()
        self._evacuation.undo()
        was_disarmed = self._int3.all_disarmed
        # All text first, and only then what tells of it.
        with contextlib.suppress(KprobeError):  # what is not restored is told below, site by site
            self._disarm_all()
        restored = 0
        with self.region.memory.batch():
            problems += self.saved.leave()
            for site in reversed(self.table.all()):
                if site.armed and not site.saved:
                    try:
                        self.sites.disarm(site, trapped=False)
                        restored += any(probe.is_the_users for probe in site.probes)
                    except KprobeError as error:
                        problems.append(f"{self.guest.place_of(site.addr)}: {error.message}")
        still_armed = tuple(
            str(self.guest.place_of(site.addr)) for site in self.table.armed() if self.arming.holds_ours(site)
        )
        if still_armed:
            if not was_disarmed:
                self._int3.arm_all()
            return Detached(restored, False, tuple(problems), still_armed)
        self._store.clear()
        notes = self.arming.notes
        self._int3.tidy()
        for probe in self.probes:
            probe.take_counter()
        unmapped = False
        try:
            if not problems and (why := self._unmap_if_unused()) is None:
                unmapped = True
            elif not problems:
                notes += (f"the region stays mapped, for {why}: the next attach takes it over",)
        except (KprobeError, GuestResetError) as error:
            problems.append(f"the region is not taken away: {error.message}")
        return Detached(restored, unmapped, tuple(problems), notes=notes)

    # -- private: the guest as it is now ------------------------------------------------------------------------

    def _look(self) -> None:
        """The guest may have run since the last act: is it still the same, and what of its text is gone?

        :raises GuestResetError: it is another boot. Nothing may be written any more.
        """
        self._check_boot()
        for look in self._looks():
            look()

    def _look_as_far_as_can_be(self) -> list[str]:
        """Look where what cannot be read, in a guest whose memory is damaged, say, must not keep from what follows.

        Returns what could not be looked at, and why.

        :raises GuestResetError: it is another boot. Nothing may be written any more.
        """
        self._check_boot()
        problems = []
        for look in self._looks():
            try:
                look()
            except KprobeError as error:
                problems.append(f"what the guest has changed cannot all be told: {error.message}")
        return problems

    def _looks(self) -> tuple[Callable[[], None], ...]:
        return (
            self.guest.refresh,
            self.sites.begin,
            self._forget_gone,
            self._look_at_saved,
            self.modules.look,
            self._tell_redirected,
        )

    def _forget_gone(self) -> None:
        for site in self.table.all():
            if self.arming.is_gone(site):
                with self._generation.act():
                    self._forget(site)

    def _look_at_saved(self) -> None:
        notes, free = self.saved.look()
        self.notes += notes
        for site in free:
            with self._generation.act():
                self.sites.settle_saved(site)

    def _tell_once(self, problems: list[str]) -> None:
        """Note those of *problems* that the last stop did not have."""
        self.notes += [problem for problem in problems if problem not in self._unseen]
        self._unseen = problems

    def _tell_redirected(self) -> None:
        """Note what the guest has redirected since the last look."""
        now = {}
        if self.guest.redirects():
            now = {probe.name: why for probe in self.probes if (why := self.redirected(probe))}
        self.notes += [f"{name}: {why}" for name, why in now.items() if self._redirected.get(name) != why]
        self._redirected = now

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
        found = self._generation.look()
        if found is MemoryState.OTHER:
            raise was_loaded()
        if found is not MemoryState.NOW:
            self._go_on(disarmed=found is MemoryState.DISARMED)

    def _go_on(self, *, disarmed: bool) -> None:
        """A snapshot of this session was loaded, with the sites that it has now: go on from there."""
        for_user, self._int3.all_disarmed = self._int3.all_disarmed, disarmed
        self._generation.go_on()
        self.notes.append(
            "a snapshot was loaded that has the probes of this session: they go on, with the counts of the snapshot"
        )
        self.guest.refresh()
        self.sites.forget_moment()
        self._dispatcher.forget_all()
        self._stepping.forget()
        if for_user and not disarmed:
            self._evacuation.settle()
            self._disarm_all()

    def _forget(self, site: Site) -> None:
        """The text of *site* is gone. A probe of a module waits for the next one of that name."""
        for probe in self.sites.forget(site):
            if module_of(probe):
                self.modules.wait(probe)
            else:
                self._store.strike(probe)
        self._int3.tidy()

    # -- private: sites -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _batch(self) -> Iterator[None]:
        """Around changes to many sites.

        While the machine is stopped for the user the text is not ours, and nothing else that is written is in use.
        """
        with contextlib.ExitStack() as around:
            around.enter_context(self._generation.act())
            if self._int3.all_disarmed:
                around.enter_context(self.region.memory.batch())
            yield

    def _add(self, probe: Probe) -> None:
        if self.modules.may_come(probe):
            self.probes.add(probe)
            try:
                self._store.enter(probe)
            except BaseException:
                self.probes.remove(probe)
                raise
            self.modules.wait(probe)
            return
        self.probes.add(probe)
        try:
            self._put(probe, probe.spec.location)
        except BaseException:
            self.probes.remove(probe)
            raise

    def _put(self, probe: Probe, location: Location) -> None:
        self.sites.put(probe, self.plans.place_of(location))

    def _delete(self, probe: Probe) -> None:
        if probe.gone or probe in self.modules.waiting:
            self.probes.remove(probe)
            self._store.strike(probe)
            with contextlib.suppress(ValueError):
                self.modules.waiting.remove(probe)
            return
        self.sites.take(probe)
        self.probes.remove(probe)

    # -- private: vCPUs, the region, failures -------------------------------------------------------------------

    def _check_breakpoints(self, site: Site) -> None:
        """Before the text of *site* is patched and the machine runs.

        :raises GuestStateError: the processor has too few breakpoints for what a hit of it needs, and for the user's.
        """
        most = self.machine.quirks.hardware_breakpoints
        if most is None or not site.stops:
            return
        needed = GATE_BREAKPOINTS + (STEP_BREAKPOINTS if site.plan.rung is Rung.SINGLE_STEP else 0)
        taken = self._debugger.hardware_taken()
        if taken + needed > most:
            raise GuestStateError(
                f"under KVM its hits need {needed} of the processor's {most} breakpoints, and you have {taken}",
                "delete hardware breakpoints or watchpoints of yours, then 'kprobe enable' it",
            )

    def _disarm_all(self) -> None:
        if not self._int3.all_disarmed:
            with self._generation.act(changes=False):
                self.arming.write_originals()
                self._int3.disarm_all()
                self._stepping.restored()

    def _unmap_if_unused(self) -> str | None:
        """Why it is not, where it is not."""
        why = self._quarantine.why_not_quiet()
        if why is not None:
            return why

        def about_to() -> None:
            if self._generation.look() is not MemoryState.NOW:
                raise was_loaded()
            self._generation.end()  # the guest may use that memory from now on

        self.region.unmap(self.machine, about_to)
        return None

    def _drop_failed(self) -> None:
        """Disable the probes whose handler raised; their sites get their text back."""
        while self._calls.failed:
            probe = self._calls.failed.pop()
            if probe.enabled:
                self.failed.append(probe)
                probe.enabled = False
                if probe.counter is not None:
                    probe.counter.enable(False)
                if any(probe is other for other in self.probes):  # it may have deleted itself before it raised
                    self._match_now(self.table.need(probe))

    def _match_now(self, site: Site) -> None:
        """Have *site* as its probes want, in the middle of a run: what was read of the guest before is out of date."""
        with self._generation.act():
            try:
                self.guest.refresh()
                self.sites.forget_moment()
                self.sites.match_fewer(site)
            except KprobeError as error:
                # Its probes count, or not, as their enable words say; the next resume has another look.
                self.notes.append(f"{self.guest.place_of(site.addr)} is handled as before for now: {error.message}")


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Around what makes many objects that stay: Python's collector does not go through them meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
