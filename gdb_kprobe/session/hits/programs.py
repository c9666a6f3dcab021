"""What the hits of a site do in the guest: the program of each of its probes, and the way to the host."""

from __future__ import annotations

from collections.abc import Iterable

from gdb_kprobe.actions.lower import COUNTER, REGIONS, lower
from gdb_kprobe.bpf.verifier import check
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.action import Action, Ask, Verdict
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.hits.in_guest import GuestDispatch
from gdb_kprobe.session.listeners import Listeners
from gdb_kprobe.session.probes import Probe


class Programs:
    """Makes actions of probes; each program is made once.

    *listeners* are who is told of hits. *in_guest* has the gate where hits stop for the host; ``None``: no hit asks.
    """

    def __init__(self, listeners: Listeners, in_guest: GuestDispatch | None) -> None:
        self._listeners = listeners
        self._in_guest = in_guest
        self._known: dict[tuple[Condition | None, Verdict], Program] = {}

    def verdict(self, probe: Probe) -> Verdict:
        """What the program of *probe* says of a hit whose condition holds."""
        if probe.stop:
            return Verdict.STOP
        return Verdict.HOST if self.asks(probe) else Verdict.CONTINUE

    def asks(self, probe: Probe) -> bool:
        """Whether the host is to see the hits of *probe*: it has a handler in Python, is listened to, or stops."""
        return probe.needs_host or self._listeners.concern(probe)

    def wants(self, probes: Iterable[Probe]) -> object:
        """What decides :meth:`action` for *probes* at one address; equal as long as that is."""
        return [(probe.spec, probe.place, probe.counter, probe.enabled, self.verdict(probe)) for probe in probes]

    def action(self, addr: VirtAddr, probes: Iterable[Probe], *, always: bool = False) -> Action | None:
        """What a hit at *addr* does for *probes*; ``None`` where it would have to ask the host, and cannot.

        *always*: it asks whatever the probes want.
        """
        counted = [(probe, probe.counter) for probe in probes if probe.counter is not None]
        verdicts = [self.verdict(probe) for probe, _ in counted]
        handlers = tuple(
            self._handler(probe.spec.condition, verdict, counter.addr, probe.place)
            for (probe, counter), verdict in zip(counted, verdicts, strict=True)
        )
        if not always and not any(verdicts):
            return Action(handlers)
        if self._in_guest is None:
            return None
        wanted = (counter for (_, counter), verdict in zip(counted, verdicts, strict=True) if verdict or always)
        missed = next((counter.missed_addr for counter in wanted), self._in_guest.unattended)
        undo = addr if always or Verdict.CONTINUE not in verdicts else VirtAddr(0)
        return Action(handlers, Ask(self._in_guest.gate, missed, undo), always)

    def counting(self, condition: Condition | None, counter: VirtAddr, place: Place) -> Handler:
        """What a probe at *place* would do that there is not yet, and that would count in *counter*."""
        return self._handler(condition, Verdict.CONTINUE, counter, place)

    def _handler(
        self, condition: Condition | None, verdict: Verdict, counter: VirtAddr, place: Place | None
    ) -> Handler:
        program = self._known.get((condition, verdict))
        if program is None:
            checked = check(lower(condition, verdict), REGIONS)
            program = self._known[condition, verdict] = Program(checked, COUNTER, bool(verdict))
        # What it sees as ``ip``, if not the address that is patched.
        seen = None if place is None or not place.behind else place.addr
        return Handler(program, counter, seen)
