"""What an int3 of ours leads to: the hook, the table and the handlers in the guest, the breakpoint for the host.

Each is there exactly as long as an armed site needs it. Before a site is armed comes :meth:`Routes.open`, and after its
text is restored :meth:`Routes.close`; whatever is served in between follows its probes by :meth:`Routes.serve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gdb_kprobe.kprobes.guest_dispatch import Filtered
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.linux.paging import PageTable
from gdb_kprobe.model import CpuId, Rung, VirtAddr
from gdb_kprobe.session.guest_dispatch import GuestDispatch
from gdb_kprobe.session.leave import BpCode, step_off_path
from gdb_kprobe.session.listeners import Listeners
from gdb_kprobe.session.probes import Probe, Service, Site
from gdb_kprobe.session.programs import Programs
from gdb_kprobe.session.region import Region
from gdb_kprobe.session.transaction import apply, holds, verify
from gdb_kprobe.session.traps import EntryGate, Gate, RegionGate
from gdb_kprobe.target.protocols import Breakpoints, Cpus


class Routes:
    """The routes of the sites in *sites*, the session's own table.

    *in_guest* is the dispatcher in the guest; ``None``: every hit stops at *bp_entry* for the host. *bring_out* is the
    session's way to have no vCPU between an int3 and its slot. *listeners* are who is told of hits, which the host
    handles then. *is_awaited*: a hit at the address has stopped for the user, and the vCPU will come to the int3 again.
    """

    def __init__(
        self,
        machine: Cpus,
        memory: PageTable,
        region: Region,
        breakpoints: Breakpoints,
        bp_entry: VirtAddr,
        sites: Mapping[VirtAddr, Site],
        bring_out: Callable[[], None],
        in_guest: GuestDispatch | None,
        programs: Programs,
        listeners: Listeners,
        is_awaited: Callable[[VirtAddr], bool],
    ) -> None:
        self.gate: Gate = EntryGate(bp_entry) if in_guest is None else RegionGate(in_guest.gate)
        self.in_guest = in_guest
        self._programs = programs
        self._listeners = listeners
        self._is_awaited = is_awaited
        self._machine = machine
        self._memory = memory
        self._region = region
        self._breakpoints = breakpoints
        self._sites = sites
        self._bring_out = bring_out
        self._open: set[VirtAddr] = set()
        self._stopping: set[VirtAddr] = set()
        self._gate_open = False
        self._hooked = False
        self.lifted = False
        """The guest has its own text for as long as it is stopped: the session's sites as well as the hook."""

    # -- sites --------------------------------------------------------------------------------------------------

    def open(self, site: Site) -> None:
        """Before *site* is armed: have its int3 lead somewhere.

        :raises RegionError: there is no room for its handler.
        :raises StaleTextError: the guest's #BP path does not hold what it must.
        """
        self._open.add(site.addr)
        self.serve(site)
        if self.in_guest is not None and not self._hooked:
            self._hook(self.in_guest)

    def serve(self, site: Site) -> None:
        """Have hits of *site* handled as its probes want; to be told of every change of them.

        :raises RegionError: there is no room for its handler.
        """
        if self.in_guest is None:
            self._stopping.add(site.addr)
        else:
            service = self._service(self.in_guest, site)
            self.in_guest.serve(site.addr, service.handler)
            (self._stopping.add if service.stops else self._stopping.discard)(site.addr)
        self.tidy()

    def close(self, site: Site) -> None:
        """After *site*'s text was restored, or is gone. What nobody needs any more goes at the next :meth:`tidy`."""
        self._open.discard(site.addr)
        self._stopping.discard(site.addr)
        if self.in_guest is not None:
            self.in_guest.retire(site.addr)

    def tidy(self) -> None:
        """Insert the breakpoint if it is needed; take hook and breakpoint away if not."""
        if self._stopping and not self._gate_open:
            self._breakpoints.insert(self.gate.addr)
            self._gate_open = True
        elif not self._stopping and self._gate_open:
            self._breakpoints.remove(self.gate.addr)
            self._gate_open = False
        if self.in_guest is not None and self._hooked and not self._open:
            self._unhook(self.in_guest)

    def free(self, site: Site) -> None:
        """*site* is dropped: its handler is not needed any more."""
        if site.service is not None:
            self._region.slots.free(site.service.handler)
            site.service = None

    # -- stops --------------------------------------------------------------------------------------------------

    def lift(self) -> None:
        """Give the guest its own #BP path back for as long as it is stopped; no vCPU may be on it."""
        if self.in_guest is not None and self._hooked:
            self._take_hook_out(self.in_guest)
        self.lifted = True

    def lower(self) -> bool:
        """The machine is about to run; whether the table was made anew for that.

        :raises StaleTextError: the guest's #BP path does not hold what it must.
        """
        rebuilt = False
        if self.in_guest is not None:
            rebuilt = self.in_guest.forget_retired()
            if self._hooked:
                apply(self._memory, [self.in_guest.hook])
        self.lifted = False
        return rebuilt

    def step_off(self, cpu: CpuId) -> bool:
        """Step *cpu* off the #BP path, if it is there because of us; ``False`` when it came to the gate."""
        if self.in_guest is None:
            return True
        code = BpCode(self.in_guest.path.entry_text, self._region.header.code, self.in_guest.gate, self._sites)
        return step_off_path(self._machine, cpu, code)

    @property
    def hooks(self) -> tuple[CodePatch, ...]:
        """The patch of the guest's #BP path, if there is one."""
        return () if self.in_guest is None or not self._hooked else (self.in_guest.hook,)

    # -- private ------------------------------------------------------------------------------------------------

    def _service(self, in_guest: GuestDispatch, site: Site) -> Service:
        """What *site* needs now: what it has, if that will do."""
        plan = site.plan
        probes = [probe for probe in site.probes if probe.enabled]
        handlers = self._programs.handlers(probes)
        asking: list[Probe] = []
        others: list[Probe] = []
        for probe in probes:
            (asking if probe.needs_host or self._listeners.concern(probe) else others).append(probe)
        # A hit that has stopped for the user comes again with what has been made of its registers: no filter is asked.
        for_host = plan.rung is Rung.SINGLE_STEP or bool(site.watchers) or self._is_awaited(site.addr)
        stops = for_host or bool(asking)
        filtered = None
        if asking and not for_host and (filters := self._programs.filters(asking)):
            filtered = Filtered(filters, self._programs.handlers(others))
        old = site.service
        if old is not None and (old.stops, old.handlers, old.filtered, old.plan) == (stops, handlers, filtered, plan):
            return old
        if filtered is not None:
            counters = (probe.counter for probe in asking if probe.counter is not None)
            handler = in_guest.make_filtering(site.addr, filtered, next(counters, None), plan.slot.code)
        elif stops:
            boosted = plan.slot.code if plan.rung is Rung.BOOSTED else None
            counters = (probe.counter for probe in probes if probe.counter is not None)
            handler = in_guest.make_stopping(plan.insn, next(counters, None), boosted)
        else:
            handler = in_guest.make_handling(site.addr, handlers, plan.slot.code)
        if old is not None:
            self._region.slots.free(old.handler)
        site.service = Service(handler, stops, handlers, plan, filtered)
        return site.service

    def _hook(self, in_guest: GuestDispatch) -> None:
        self._region.store.describe_entry_text(in_guest.path.entry_text)
        self._region.store.add(in_guest.hook_record, self._region.slots.high_water)
        self._hooked = True
        if self.lifted:
            verify(self._memory, [in_guest.hook])
        else:
            apply(self._memory, [in_guest.hook])

    def _unhook(self, in_guest: GuestDispatch) -> None:
        if not self.lifted:
            # Whoever is between our int3 and the hook must not get to the guest's own handler.
            self._bring_out()
            self._take_hook_out(in_guest)
        self._hooked = False
        self._region.store.remove(in_guest.hook.addr)

    def _take_hook_out(self, in_guest: GuestDispatch) -> None:
        if holds(self._memory, in_guest.hook.addr, in_guest.hook.new):
            apply(self._memory, [in_guest.hook.inverse])
