"""The probes of a session and the sites they sit on: the state, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.spec import FetchArg, ProbeSpec
from gdb_kprobe.model import CpuId, Rung, VirtAddr
from gdb_kprobe.session.context import Handler
from gdb_kprobe.session.guest import Place


class State(StrEnum):
    """Where a probe is in its life."""

    PENDING = "pending"
    """Defined before there was a guest to arm it in."""
    ARMED = "armed"
    DISABLED = "disabled"
    GONE = "gone"
    """Its module was unloaded, and its text with it."""


@dataclass(slots=True)
class Probe:
    """One probe: its definition, its handlers, its counts."""

    spec: ProbeSpec
    pre: Handler | None = None
    post: Handler | None = None
    enabled: bool = True
    strategy: Rung | None = None
    """The one rung that was asked for; ``None``: the best there is."""
    hits: int = 0
    missed: int = 0
    """Times the instruction ran without the handlers: re-entered, or the handler failed."""
    place: Place | None = None
    """Where it is; ``None`` while it is only noted."""
    gone: bool = False
    """The module it was in was unloaded."""
    last_error: str = ""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(slots=True)
class Site:
    """One patched instruction; several probes may share it, as the kernel's aggregate probes do."""

    plan: Plan
    probes: list[Probe] = field(default_factory=list)
    armed: bool = False
    fixup: VirtAddr | None = None
    """Where the guest goes on when a fault of the instruction is fixed up: a site of its own while this is armed."""
    owner: str = ""
    """The module that the text belongs to (:meth:`Guest.owner_of`)."""
    watchers: set[VirtAddr] = field(default_factory=set)
    """Sites whose :attr:`fixup` this one is."""

    @property
    def addr(self) -> VirtAddr:
        return self.plan.insn.addr

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
        """:raises KprobeError: the name is taken."""
        if probe.name in self._probes:
            raise KprobeError(
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
