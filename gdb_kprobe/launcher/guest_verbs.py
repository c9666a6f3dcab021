"""The verbs that boot guests. To import this module needs the packages of the extra ``guests``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.launcher import check, demo
from gdb_kprobe.launcher.verb import OF_GUESTS, Verb
from kprobe_guest import cli as guest_cli
from kprobe_guest.errors import GuestError

_Arguments = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def _verb(name: str, arguments: _Arguments, run: _Run) -> Verb:
    def told(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except GuestError as error:
            raise KprobeError(str(error)) from error

    return Verb(OF_GUESTS[name], arguments, told)


VERBS = {
    **{command.name: _verb(command.name, command.arguments, command.run) for command in guest_cli.SUBCOMMANDS},
    "demo": _verb("demo", demo.arguments, demo.run),
    "check": _verb("check", check.arguments, check.run),
}
