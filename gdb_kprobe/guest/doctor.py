"""What a guest and its QEMU offer to probes, what is missing, and what would make it better. Nothing is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import NEEDS_TYPES_HINT, GuestStateError, KprobeError, RegionError
from gdb_kprobe.guest.fault_entries import GATE_BREAKPOINTS, STEP_BREAKPOINTS
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.bp_path import find_bp_path
from gdb_kprobe.linux.e820 import E820Entry, E820Table
from gdb_kprobe.linux.page_allocator import find_page_allocator
from gdb_kprobe.target.ivshmem import find_bar
from gdb_kprobe.target.protocols import Machine, Monitor
from gdb_kprobe.target.quirks import Accelerator
from gdb_kprobe.target.ram import SharedRam

_REGION: Final = 16 << 20
_RAM, _RESERVED = 1, 2
_FIXED: Final = (8, 0)
"""The version of QEMU in which cmpxchg16b leaves the flags alone, and vCPUs see each other's int3s go."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    :ivar what: its name, a word or two.
    :ivar state: how it is.
    :ivar remedy: what to do where it could be better; empty where it is well.
    """

    what: str
    state: str
    remedy: str = ""


def examine(machine: Machine, guest: LinuxGuest, vcpus: int) -> Iterator[Finding]:
    """Look at the stopped *machine* and its *guest*.

    :raises TargetError: the machine does not answer.
    """
    yield _qemu(machine, guest.has_cmpxchg16b, vcpus)
    yield _acceleration(machine)
    yield Finding("kernel", guest.description)
    if not guest.has_types:
        unknown = f": {'; '.join(guest.unknown)}" if guest.unknown else ""
        yield Finding("types", f"the kernel has none (no BTF){unknown}", NEEDS_TYPES_HINT)
    yield from _tables(guest)
    yield _dispatch(guest)
    yield _memory(machine)
    yield from _room(machine, guest)


def _qemu(machine: Monitor, has_cmpxchg16b: bool, vcpus: int) -> Finding:
    version = re.sub(r"(?<=\d)(?=[A-Z])", " ", machine.monitor("info version").strip())
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= _FIXED:
        return Finding("QEMU", version)
    faults = []
    if has_cmpxchg16b:
        faults.append("cmpxchg16b corrupts flags: run the guest with -cpu MODEL,-cx16")
    if vcpus > 1:
        faults.append('a guest of several vCPUs that switches jump labels may die with "Oops: int3", probed or not')
    return Finding("QEMU", version, f"{'; '.join(faults)}; QEMU 8.0 does not" if faults else "")


def _acceleration(machine: Machine) -> Finding:
    quirks = machine.quirks
    if quirks.accelerator is Accelerator.TCG:
        return Finding("accelerator", "TCG")
    limits = (
        f"KVM: hits that stop the guest take {GATE_BREAKPOINTS} of the processor's {quirks.hardware_breakpoints} "
        f"breakpoints, those that are single-stepped {GATE_BREAKPOINTS + STEP_BREAKPOINTS}; with a breakpoint of gdb's "
        "'break', which is not of the processor, each int3 costs an exit to QEMU: use 'hbreak'"
    )
    if quirks.holds_off_interrupts:
        return Finding("accelerator", limits)
    return Finding("accelerator", limits, "the host's KVM takes interrupts during a step: nothing is single-stepped")


def _tables(guest: LinuxGuest) -> Iterator[Finding]:
    yield Finding("symbols", f"{sum(len(table.addrs) for table in guest.kallsyms.tables)}, from the guest's kallsyms")
    try:
        sites = sum(len(guest.ftrace_sites(text)) for text in guest.text_ranges())
    except KprobeError as error:
        yield Finding("ftrace", f"its records cannot be read: {error.message}", "probe behind the entries' nops")
    else:
        can = "which can be borrowed for jumps" if guest.has_types else "which are left alone"
        yield Finding("ftrace", f"{sites} nops at entries, {can}")


def _dispatch(guest: LinuxGuest) -> Finding:
    try:
        find_bp_path(guest.memory, guest.kallsyms, guest.bp_entry)
    except GuestStateError as error:
        return Finding("dispatch", f"by the stub: {error.message}", "every int3 stops the machine; jumps do not")
    return Finding("dispatch", "inside the guest: a hit that is only counted does not stop the machine")


def _memory(machine: Machine) -> Finding:
    shared = SharedRam.discover(machine)
    if shared is None:
        return Finding(
            "memory",
            "through QEMU's process, if it is yours and on this host; else through the stub, and only at stops",
            "faster, if gdb may open the file: -object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/ram,"
            "share=on -machine memory-backend=ram",
        )
    name = shared.name
    shared.close()
    return Finding("memory", f"{name}, also while the guest runs")


def _room(machine: Machine, guest: LinuxGuest) -> Iterator[Finding]:
    table = guest.e820()
    for entry in set_aside(table):
        yield Finding("region", f"{entry}: 'source: reserved', 'physical: {entry.addr:#x}'")
    try:
        start, size = find_bar(machine)
    except RegionError:
        device = False
    else:
        device = True
        yield Finding("region", f"an ivshmem device of {size >> 20} MiB at {start:#x}: 'source: ivshmem'")
    if not device and not set_aside(table):
        yield _without_memory(guest, memmap_for(table))


def _without_memory(guest: LinuxGuest, word: str) -> Finding:
    """*word* is for the kernel's command line, if there is room for it."""
    state = "no memory is set aside for probes"
    set_aside_some = f"boot with {word} on the kernel's command line" if word else "give the guest more memory"
    try:
        find_page_allocator(guest.memory, guest.kallsyms, guest.banner, guest.memory.levels)
    except GuestStateError as error:
        return Finding("region", f"{state}, and it cannot be borrowed: {error.message}", set_aside_some)
    return Finding(
        "region",
        f"{state}; it can be borrowed of the guest: 'source: borrowed', as in 'kprobe attach plain'",
        f"to leave the guest's own memory alone, {set_aside_some}",
    )


def set_aside(table: E820Table) -> tuple[E820Entry, ...]:
    """The reserved ranges with room for a region that lie within RAM: what ``memmap=SIZE$ADDR`` leaves."""
    ram = {entry.end for entry in table.entries if entry.type == _RAM}
    return tuple(
        entry for entry in table.entries if entry.type == _RESERVED and entry.size >= _REGION and entry.addr in ram
    )


def memmap_for(table: E820Table) -> str:
    """A word for the kernel's command line that sets a region aside, in the middle of the largest piece of RAM."""
    ram = [entry for entry in table.entries if entry.type == _RAM and entry.size >= 8 * _REGION]
    if not ram:
        return ""
    largest = max(ram, key=lambda entry: entry.size)
    middle = (largest.addr + largest.size // 2) // _REGION * _REGION
    return f"memmap={_REGION >> 20}M${middle:#x}"
