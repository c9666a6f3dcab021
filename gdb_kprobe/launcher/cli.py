"""``gdb-kprobe boot|attach|demo|...``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from gdb_kprobe.config.load import find_profile, load_profile, profile_names
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.launcher import bench, check, demo, torture
from gdb_kprobe.launcher.paths import CONFIGS, LOADER
from kprobe_guest import cli as guest_cli


def main() -> int:
    """Entry point of the script."""
    try:
        return guest_cli.main(subcommands=(*guest_cli.SUBCOMMANDS, *SUBCOMMANDS))
    except KprobeError as error:
        print(f"gdb-kprobe: {error}", file=sys.stderr)
        return 1


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", help=f"a file, or one of: {', '.join(profile_names((CONFIGS,)))}")
    parser.add_argument("--wait", action="store_true", help="let a booting guest run until its kernel is up")
    parser.add_argument("gdb_arguments", nargs="*", help="more arguments for gdb, after --")


def _attach(arguments: argparse.Namespace) -> int:
    """Become a gdb with the plugin, attached; the profile is checked before."""
    path = find_profile(arguments.profile, (CONFIGS,))
    load_profile(path)
    wait = "--wait " if arguments.wait else ""
    _become_gdb([], f"kprobe attach {wait}{path}", arguments.gdb_arguments)


def _left_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", help=f"a file, or one of: {', '.join(profile_names((CONFIGS,)))}")


def _adopt(arguments: argparse.Namespace) -> int:
    """Become a gdb that has taken over the probes of one that was killed."""
    path = find_profile(arguments.profile, (CONFIGS,))
    load_profile(path)
    _become_gdb([], f"kprobe adopt {path}", [])


def _restore(arguments: argparse.Namespace) -> int:
    """Put the guest's text back, and let it run."""
    path = find_profile(arguments.profile, (CONFIGS,))
    load_profile(path)
    _become_gdb(["-batch"], f"kprobe restore {path}", [])


def _become_gdb(options: list[str], command: str, more: list[str]) -> NoReturn:
    os.execvp("gdb", ["gdb", "-q", *options, "-ex", f"source {LOADER}", "-ex", command, *more])


SUBCOMMANDS = (
    guest_cli.Subcommand("attach", "start gdb with the plugin, attached to a guest", _attach_arguments, _attach),
    guest_cli.Subcommand("adopt", "take over the probes of a gdb that was killed", _left_arguments, _adopt),
    guest_cli.Subcommand("restore", "undo what a gdb that was killed has left in a guest", _left_arguments, _restore),
    guest_cli.Subcommand("demo", "put kprobes on a live Debian guest and count them", demo.arguments, demo.run),
    guest_cli.Subcommand("bench", "measure what a hit costs", bench.arguments, bench.run),
    guest_cli.Subcommand("check", "classify every instruction of a guest's kernel", check.arguments, check.run),
    guest_cli.Subcommand("torture", "prove on guests of its own that probes are safe", torture.arguments, torture.run),
)


if __name__ == "__main__":
    sys.exit(main())
