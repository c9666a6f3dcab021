"""``kprobe attach``."""

from __future__ import annotations

import time
from pathlib import Path

import gdb

from gdb_kprobe.config.profile import Profile
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.gdbext.output import unpaged
from gdb_kprobe.model import Dispatch


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
        profile = api.profile(args.profile, args.vmlinux)
        started = time.monotonic()
        if args.wait:
            with unpaged():
                api.wait_for_kernel(profile, tell_waiting)
        attached = attach(profile, Dispatch(args.dispatch))
        guest, region = api.guest(), api.region()
        write(f"Attached to {guest.description}; {guest.vcpus} vCPU(s).")
        write(f"Hits are dispatched {'inside the guest' if api.attachment().in_guest else 'by the stub'}.")
        write(f"Region: {region.range.size >> 20} MiB at {region.range.start:#x} (physical {region.phys:#x}).")
        refused = {id(probe) for probe, _ in attached.refused}
        for probe in api.probes():
            if id(probe) not in refused:
                state = f"{probe.place} armed" if probe.place else f"waits for module {probe.spec.location.module}"
                write(f"{probe.name}: {state}.")
        for probe, reason in attached.refused:
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


def attach(profile: Profile, dispatch: Dispatch, *, arm_noted: bool = True) -> api.AttachResult:
    """Attach (:func:`api.attach`), and say what was found on the way."""
    attached = api.attach(profile, dispatch, arm_noted=arm_noted)
    for message in attached.messages:
        write(f"kprobe: {message}.")
    return attached


def tell_waiting(why: str) -> None:
    """Say what is waited for."""
    write(f"waiting: {why}")
    gdb.flush()


def register() -> None:
    Attach("attach")
