"""From a connection to a session: find the guest's software, restore what is left of others, place the region."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Final

from gdb_kprobe.config.profile import KernelKind, Profile, RegionConfig, RegionSource, SharedMemory
from gdb_kprobe.config.symbols import load_symbols
from gdb_kprobe.errors import NEEDS_TYPES_HINT, GuestResetError, GuestStateError, KprobeError, RegionError
from gdb_kprobe.guest.bare import BareGuest, open_bare
from gdb_kprobe.guest.linux import MODULES, LinuxGuest, open_linux
from gdb_kprobe.guest.pages import Lent, borrow_pages, giving_back
from gdb_kprobe.linux.bp_path import find_bp_path
from gdb_kprobe.model import Dispatch, PhysAddr, Rung
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.region.region import Region, adopt, create_mapped, create_premapped
from gdb_kprobe.session.hits.in_guest import GuestDispatch
from gdb_kprobe.session.recovery.orphans import find_header
from gdb_kprobe.session.recovery.restore import Restored, is_of_this_boot, restore
from gdb_kprobe.session.session import Session
from gdb_kprobe.session.sites.plans import Policy
from gdb_kprobe.session.sites.quarantine import make_room
from gdb_kprobe.target.ivshmem import find_bar
from gdb_kprobe.target.protocols import Cpus, Debugger, Machine, PhysicalMemory
from gdb_kprobe.target.ram import RamView, SharedRam


@dataclass(frozen=True, slots=True)
class Attached:
    """A session, what was found on the way (*messages*, for the user), and how long it took in seconds.

    *memory* is the session's own view of the guest's memory. *left* are the probes of a session that was cut off, whose
    text is restored; with each the counter to go on with, where a task may still add to it.
    """

    session: Session
    guest: LinuxGuest | BareGuest
    messages: tuple[str, ...]
    seconds: float
    memory: RamView
    left: tuple[tuple[Definition, Counter | None], ...] = ()

    @property
    def types(self) -> str:
        """Where the types of the guest's kernel are known from; empty if it is no Linux, which has none.

        Where they are not known: what that costs, and what to do.
        """
        if not isinstance(self.guest, LinuxGuest):
            return ""
        return self.guest.types_from or f"none (no BTF){self._unknown}. To change that, {NEEDS_TYPES_HINT}"

    @property
    def lacks(self) -> str:
        """What is not known of the guest for want of its kernel's types, and what to do; empty if nothing."""
        if not isinstance(self.guest, LinuxGuest) or self.guest.types_from:
            return ""
        return f"the guest's kernel has no types (no BTF){self._unknown}. To change that, {NEEDS_TYPES_HINT}"

    @property
    def _unknown(self) -> str:
        return "".join(f"; {what}" for what in self.guest.unknown) if isinstance(self.guest, LinuxGuest) else ""


def attach(
    machine: Machine,
    profile: Profile,
    debugger: Debugger,
    dispatch: Dispatch = Dispatch.AUTO,
    pids: Collection[int] = (),
) -> Attached:
    """Attach to the stopped *machine* as *profile* describes it; one of the processes *pids* may be its QEMU.

    :raises GuestStateError: the guest's software is not up, or cannot dispatch as asked for.
    :raises RegionError: the region cannot be used as described. Nothing was written but what restores an earlier
        session's text.
    """
    started = time.monotonic()
    check_event_delivery(machine)
    shared = SharedRam.discover(machine) if profile.shared_memory is not SharedMemory.OFF else None
    memory = RamView(machine, shared)
    if profile.shared_memory is not SharedMemory.OFF:
        memory.use_ram_of(machine, pids)
    guest = _open(machine, memory, profile)
    messages: list[str] = []
    with contextlib.ExitStack() as undo:
        region, found = _put_region(machine, memory, guest, profile.region, messages)
        if found.kept is None:
            undo.callback(_take_away, region, machine)
        if isinstance(guest, LinuxGuest):
            guest.region = region.header.range
        left = _left(found, region)
        make_room(machine, guest, region)
        in_guest = _put_dispatcher(guest, region, dispatch, messages)
        policy = profile.policy
        rungs = policy.rungs
        if not machine.quirks.holds_off_interrupts:
            rungs = tuple(rung for rung in rungs if rung is not Rung.SINGLE_STEP)
            messages.append("the host's KVM takes interrupts during a step: nothing is single-stepped")
        session = Session(
            machine,
            guest,
            region,
            debugger,
            Policy(rungs, policy.boost, policy.entry, jumps=dispatch is not Dispatch.STUB),
            in_guest,
        )
        for record in found.saved:
            session.saved.keep(record)
        undo.pop_all()
    return Attached(session, guest, tuple(messages), time.monotonic() - started, memory, left)


def check_event_delivery(machine: Cpus) -> None:
    """Exceptions must come by way of the IDT.

    :raises GuestStateError: a vCPU uses FRED, by which they do not. Nothing was asked of the guest's memory yet.
    """
    for cpu in machine.cpus():
        if machine.read_register(cpu, "cr4") & _CR4_FRED:
            raise GuestStateError(
                "the guest uses FRED (CR4.FRED): its exceptions do not come by way of the IDT, where int3s are handled",
                "boot it without 'fred=on' on the kernel's command line",
            )


_CR4_FRED: Final = 1 << 32
"""Flexible return and event delivery (SDM volume 3, 'Event Delivery with FRED')."""


def _take_away(region: Region, machine: Machine) -> None:
    """It is new, and nothing was armed. What cannot be given back to the guest now stays for the next attach."""
    with contextlib.suppress(GuestStateError, GuestResetError):
        region.unmap(machine)


def _open(machine: Machine, memory: PhysicalMemory, profile: Profile) -> LinuxGuest | BareGuest:
    match profile.kernel.kind:
        case KernelKind.LINUX:
            guest = open_linux(machine, memory, profile.kernel.vmlinux)
            guest.prepare()
            return guest
        case KernelKind.BARE:
            assert profile.kernel.symbols is not None, "the profile's reader asks for it"
            file = load_symbols(profile.kernel.symbols)
            return open_bare(machine, memory, file.symbols, file.text)


def _put_dispatcher(
    guest: LinuxGuest | BareGuest, region: Region, dispatch: Dispatch, messages: list[str]
) -> GuestDispatch | None:
    """Put the dispatcher into the region, if the guest can have one.

    :raises GuestStateError: it is asked for, and the guest cannot.
    """
    if dispatch is Dispatch.STUB:
        return None
    if not isinstance(guest, LinuxGuest):
        if dispatch is Dispatch.GUEST:
            raise GuestStateError(
                "dispatch inside the guest needs Linux: only its #BP path is known",
                "leave --dispatch away: the stub handles the hits of any guest",
            )
        return None
    try:
        return GuestDispatch(region, guest.memory, find_bp_path(guest.memory, guest.kallsyms, guest.bp_entry))
    except GuestStateError as error:
        if dispatch is Dispatch.GUEST:
            raise
        messages.append(f"hits are dispatched by the stub, for the guest cannot: {error.message}")
        return None


def _put_region(
    machine: Machine,
    memory: PhysicalMemory,
    guest: LinuxGuest | BareGuest,
    config: RegionConfig,
    messages: list[str],
) -> tuple[Region, Restored]:
    """The region in its place, and what a session before has left in it."""
    if config.source is RegionSource.PREMAPPED:
        assert config.virtual is not None, "the profile's reader asks for it"
        found = restore(machine, memory, guest, guest.memory.translate(config.virtual), premapped=True)
        if found.kept is not None:
            region = adopt(memory, machine, guest, found.kept, found.saved)
        else:
            region = create_premapped(memory, machine, guest, config.virtual, config.size)
    elif config.source is RegionSource.BORROWED:
        assert isinstance(guest, LinuxGuest), "the profile's reader asks for it"
        found, region = _borrowed(machine, memory, guest, config, messages)
    else:
        phys = _physical(machine, guest, config)
        found = restore(machine, memory, guest, phys)
        if found.kept is not None:
            region = adopt(memory, machine, guest, found.kept, found.saved)
        else:
            region = create_mapped(memory, machine, guest, phys, config.size, config.virtual, MODULES)
    messages += found.messages
    return region, found


def _borrowed(
    machine: Machine, memory: PhysicalMemory, guest: LinuxGuest, config: RegionConfig, messages: list[str]
) -> tuple[Restored, Region]:
    """A region in memory of the guest's allocator: what a session that was cut off has left, or asked for now."""
    header = find_header(memory, guest.memory, guest.bp_entry)
    # Of whichever source: the guest runs for the asking, and must not run into what is armed.
    is_ours = header is not None and is_of_this_boot(memory, guest, header)
    found = Restored() if header is None else restore(machine, memory, guest, header.phys)
    if found.kept is not None:
        region = adopt(memory, machine, guest, found.kept, found.saved)
        lent = Lent(found.kept.phys, found.kept.size, found.kept.lent)
    else:
        if header is not None and header.lent and is_ours:
            lent = Lent(header.phys, header.size, header.lent)
            if lent.size != config.size:
                messages.append(f"the region is that of an earlier session, of {lent.size >> 20} MiB")
        else:
            lent = borrow_pages(machine, guest, config.size)
            if lent.size < config.size:
                messages.append(
                    f"the guest has no {config.size >> 20} MiB of free memory in one piece: the region is of "
                    f"{lent.size >> 20} MiB"
                )
        try:
            region = create_mapped(
                memory, machine, guest, lent.start, lent.size, config.virtual, MODULES, lent=lent.order
            )
        except KprobeError:
            with contextlib.suppress(GuestStateError, GuestResetError), giving_back(machine, guest, lent) as give_back:
                give_back()
            raise
    if lent.order:
        region.giving_back = partial(giving_back, machine, guest, lent)
    return found, region


def _left(found: Restored, region: Region) -> tuple[tuple[Definition, Counter | None], ...]:
    if found.kept is None:
        return tuple((definition, None) for definition in found.definitions)
    region.keep_counters([definition.counter for definition in found.definitions])
    return tuple((definition, region.counters.at(definition.counter)) for definition in found.definitions)


def _physical(machine: Machine, guest: LinuxGuest | BareGuest, config: RegionConfig) -> PhysAddr:
    """Where the region's memory is.

    :raises RegionError: the guest uses that memory itself, or there is not enough of it.
    """
    if config.source is RegionSource.IVSHMEM:
        start, size = find_bar(machine)
        if size < config.size:
            raise RegionError(
                f"the ivshmem device has {size >> 20} MiB, the profile asks for {config.size >> 20}",
                "make the memory-backend-file larger, or region.size smaller",
            )
        return start
    assert config.physical is not None, "the profile's reader asks for it"
    if isinstance(guest, LinuxGuest):
        table = guest.e820()
        if not table.is_reserved(config.physical, config.size):
            raise RegionError(
                f"the guest does not leave physical {config.physical:#x} (+{config.size >> 20} MiB) alone: "
                f"{table.describe(config.physical, config.size)}",
                f"boot it with memmap={config.size >> 20}M${config.physical:#x} on the kernel's command line "
                "(in a GRUB file the $ is written \\\\\\$)",
            )
    return config.physical
