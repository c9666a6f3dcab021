"""The probes of a session and the sites they sit on: the state, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from gdb_kprobe.errors import KprobeError, NameTakenError
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes import handler as compiled
from gdb_kprobe.kprobes.action import ASK_SIZE, MISS_SIZE, Action
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.language.spec import FetchArg, ProbeSpec
from gdb_kprobe.model import CpuId, ModuleLoad, Rung, VirtAddr, offset
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.session.hit_context import Handler, Watch


class State(StrEnum):
    """Where a probe is in its life."""

    PENDING = "pending"
    """Defined before there was a guest, or a module, to arm it in."""
    ARMED = "armed"
    """Its hits are counted; while the guest is stopped for the user, the text is the guest's own all the same."""
    DISABLED = "disabled"
    """Its text is restored, its counts are kept."""
    GONE = "gone"
    """Its module was unloaded, and its text with it."""


@dataclass(slots=True)
class Probe:
    """One probe: its definition, its handlers, its counts."""

    spec: ProbeSpec
    pre: Handler | None = None
    post: Handler | None = None
    enabled: bool = True
    """``False``: not armed, or told not to count by its enable word. Scripts change it by ``set_enabled()``."""
    strategy: Rung | None = None
    """The one rung that was asked for; ``None``: the best there is."""
    seen: int = 0
    """Hits that are not in the counter: of earlier sessions, and of counters that were given back."""
    failures: int = 0
    """The same of misses."""
    counter: Counter | None = None
    """Where hits are counted, by the guest and by the host; ``None`` while there is no site."""
    place: Place | None = None
    """Where it is; ``None`` while it is only noted."""
    gone: bool = False
    """The module it was in was unloaded."""
    stop: bool = False
    """A hit gives the user the prompt, at the probe, after all handlers of the site."""
    watch: Watch | None = None
    """What the session itself does at a hit. Such a probe is its own: no user and no listener knows of it."""
    last_error: str = ""
    """What its handler has raised last."""

    @property
    def name(self) -> str:
        """The name in its definition, or the one that the kernel would give it."""
        return self.spec.name

    @property
    def hits(self) -> int:
        """How often the probe was hit, now.

        :raises GuestStateError: the machine runs, and its memory is not shared with the host.
        """
        return self.seen + (self.counter.read()[0] if self.counter is not None else 0)

    @property
    def missed(self) -> int:
        """How often the instruction ran without the handlers: re-entered, unattended, or the handler failed.

        :raises GuestStateError: the machine runs, and its memory is not shared with the host.
        """
        return self.failures + (self.counter.read()[1] if self.counter is not None else 0)

    @property
    def is_the_users(self) -> bool:
        return self.watch is None

    @property
    def needs_host(self) -> bool:
        """Whether a hit is more than what the guest does by itself: something in Python is called, or it stops."""
        return self.stop or self.pre is not None or self.post is not None or self.watch is not None

    def count(self, *, hits: int = 0, missed: int = 0) -> None:
        """Count what the host has handled; in the guest's memory, where it outlives gdb."""
        if self.counter is not None:
            self.counter.add(hits, missed)
        else:
            self.seen += hits
            self.failures += missed

    def take_counter(self) -> Counter | None:
        """Take the counter away; what it says stays counted."""
        counter, self.counter = self.counter, None
        if counter is not None:
            hits, missed = counter.read()
            self.seen += hits
            self.failures += missed
        return counter


@dataclass(frozen=True, slots=True)
class Asked:
    """Code of the site at *addr* that asks the host. It may be asked by code that the site has no more.

    :ivar answer: what the guest goes on with if the host does not answer.
    :ivar probes: those whose hits the host handles; ``None``: all that the site has.
    :ivar undo: nothing of the hit has happened yet: the vCPU may go back to the instruction.
    """

    addr: VirtAddr
    answer: VirtAddr
    probes: tuple[Probe, ...] | None
    undo: bool

    @property
    def entry(self) -> VirtAddr:
        """Where the host is asked, whatever the programs would say."""
        return offset(self.answer, -ASK_SIZE)

    @property
    def goes_on(self) -> VirtAddr:
        """Where the guest goes on after the host."""
        return offset(self.answer, MISS_SIZE)


@dataclass(frozen=True, slots=True)
class Handling:
    """A handler that was written to *slot*; see :class:`~gdb_kprobe.kprobes.guest_dispatch.HandlerCode`."""

    slot: Slot
    entry: VirtAddr
    answer: VirtAddr | None
    code: bytes
    """From the entry on."""


@dataclass(frozen=True, slots=True)
class Service:
    """How the dispatcher in the guest serves a site: the handler, and what it was made for."""

    handling: Handling
    action: Action
    plan: Plan


@dataclass(slots=True)
class Site:
    """One patched instruction; several probes may share it, as the kernel's aggregate probes do."""

    plan: Plan
    probes: list[Probe] = field(default_factory=list)
    armed: bool = False
    fixup: VirtAddr | None = None
    """Where the guest goes on when a fault of the instruction is fixed up: a site of its own while this is armed."""
    owner: ModuleLoad | None = None
    """The load of the module that the text belongs to (:meth:`Guest.owner_of`)."""
    watchers: set[VirtAddr] = field(default_factory=set)
    """Sites whose :attr:`fixup` this one is."""
    saved: bool = False
    """A kprobe of the guest's own has saved its jump, which must not change
    (:mod:`gdb_kprobe.session.sites.saved_jumps`)."""
    retired: list[Counter] = field(default_factory=list)
    """Counters of probes that are gone, to which its jump still leads."""
    faults: bool = False
    """The instruction is in the guest's exception table."""
    service: Service | None = None
    """How the guest's dispatcher serves it; ``None`` when the host handles every hit, and before the first arming."""
    served: object = None
    """What decided how its hits are handled, when they were last served at a resume (:meth:`SitePlans.wants`)."""
    asked: Asked | None = None
    """What asks the host now; ``None``: nothing does, or the hits stop at the #BP entry."""

    @property
    def addr(self) -> VirtAddr:
        return self.plan.insn.addr

    @property
    def strategy(self) -> Rung | None:
        """The one rung that a probe of it asks for; ``None``: the best there is."""
        return next((probe.strategy for probe in self.probes if probe.strategy is not None), None)

    @property
    def is_jump(self) -> bool:
        """A jump is there, or is to be; else an int3."""
        return self.plan.detour is not None

    @property
    def interior(self) -> tuple[VirtAddr, ...]:
        """The instruction boundaries that its jump hides."""
        return () if self.plan.detour is None else self.plan.detour.window.interior

    @property
    def action(self) -> Action | None:
        """What a hit does inside the guest; ``None``: it stops."""
        if self.plan.detour is not None:
            return self.plan.detour.action
        return None if self.service is None else self.service.action

    @property
    def stops(self) -> bool:
        """A hit may stop the machine, for the host handles it."""
        return self.action is None or self.action.ask is not None

    @property
    def handlers(self) -> tuple[compiled.Handler, ...]:
        """What a hit runs inside the guest, or would run if the host did not handle it."""
        return () if self.action is None else self.action.handlers

    @property
    def way(self) -> VirtAddr:
        """Where what the probe displaced is executed."""
        detour, code = self.plan.detour, self.plan.slot.code
        return code if detour is None else detour.code(code).displaced.start

    @property
    def wanted(self) -> bool:
        return bool(self.watchers) or any(probe.enabled for probe in self.probes)

    @property
    def in_use(self) -> bool:
        return bool(self.probes or self.watchers)

    @property
    def needs_post(self) -> bool:
        return any(probe.post is not None for probe in self.probes)


@dataclass(frozen=True, slots=True)
class Hit:
    """What is told of one hit: *args* are the values fetched, as 64-bit registers."""

    probe: Probe
    cpu: CpuId
    args: tuple[tuple[FetchArg, int], ...]


class ProbeTable:
    """All probes by name, in the order of definition."""

    def __init__(self) -> None:
        self._probes: dict[str, Probe] = {}

    def __iter__(self) -> Iterator[Probe]:
        return iter(tuple(self._probes.values()))

    def __len__(self) -> int:
        return len(self._probes)

    def add(self, probe: Probe) -> None:
        """:raises NameTakenError: the name is taken."""
        if probe.name in self._probes:
            raise NameTakenError(
                f"there is a probe named {probe.name} already ({self._probes[probe.name].spec})",
                f"give another name (p:NAME ...), or 'kprobe delete {probe.name}' first",
            )
        self._probes[probe.name] = probe

    def get(self, name: str) -> Probe:
        """:raises KprobeError: there is none of that name."""
        probe = self._probes.get(name)
        if probe is None:
            names = ", ".join(self._probes) or "none"
            raise KprobeError(f"there is no probe named {name}", f"probes: {names}")
        return probe

    def remove(self, probe: Probe) -> None:
        del self._probes[probe.name]
