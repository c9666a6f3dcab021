"""What a verb of the launcher is, and which there are that boot guests."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """*summary* is its line in the help, *arguments* declares its options, *run* returns the exit status."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


OF_GUESTS = {
    "build": "make everything that guests boot",
    "boot": "boot a guest and show its console",
    "nested": "run a command in an emulated machine that has KVM",
    "demo": "show what kprobes do and cost on a live Debian guest, beside a gdb breakpoint",
    "check": "classify every instruction of a guest's kernel",
}
"""Summaries of the verbs in :mod:`gdb_kprobe.launcher.guest_verbs`."""
