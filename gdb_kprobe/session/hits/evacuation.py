"""Bring the vCPUs of a session's own machine to where they would be without probes."""

from __future__ import annotations

from gdb_kprobe.model import CpuId
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.hits.evacuate import BpCode, step_off_path, step_out
from gdb_kprobe.session.hits.in_guest import GuestDispatch
from gdb_kprobe.session.hits.stub import StubDispatcher
from gdb_kprobe.target.protocols import Cpus


class Evacuation:
    """The way of vCPUs out of what is in *region*.

    *in_guest* is the dispatcher in the guest, if there is one; *dispatcher* handles, or undoes, hits at the gate.
    """

    def __init__(
        self, machine: Cpus, region: Region, in_guest: GuestDispatch | None, dispatcher: StubDispatcher
    ) -> None:
        self._machine = machine
        self._region = region
        self._in_guest = in_guest
        self._dispatcher = dispatcher

    def settle(self) -> None:
        """The machine has stopped for the user: a vCPU at the gate, or that comes there, has its hit handled."""
        for cpu in self._machine.cpus():
            self._step_off(cpu)
            self._dispatcher.dispatch(cpu)
            self._step_out(cpu)

    def undo(self) -> None:
        """No vCPU stays in a trap of ours, on the #BP path because of one, or in a slot. No handler runs."""
        for cpu in self._machine.cpus():
            self._dispatcher.undo_trap(cpu)
            if not self._step_off(cpu):
                self._dispatcher.undo_trap(cpu)
            self._step_out(cpu)

    def _step_off(self, cpu: CpuId) -> bool:
        """Step *cpu* off the #BP path, if it is there because of us; ``False`` when it came to the gate."""
        known = self._in_guest
        if known is None:
            return True
        code = BpCode(known.path.entry_text, self._region.header.code, known.gate, known.known)
        return step_off_path(self._machine, cpu, code)

    def _step_out(self, cpu: CpuId) -> None:
        step_out(self._machine, cpu, self._region.header.code)
