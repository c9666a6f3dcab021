"""Where hits stop for the host: one address, with a breakpoint of the stub for as long as a site needs it."""

from __future__ import annotations

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.hits.stop_points import Gate
from gdb_kprobe.session.probes import Asked, Site
from gdb_kprobe.target.protocols import Breakpoints


class HostGate:
    """The gate of a session, the code that asks there, and the breakpoint. *gate* says how a vCPU stands there."""

    def __init__(self, breakpoints: Breakpoints, gate: Gate) -> None:
        self.gate = gate
        self._breakpoints = breakpoints
        self._asks: dict[VirtAddr, Asked] = {}
        """By its answer; also what no site has any more, and a task may come back to."""
        self._stopping: set[VirtAddr] = set()
        self._is_open = False

    def asked(self, answer: VirtAddr) -> Asked | None:
        """The code of a site that goes on at *answer*; ``None``: that is none of this session's."""
        return self._asks.get(answer)

    def serve(self, site: Site, answer: VirtAddr | None) -> None:
        """What asks for *site* now goes on at *answer*; ``None``: nothing asks in the region."""
        (self._stopping.add if site.stops else self._stopping.discard)(site.addr)
        site.asked = None
        if answer is None:
            return
        assert site.action is not None
        assert site.action.ask is not None
        wanted = {handler.data for handler in site.handlers if handler.decides}
        probes = tuple(probe for probe in site.probes if probe.counter is not None and probe.counter.addr in wanted)
        undo = bool(site.action.ask.undo)
        site.asked = Asked(site.addr, answer, None if site.action.always else probes, undo)
        self._asks[answer] = site.asked

    def close(self, site: Site) -> None:
        """No hit of *site* comes any more, but those that are on their way."""
        self._stopping.discard(site.addr)

    def tidy(self) -> None:
        """Insert the breakpoint if a site needs it, and take it away if none does."""
        if self._stopping and not self._is_open:
            self._breakpoints.insert(self.gate.addr)
        elif not self._stopping and self._is_open:
            self._breakpoints.remove(self.gate.addr)
        self._is_open = bool(self._stopping)
