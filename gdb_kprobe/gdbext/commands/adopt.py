"""``kprobe adopt`` and ``kprobe restore``: what to do with probes that a gdb which was killed left in a guest."""

from __future__ import annotations

from collections.abc import Iterable

import gdb

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.attach import add_arguments, attach
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, write
from gdb_kprobe.model import Dispatch


class Adopt(Command):
    """Attach, and take over the probes that an earlier gdb left, with their counts.

    kprobe adopt [--dispatch auto|guest|stub] [--vmlinux FILE] [PROFILE]

    For when gdb was killed, or its connection lost. What the probes are and what they have counted is read from the
    guest's memory. They are armed anew before the guest runs on, so that no hit is lost. Handlers in Python are not in
    the guest: their probes count from now on, until you delete them and source the handlers again.
    Without anything to take over it is 'kprobe attach'. To have the text restored and nothing else: 'kprobe restore'.

    Example:
      kprobe adopt debian"""

    def run(self, argument: str) -> None:
        args = adopt_parser().parse_args(gdb.string_to_argv(argument))
        attached = attach(api.profile(args.profile, args.vmlinux), Dispatch(args.dispatch))
        done = api.adopt()
        write(f"Attached to {api.guest().description}; {len(done.probes)} probe(s) taken over.")
        for probe in done.probes[:_SHOWN]:
            write(f"{probe.name}: {probe.place}, {probe.hits} hit(s), {probe.missed} missed.")
        if len(done.probes) > _SHOWN:
            write(f"... and {len(done.probes) - _SHOWN} more: 'kprobe list'.")
        for name in _without_handler(done.probes, attached.left):
            write(f"{name}: its handler in Python is gone with its gdb; it only counts.")
        for text, reason in done.refused:
            write(f"not taken over: {text}: {reason}")
        for probe, reason in attached.refused:
            write(f"{probe.name}: not armed, still noted: {reason}")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(adopt_parser(), complete.profiles, text)


_SHOWN = 20
"""Probes that are listed."""


def _without_handler(probes: Iterable[api.Probe], left: Iterable[api.Definition]) -> list[str]:
    texts = {definition.text for definition in left if definition.had_handler}
    return [probe.name for probe in probes if probe.spec.text in texts]


class Restore(Command):
    """Put the text back that an earlier gdb left armed in the guest, and let it run.

    kprobe restore [PROFILE]

    For when gdb was killed, or its connection lost: 'kprobe attach', then 'kprobe detach'. What the probes have counted
    is shown before. To go on with them instead: 'kprobe adopt'.

    Example:
      kprobe restore debian"""

    def run(self, argument: str) -> None:
        args = _restore_parser().parse_args(gdb.string_to_argv(argument))
        attached = attach(api.profile(args.profile), Dispatch.AUTO, arm_noted=False)
        done = api.detach()
        for definition in attached.left[:_SHOWN]:
            write(f"{definition.text}: {definition.hits} hit(s), {definition.missed} missed.")
        if not attached.left and not attached.messages:
            write("There was nothing to restore.")
        for problem in done.problems:
            write(f"left alone: {problem}")
        gdb.execute("detach", to_string=True)
        write("Detached; the guest runs.")

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_restore_parser(), complete.profiles, text)


def adopt_parser() -> ArgumentParser:
    """The arguments of the command and of its MI twin."""
    parser = ArgumentParser("adopt")
    add_arguments(parser)
    return parser


def _restore_parser() -> ArgumentParser:
    parser = ArgumentParser("restore")
    parser.add_argument("profile", nargs="?")
    return parser


def register() -> None:
    Adopt("adopt")
    Restore("restore")
