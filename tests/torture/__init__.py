"""``./install.sh torture``: what proves a probe safe, as commands that anybody can repeat on a kernel of their own.

Each kind is a module with ``arguments(parser)``, which declares its options, and ``run(options)``, which boots its
guests, tells what it does, ends with ``N passed, N failed`` (:func:`tests.torture.report.conclude`), and
returns the exit status.
"""

from __future__ import annotations

import argparse

from kprobe_guest import cli as guest_cli
from tests.support.command import Command
from tests.torture import (
    all_functions,
    boundaries,
    cell,
    fuzz,
    hotplug,
    kill9,
    matrix,
    modules,
    owners,
    reset,
    snapshot,
)

KINDS = (
    guest_cli.Subcommand(
        "boundaries", "probe every instruction of many functions", boundaries.arguments, boundaries.run
    ),
    guest_cli.Subcommand(
        "all-functions", "a probe on every function at once, under load", all_functions.arguments, all_functions.run
    ),
    guest_cli.Subcommand("modules", "load and unload a module under load", modules.arguments, modules.run),
    guest_cli.Subcommand("hotplug", "take a CPU offline and online under load", hotplug.arguments, hotplug.run),
    guest_cli.Subcommand("matrix", "one run each on guests of all kinds", matrix.arguments, matrix.run),
    guest_cli.Subcommand("cell", "one of these runs, on a guest of your choice", cell.arguments, cell.run),
    guest_cli.Subcommand("reset", "reset the guest under probes", reset.arguments, reset.run),
    guest_cli.Subcommand("snapshot", "save and load snapshots under probes", snapshot.arguments, snapshot.run),
    guest_cli.Subcommand("owners", "the guest's own kprobes and tracers at our places", owners.arguments, owners.run),
    guest_cli.Subcommand("fuzz", "what is made of a guest whose memory holds anything", fuzz.arguments, fuzz.run),
    guest_cli.Subcommand("kill9", "kill gdb at random moments, and go on", kill9.arguments, kill9.run),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the kinds."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="KIND")
    for kind in KINDS:
        sub = kinds.add_parser(kind.name, help=kind.summary, description=kind.summary)
        kind.arguments(sub)
        sub.set_defaults(torture=kind.run)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    status: int = options.torture(options)
    return status


COMMAND = Command("torture", "prove on guests of its own that probes are safe", arguments, run)
