"""When a site may have a jump, and which jumps hide what.

The rules of the bytes are in :mod:`gdb_kprobe.kprobes.window`. Here are those of the moment: what the hits of the site
need, what else was put within the jump's 5 bytes, and who is executing there or will come back there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.kprobes.action import Action
from gdb_kprobe.kprobes.handler import Handler
from gdb_kprobe.kprobes.window import Window
from gdb_kprobe.language.condition import Condition
from gdb_kprobe.model import AddressRange, CpuId, Reason, Refusal, VirtAddr, offset
from gdb_kprobe.session.hits.programs import Programs
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.sites.windows import JumpRequest
from gdb_kprobe.target.protocols import Breakpoints, Cpus

_TEXT = AddressRange(VirtAddr(0xFFFF_FFFF_8000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
"""Kernel image and modules (Documentation/arch/x86/x86_64/mm.rst)."""


class Jumps:
    """The jumps of *sites*. *allowed*: there may be any."""

    def __init__(
        self,
        machine: Cpus,
        guest: Guest,
        breakpoints: Breakpoints,
        sites: SiteTable,
        programs: Programs,
        allowed: bool,
    ) -> None:
        self._machine = machine
        self._guest = guest
        self._breakpoints = breakpoints
        self._sites = sites
        self._programs = programs
        self._allowed = allowed
        self._words: frozenset[int] | None = None
        self._taken: Collection[int] | None = None
        self._stepped = False

    def request(self, addr: VirtAddr, probes: Iterable[Probe], watched: bool = False) -> JumpRequest | Refusal:
        """The jump for *probes* at *addr*, or why there must be none.

        *watched*: a hit there tells that a fault was fixed up.
        """
        if not self._allowed:
            return Refusal(Reason.POLICY, addr, "every hit is to be dispatched by the stub")
        if watched:
            return Refusal(Reason.NEEDS_HOST, addr, "a hit there ends a fault of another probe's instruction")
        enabled = [probe for probe in probes if probe.enabled]
        if self._stepped and any(probe.post is not None for probe in enabled):
            return Refusal(Reason.STEPPED, addr, "a step into the detour would not come to its post-handler")
        action = self._programs.action(addr, enabled)
        if action is None:
            stays = any(probe.needs_host for probe in enabled)
            reason = Reason.NEEDS_HOST if stays else Reason.TRACED
            return Refusal(reason, addr, "only the stub can stop a hit of this guest: at an int3")
        return JumpRequest(action, partial(self.check, addr))

    def wants(self, probes: Iterable[Probe]) -> object:
        """What decides :meth:`action` for *probes*."""
        return self._programs.wants(probes)

    def action(self, addr: VirtAddr, probes: Iterable[Probe]) -> Action | None:
        """What a hit at *addr* does for all of *probes*; those that are disabled are told so by their enable words.

        ``None``: it cannot.
        """
        return self._programs.action(addr, probes)

    def preview(self, place: Place, condition: Condition | None, counter: VirtAddr) -> JumpRequest | Refusal:
        """The jump for a probe that there is not yet; it would count in *counter*."""
        request = self.request(place.at, ())
        if isinstance(request, Refusal):
            return request
        return replace(request, action=Action((self.counting(place, condition, counter),)))

    def counting(self, place: Place, condition: Condition | None, counter: VirtAddr) -> Handler:
        """What a probe that there is not yet would do; it would count in *counter*."""
        return self._programs.counting(condition, counter, place)

    def check(self, addr: VirtAddr, window: Window) -> Refusal | None:
        """Why the jump at *addr* must not be written now."""
        place = self._guest.place_of
        for inside in window.interior:
            if inside in self._sites:
                return Refusal(Reason.PROBED_INSIDE, addr, f"at {place(inside)}")
            if inside in self._users():
                return Refusal(Reason.BREAKPOINT_INSIDE, addr, f"at {place(inside)}")
        traced = self._guest.ftrace_use(AddressRange(window.start, window.jump_end))
        if traced is not None:
            ip, why = traced
            return Refusal(Reason.FTRACE_BUSY, addr, f"at {place(ip)}: {why}")
        if not window.interior:
            return None
        words = self._live_words()
        if words is None:
            return Refusal(Reason.WINDOW_UNKNOWN, addr, "the stacks of this guest are not known")
        for inside in window.interior:
            if inside in words:
                return Refusal(Reason.WINDOW_BUSY, addr, f"at {place(inside)}; it is tried again at the next stop")
        return None

    def is_behind_an_int3(self, addr: VirtAddr) -> bool:
        """Whether a vCPU may have executed an int3 that ends at *addr*, and not have come back from it.

        No task sleeps in between: the kernel handles an int3 of its own with preemption off (``exc_int3`` and
        ``kprobe_int3_handler``). What a sleeping task has of *addr* on its stack is a remnant.
        """
        words = self._guest.stack_words_into(AddressRange(addr, offset(addr, 1)), self._stack_pointers(), on_vcpus=True)
        return words is None or bool(words) or any(rip == addr for _, rip in self._positions())

    def forget(self, *, stepped: bool = False) -> None:
        """The machine may have run, and the user may have typed: who is where must be found out anew.

        *stepped*: it is about to run for a step of the user's.
        """
        self._stepped = stepped
        self._words = None
        self._taken = None

    def disturbed(self) -> Iterator[tuple[Site, Refusal]]:
        """The sites whose jump must not be written before the machine runs, and why.

        No CPU has executed anything since the text was restored; but the user may have set one's program counter, or a
        breakpoint.
        """
        if not self._sites.hides:
            return
        for addr in self._users():
            site = self._sites.hiding(VirtAddr(addr))
            if site is not None:
                at = self._guest.place_of(VirtAddr(addr))
                yield site, Refusal(Reason.BREAKPOINT_INSIDE, site.addr, f"at {at}")
        for cpu, rip in self._positions():
            site = self._sites.hiding(VirtAddr(rip))
            if site is not None:
                yield site, Refusal(Reason.WINDOW_BUSY, site.addr, f"vCPU {cpu} is at {rip:#x}")

    def _positions(self) -> Iterator[tuple[CpuId, int]]:
        for cpu in self._machine.cpus():
            yield cpu, self._machine.read_register(cpu, "rip")

    def _stack_pointers(self) -> dict[CpuId, int]:
        return {cpu: self._machine.read_register(cpu, "rsp") for cpu in self._machine.cpus()}

    def _users(self) -> Collection[int]:
        """Where the user has breakpoints. Many jumps are planned in one act, and gdb is asked once in it."""
        if self._taken is None:
            self._taken = self._breakpoints.taken()
        return self._taken

    def _live_words(self) -> frozenset[int] | None:
        """All that is on any stack, or in a program counter, and points into text."""
        if self._words is None:
            words = self._guest.stack_words_into(_TEXT, self._stack_pointers())
            if words is None:
                return None
            self._words = frozenset(words).union(rip for _, rip in self._positions())
        return self._words
