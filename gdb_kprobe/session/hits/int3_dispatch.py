"""What a hit leads to: the hook, the table and the handlers of int3s in the guest, the breakpoint for the host.

Each is there exactly as long as an armed site needs it. Before a site is armed comes :meth:`Int3Dispatch.open`, and
after its text is restored :meth:`Int3Dispatch.close`; whatever is served in between follows its probes by
:meth:`Int3Dispatch.serve`.
"""

from __future__ import annotations

from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.hits.evacuation import Evacuation
from gdb_kprobe.session.hits.host_gate import HostGate
from gdb_kprobe.session.hits.in_guest import GuestDispatch
from gdb_kprobe.session.hits.programs import Programs
from gdb_kprobe.session.probes import Probe, Service, Site
from gdb_kprobe.session.transaction import apply, holds, verify
from gdb_kprobe.system.paging import PageTable


class Int3Dispatch:
    """What the int3s of a session lead to.

    *in_guest* is the dispatcher in the guest; ``None``: every hit stops at the guest's #BP entry for the host. *gate*
    is where hits stop. *evacuation* has no vCPU between an int3 and its slot.
    """

    def __init__(
        self,
        memory: PageTable,
        region: Region,
        in_guest: GuestDispatch | None,
        programs: Programs,
        gate: HostGate,
        evacuation: Evacuation,
    ) -> None:
        self.in_guest = in_guest
        self._programs = programs
        self._gate = gate
        self._memory = memory
        self._region = region
        self._evacuation = evacuation
        self._open: set[VirtAddr] = set()
        self._hooked = False
        self.all_disarmed = False
        """The guest has its own text for as long as it is stopped: the session's sites as well as the hook."""

    # -- sites --------------------------------------------------------------------------------------------------

    def open(self, site: Site) -> None:
        """Before *site* is armed: have its hits lead somewhere.

        :raises RegionError: there is no room for its handler.
        :raises StaleTextError: the guest's #BP path does not hold what it must.
        """
        if not site.is_jump:
            self._open.add(site.addr)
        self.serve(site)
        if not site.is_jump and self.in_guest is not None and not self._hooked:
            self._hook(self.in_guest)

    def serve(self, site: Site) -> None:
        """Have hits of *site* handled as its probes want; to be told of every change of them.

        :raises RegionError: there is no room for its handler.
        """
        if site.is_jump:
            assert site.plan.detour is not None
            self._gate.serve(site, site.plan.detour.code(site.plan.slot.code).answer if site.stops else None)
        elif self.in_guest is not None:
            service = self._service(self.in_guest, site)
            self.in_guest.serve(site.addr, service.handling.entry)
            self._gate.serve(site, service.handling.answer)
        else:
            self._gate.serve(site, None)
        self.tidy()

    def close(self, site: Site) -> None:
        """After *site*'s text was restored, or is gone. What nobody needs any more goes at the next :meth:`tidy`."""
        self._open.discard(site.addr)
        self._gate.close(site)
        if self.in_guest is not None:
            self.in_guest.retire(site.addr)

    def tidy(self) -> None:
        """Insert the breakpoint if it is needed; take hook and breakpoint away if not."""
        self._gate.tidy()
        if self.in_guest is not None and self._hooked and not self._open:
            self._unhook(self.in_guest)

    def free(self, site: Site) -> None:
        """*site* is dropped: its handler is not needed any more."""
        if site.service is not None:
            self._region.slots.free(site.service.handling.slot)
            site.service = None

    # -- stops --------------------------------------------------------------------------------------------------

    def disarm_all(self) -> None:
        """Give the guest its own #BP path back for as long as it is stopped; no vCPU may be on it."""
        if self.in_guest is not None and self._hooked:
            self._take_hook_out(self.in_guest)
        self.all_disarmed = True

    def arm_all(self) -> bool:
        """The machine is about to run; whether the table was made anew for that.

        :raises StaleTextError: the guest's #BP path does not hold what it must.
        """
        rebuilt = False
        if self.in_guest is not None:
            rebuilt = self.in_guest.forget_retired()
            if self._hooked:
                apply(self._memory, [self.in_guest.hook])
        self.all_disarmed = False
        return rebuilt

    @property
    def hooks(self) -> tuple[CodePatch, ...]:
        """The patch of the guest's #BP path, if there is one."""
        return () if self.in_guest is None or not self._hooked else (self.in_guest.hook,)

    # -- private ------------------------------------------------------------------------------------------------

    def _service(self, in_guest: GuestDispatch, site: Site) -> Service:
        """What *site* needs now: what it has, if that will do."""
        plan = site.plan
        probes = [probe for probe in site.probes if probe.enabled]
        stepped = plan.rung is Rung.SINGLE_STEP
        always = bool(site.watchers) or (stepped and not self._may_pass(site, probes))
        action = self._programs.action(site.addr, probes, always=always)
        assert action is not None, "there is a gate"
        old = site.service
        if old is not None and (old.action, old.plan) == (action, plan):
            return old
        handling = in_guest.make_handler(plan.insn, action, None if stepped else plan.slot.code)
        if old is not None:
            self._region.slots.free(old.handling.slot)
        site.service = Service(handling, action, plan)
        return site.service

    def _may_pass(self, site: Site, probes: list[Probe]) -> bool:
        """Whether a hit of the single-step rung needs no step if none of *probes* wants it.

        One that comes to the int3 again, for the step was not through with it, must be nothing else to the programs.
        """
        if site.faults or site.plan.insn.has_repeat_prefix or not probes:
            return False
        return all(self._programs.asks(probe) and probe.spec.condition is not None for probe in probes)

    def _hook(self, in_guest: GuestDispatch) -> None:
        self._region.records.add(in_guest.hook_record)
        self._hooked = True
        if self.all_disarmed:
            verify(self._memory, [in_guest.hook])
        else:
            apply(self._memory, [in_guest.hook])

    def _unhook(self, in_guest: GuestDispatch) -> None:
        if not self.all_disarmed:
            # A vCPU between our int3 and the hook must not get to the guest's own handler.
            self._evacuation.undo()
            self._take_hook_out(in_guest)
        self._hooked = False
        self._region.records.remove(in_guest.hook.addr)

    def _take_hook_out(self, in_guest: GuestDispatch) -> None:
        if holds(self._memory, in_guest.hook.addr, in_guest.hook.new):
            apply(self._memory, [in_guest.hook.inverse])
