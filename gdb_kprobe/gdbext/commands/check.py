"""``kprobe check``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import ArgumentParser, Command, Progress, write
from gdb_kprobe.gdbext.output import unpaged
from gdb_kprobe.render.check import check, survey


class Check(Command):
    """Say what can be probed, and why not.

    kprobe check SYMBOL[+OFF] | MODULE:SYMBOL[+OFF] | 0xADDR
    kprobe check --all [--json FILE]

    One place in full: its instruction, each rung with the reason or the code that would be in the slot, what the
    guest's tables say of it, and what the guest's own kprobes would say. Of an address in the code of a probe, where a
    guest has died that faults in a displaced instruction, the place that the code stands for. With --all every
    instruction of the guest's text is classified, and the table by rung and reason shown; it takes half a minute, and
    Ctrl-C ends it. Nothing in the guest is changed.

    Example:
      kprobe check vfs_read+5"""

    def run(self, argument: str) -> None:
        options = _parser().parse_args(gdb.string_to_argv(argument))
        if options.all == (options.place is not None):
            raise KprobeError("kprobe check: one place, or --all?", "for example: kprobe check vfs_read+5")
        if options.json is not None and not options.all:
            raise KprobeError("kprobe check: --json is for --all", "leave it out, or check all: --all --json FILE")
        if options.all:
            with unpaged():
                _all(options.json)
        else:
            _one(options.place)

    def candidates(self, text: str) -> list[str]:
        return complete.arguments(_parser(), complete.places, text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("check")
    parser.add_argument("place", nargs="?")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def _one(place: str) -> None:
    if place.startswith("0x"):
        with contextlib.suppress(ValueError):
            original = api.original(int(place, 16))
            if original is not None:
                write(f"{place} is in the code of a probe. It stands for {original} ({original.addr:#x}):")
                place = f"{original.addr:#x}"
    write(check(api.check(place)))


def _all(file: Path | None) -> None:
    found = api.survey(Progress(lambda done, of: f"{done * 100 // of} % of {of >> 20} MiB of text"))
    guest = api.guest()
    write(survey(found, guest.description, guest.rules))
    if file is not None:
        file.expanduser().write_text(json.dumps(found.as_json(guest.release), indent=2) + "\n")


def register() -> None:
    Check("check")
