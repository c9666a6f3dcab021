"""What a session is at a moment, as values: for scripts, and for what tests it. Nothing here writes to the guest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gdb_kprobe.bpf.insn import BpfInsn
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, Refusal, Rung, VirtAddr, offset
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.region.directory import RegionObject
from gdb_kprobe.region.layout import FIRST_PAGE
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.session import Session
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """One patched instruction of the guest; all probes at it share the patch.

    :ivar place: where the instruction is.
    :ivar insn: the instruction as the guest has it.
    :ivar family: how the instruction is moved to a slot.
    :ivar is_armed: the patch is in the text whenever the guest runs. (While the guest is stopped for the user, the text
        is the guest's own.)
    :ivar stops: hits may stop the guest for the host: a handler, a trace, the single-step rung.
    :ivar is_saved: a kprobe of the guest's own has saved the jump, which stays as it is.
    :ivar original: the bytes that are replaced, as the guest has them: those of the instruction, or of a jump's window.
    :ivar patched: what is there instead, of the same length.
    :ivar slot: where the code out of line is, in the region.
    :ivar declined: the better rungs, and why not them, the best first.
    :ivar owner: the module that the text belongs to, one load of it told from another; empty for what never goes.
    :ivar probes: names of the user's probes; none: the plugin itself has something to see here.
    """

    place: Place
    insn: Insn
    family: Family
    rung: Rung
    is_armed: bool
    stops: bool
    is_saved: bool
    original: bytes
    patched: bytes
    slot: AddressRange
    declined: tuple[tuple[Rung, Refusal], ...]
    owner: str
    probes: tuple[str, ...]

    @property
    def addr(self) -> VirtAddr:
        """The first byte that is replaced."""
        return self.place.addr

    @property
    def range(self) -> AddressRange:
        """All bytes that are replaced."""
        return AddressRange(self.addr, offset(self.addr, len(self.patched)))


@dataclass(frozen=True, slots=True)
class ProbeInfo:
    """One probe at a moment.

    :ivar hits: how often it was hit.
    :ivar missed: how often the instruction ran without its handlers.
    :ivar rung: the rung of its site; ``None`` while it has none.
    :ivar is_saved: a kprobe of the guest's own has saved the jump of its site.
    :ivar redirected: why its hits are not the calls of its function, as of the last stop; empty: they are.
    """

    probe: Probe
    hits: int
    missed: int
    rung: Rung | None = None
    is_saved: bool = False
    redirected: str = ""


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """The guest memory that is the session's, and what fills it.

    :ivar range: where it is in the guest's kernel.
    :ivar phys: where that is in guest physical memory, in one piece.
    :ivar header: what another session finds the region and all that is in it by.
    :ivar code: where the slots are.
    :ivar objects: all that is in it: kind, and offset and size in bytes.
    :ivar free: bytes that are not given out.
    :ivar slots_used: bytes in slots that are in use or quarantined.
    :ivar quarantined: slots that no probe has any more, and a task may still be in.
    :ivar gate: where hits stop for the host.
    """

    range: AddressRange
    phys: PhysAddr
    header: AddressRange
    code: AddressRange
    objects: tuple[RegionObject, ...]
    free: int
    slots_used: int
    quarantined: int
    gate: VirtAddr


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """The software in the guest.

    :ivar release: as ``uname -r`` says; empty where there is no Linux.
    :ivar slide: how far KASLR has moved the kernel, in bytes.
    :ivar build_id: that of the kernel's ELF notes; zeros where there is none.
    :ivar bp_entry: the first instruction of the guest's handler of int3.
    :ivar rules: those by which the guest's own kprobes boost an instruction, by a version of Linux that has them.
    :ivar vcpus: how many vCPUs QEMU's stub has; while the guest runs, those of the last stop.
    """

    description: str
    release: str
    slide: int
    build_id: bytes
    bp_entry: VirtAddr
    rules: Rules
    vcpus: int


@dataclass(frozen=True, slots=True)
class Attachment:
    """How the session reaches the guest.

    :ivar connection: the address of the gdbstub.
    :ivar in_guest: int3s are dispatched inside the guest; else by a breakpoint of the stub's.
    :ivar counters: where counters are read from, in words; or why that is possible only at stops.
    :ivar types: where the types of the kernel's structures are known from, in words; empty where there is no Linux.
    :ivar stops: how often a vCPU has stopped for the host to handle its hit.
    :ivar watchdog: the process that sees to the guest should gdb be killed; ``None``: there is none.
    """

    connection: str
    profile: Path
    in_guest: bool
    counters: str
    types: str
    stops: int
    watchdog: int | None


@dataclass(frozen=True, slots=True)
class AttachResult:
    """What was found by an attach.

    :ivar messages: what the user should know, a sentence each.
    :ivar left: the probes that an earlier gdb left in the guest; their text is restored.
    :ivar refused: noted probes that cannot be armed, each with the reason; they are still noted.
    :ivar seconds: how long it took to make a session of the connection.
    """

    messages: tuple[str, ...]
    left: tuple[Definition, ...]
    refused: tuple[tuple[Probe, KprobeError], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """What has become of the probes that an earlier gdb left in the guest.

    :ivar probes: those that were added, with their counts.
    :ivar refused: definitions of the others, each with the reason.
    """

    probes: tuple[Probe, ...]
    refused: tuple[tuple[str, KprobeError], ...]


@dataclass(frozen=True, slots=True)
class HandlerInfo:
    """What a hit of one probe runs inside the guest.

    :ivar program: the eBPF program, an instruction each.
    :ivar entry: where its code begins, which is that of all probes at the place; 0 where the code is part of the slot.
    :ivar code: the bytes from there on; empty where the code is part of the slot.
    """

    program: tuple[BpfInsn, ...]
    entry: VirtAddr
    code: bytes


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """The code of a function as the guest has it, without probes: ours, and kprobes of the guest's own.

    :ivar place: the function; ``place.addr`` is what was asked for.
    :ivar insns: all of its instructions, in their order.
    :ivar ftrace: where the guest's ftrace has its nops, or calls, in it.
    """

    place: Place
    insns: tuple[Insn, ...]
    ftrace: tuple[VirtAddr, ...]


def sites_of(session: Session) -> tuple[SiteInfo, ...]:
    """All sites, by address; those whose probes are disabled too."""
    return tuple(_site(session, site) for site in sorted(session.table.all(), key=lambda site: site.addr))


def site_of(session: Session, probe: Probe) -> SiteInfo | None:
    """The site that *probe* is at; ``None`` while there is none."""
    site = session.table.of(probe)
    return None if site is None else _site(session, site)


def _site(session: Session, site: Site) -> SiteInfo:
    plan = site.plan
    return SiteInfo(
        session.guest.place_of(site.addr),
        plan.insn,
        plan.family,
        plan.rung,
        site.armed,
        site.stops,
        site.saved,
        plan.patch.old,
        plan.patch.new,
        plan.slot.range,
        plan.declined,
        "" if site.owner is None else str(site.owner),
        tuple(probe.name for probe in site.probes if probe.is_the_users),
    )


def probe_of(session: Session | None, probe: Probe) -> ProbeInfo:
    """What there is to say of *probe*, which *session* need not have (``None``: there is none, and it is noted).

    :raises GuestStateError: the machine runs, and its memory is not shared with the host.
    """
    site = None if session is None else session.table.of(probe)
    if session is None or site is None:
        return ProbeInfo(probe, probe.hits, probe.missed)
    return ProbeInfo(probe, probe.hits, probe.missed, site.plan.rung, site.saved, session.redirected(probe))


def handler_of(session: Session, probe: Probe) -> HandlerInfo | None:
    """What a hit of *probe* runs inside the guest; ``None``: it has no site, or the host handles every hit there."""
    site, counter = session.table.of(probe), probe.counter
    if site is None or counter is None or (site.action is not None and site.action.always):
        return None
    mine = next((one for one in site.handlers if one.data == counter.addr), None)
    if mine is None:
        return None
    program = tuple(mine.program.checked.program)
    if site.service is None:
        return HandlerInfo(program, VirtAddr(0), b"")
    return HandlerInfo(program, site.service.handling.entry, site.service.handling.code)


def region_of(session: Session) -> RegionInfo:
    """The session's region."""
    region, header, slots = session.region, session.region.header, session.region.slots
    return RegionInfo(
        header.range,
        header.phys,
        AddressRange(header.virt, offset(header.virt, FIRST_PAGE * PAGE_SIZE)),
        header.code,
        region.objects,
        region.free,
        slots.used,
        len(slots.quarantined),
        session.gate,
    )


def guest_of(session: Session, vcpus: int) -> GuestInfo:
    """The software in the guest, which has so many *vcpus*; nothing is asked of the machine."""
    guest = session.guest
    linux = guest if isinstance(guest, LinuxGuest) else None
    return GuestInfo(
        guest.description,
        "" if linux is None else linux.release,
        0 if linux is None else linux.image.slide,
        guest.build_id,
        guest.bp_entry,
        guest.boost_rules,
        vcpus,
    )


def place_of(session: Session, where: str | int) -> Place:
    """The place that *where* means: an address, or ``SYMBOL[+OFFSET]``, ``MODULE:SYMBOL[+OFFSET]``, ``0xADDRESS``.

    :raises KprobeError: there is no such symbol, or there are several; or *where* cannot be read.
    """
    if isinstance(where, int):
        return session.guest.place_of(VirtAddr(where))
    return session.guest.resolve(parse_definition(f"p {where}").location)


def function_of(session: Session, where: str | int) -> FunctionInfo:
    """The function that *where* lies in (:func:`place_of`), as the guest has it. The machine must be stopped.

    :raises KprobeError: there is no such function, or what is in its memory cannot be read.
    """
    place = place_of(session, where)
    insns = tuple(FunctionText(session.guest, session.table.text, place).whole())
    sites = session.guest.ftrace_sites(AddressRange(insns[0].addr, insns[-1].end)) if insns else ()
    return FunctionInfo(place, insns, tuple(site.ip for site in sites))
