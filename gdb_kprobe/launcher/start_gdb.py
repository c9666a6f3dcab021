"""``gdb-kprobe attach|adopt|restore``: become a gdb with the plugin that does that to the guest of a profile."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from gdb_kprobe.config.installation import CONFIGS, LOADER
from gdb_kprobe.config.load import find_profile, load_profile, profile_names
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.launcher.verb import Verb


def _profile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", help=f"a file, or one of: {', '.join(profile_names((CONFIGS,)))}")


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    _profile_argument(parser)
    parser.add_argument("--wait", action="store_true", help="let a booting guest run until its kernel is up")
    parser.add_argument("gdb_arguments", nargs="*", help="more arguments for gdb, after --")


def _attach(options: argparse.Namespace) -> int:
    wait = "--wait " if options.wait else ""
    _become_gdb([], f"kprobe attach {wait}{_profile(options)}", options.gdb_arguments)


def _adopt(options: argparse.Namespace) -> int:
    _become_gdb([], f"kprobe adopt {_profile(options)}", [])


def _restore(options: argparse.Namespace) -> int:
    _become_gdb(["-batch"], f"kprobe restore {_profile(options)}", [])


def _profile(options: argparse.Namespace) -> Path:
    """Return the profile's file, which is right.

    :raises ConfigError: it is not.
    """
    path = find_profile(options.profile, (Path.cwd(), CONFIGS))
    load_profile(path)
    return path


def _become_gdb(options: list[str], command: str, more: list[str]) -> NoReturn:
    try:
        os.execvp("gdb", ["gdb", "-q", *options, "-ex", f"source {LOADER}", "-ex", command, *more])
    except OSError as error:
        raise KprobeError(f"gdb cannot be started: {error.strerror}", "install gdb, with Python inside") from error


ATTACH = Verb("start gdb with the plugin, attached to a guest", _attach_arguments, _attach)
ADOPT = Verb("take over the probes of a gdb that was killed", _profile_argument, _adopt)
RESTORE = Verb("undo what a gdb that was killed has left in a guest", _profile_argument, _restore)
