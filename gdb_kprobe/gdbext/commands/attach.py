"""``kprobe attach``."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import gdb

from gdb_kprobe.config.profile import KernelKind, Profile
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.output import unpaged
from gdb_kprobe.gdbext.waiting import wait_for_kernel
from gdb_kprobe.model import Dispatch
from gdb_kprobe.session.attach import Attached
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.sites.modules import module_of


class Attach(Command):
    """Attach to the guest that a profile describes.

    kprobe attach [--wait] [--dispatch auto|guest|stub] [--vmlinux FILE] [PROFILE]

    PROFILE is a YAML file, or the name of one in configs/; without it, 'set kprobe profile' says which. 'plain' is for
    any 'qemu-system-x86_64 -s': its region is memory that is asked from the guest's own allocator, for which the guest
    runs for a moment.
    gdb is connected to the profile's gdbstub, if it is not connected already. Then the kernel, its symbols and its
    modules are found in guest memory (no debug info is needed), the region is put in place, and the probes that were
    added before are armed. The text of probes that an earlier gdb left behind is restored first; to go on with them,
    see 'kprobe adopt'.
    What needs the types of the kernel's structures has them from its BTF. For a kernel without BTF --vmlinux names its
    vmlinux (as does 'kernel: {vmlinux: FILE}' in the profile), with debug info; else that is refused, and all the rest
    works.
    With --wait a guest that is still booting runs until its kernel is up.
    Where the guest runs Linux, hits are dispatched inside the guest. Only hits of a probe with a handler in Python,
    under 'kprobe trace', or on the single-step rung stop the machine; conditions are compiled into the guest, so that
    a hit which the condition of a handler or a trace rejects stops nothing. With --dispatch stub every hit stops it.

    Example:
      kprobe attach debian"""

    def run(self, argument: str) -> None:
        args = attach_parser().parse_args(gdb.string_to_argv(argument))
        profile = profile_of(args)
        started = time.monotonic()
        if args.wait:
            with unpaged():
                wait_for_kernel(profile)
        attached, refused = attach(profile, Dispatch(args.dispatch))
        session = attached.session
        region = session.region.header
        write(f"Attached to {attached.guest.description}; {len(session.machine.cpus())} vCPU(s).")
        write(f"Hits are dispatched {'inside the guest' if session.dispatches_in_guest else 'by the stub'}.")
        write(f"Region: {region.size >> 20} MiB at {region.virt:#x} (physical {region.phys:#x}).")
        for probe in session.probes:
            state = f"{probe.place} armed" if probe.place is not None else f"waits for module {module_of(probe)}"
            write(f"{probe.name}: {state}.")
        for probe, reason in refused:
            write(f"{probe.name}: not armed, still noted: {reason}")
        if profile.kernel.vmlinux is not None:
            write(f"Debug info: 'kprobe symbols' loads {profile.kernel.vmlinux} at the right addresses.")
        elif not profile.kernel.symbols:
            write("Names: 'kprobe symbols' gives gdb the guest's own kallsyms.")
        write(f"Attached in {time.monotonic() - started:.2f} s.")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(attach_parser(), complete.profiles, text)


def attach_parser() -> ArgumentParser:
    """The arguments of the command and of its MI twin."""
    parser = ArgumentParser("attach")
    parser.add_argument("--wait", action="store_true")
    add_arguments(parser)
    return parser


def add_arguments(parser: ArgumentParser) -> None:
    """What is attached to, and how."""
    parser.add_argument("--dispatch", default=str(Dispatch.AUTO), choices=[str(choice) for choice in Dispatch])
    parser.add_argument("--vmlinux", type=Path, metavar="FILE")
    parser.add_argument("profile", nargs="?")


def profile_of(args: argparse.Namespace) -> Profile:
    """The profile that *args* name, changed as they say.

    :raises KprobeError: there is no such profile, or no such vmlinux.
    """
    profile = plugin.the_plugin().profile(args.profile)
    if args.vmlinux is None:
        return profile
    path = args.vmlinux.expanduser().absolute()
    if profile.kernel.kind is not KernelKind.LINUX:
        raise KprobeError("--vmlinux is for Linux guests", "load a bare-metal program with gdb's 'file'")
    if not path.is_file():
        raise KprobeError(f"--vmlinux: there is no file {path}", "the kernel's build has it at its top")
    return replace(profile, kernel=replace(profile.kernel, vmlinux=path))


def attach(profile: Profile, dispatch: Dispatch) -> tuple[Attached, list[tuple[Probe, str]]]:
    """Attach, and say what was found on the way; the result is that of :meth:`Plugin.attach`."""
    attached, refused = plugin.the_plugin().attach(profile, dispatch)
    for message in (*attached.messages, *filter(None, [attached.lacks])):
        write(f"kprobe: {message}.")
    return attached, refused


def register() -> None:
    Attach("attach")
