"""Probes on many addresses at once, through a gdb with the plugin, in one command each way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.testing.mi import GdbMi

# Runs in gdb: one command of MI for each probe would take longer than arming it.
_IN_GDB = """
import json

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.gdbext import api

def kprobe_arm(addresses):
    armed, refused, failed = {}, {}, {}
    for addr in addresses:
        try:
            probe = api.add(f"p:b_{addr:x} {addr:#x}")
        except RefusedError as error:
            refused[addr] = str(error.refusal.reason)
        except Exception as error:
            failed[addr] = f"{type(error).__name__}: {error}"
        else:
            site = api.site(probe)
            armed[addr] = str(site.rung), site.addr
    print(json.dumps([armed, refused, failed]))

def kprobe_counts():
    print(json.dumps({probe.place.addr: [probe.hits, probe.missed] for probe in api.probes()}))
"""

_TIMEOUT = 120


@dataclass(frozen=True, slots=True)
class Armed:
    """What became of the addresses that were to be probed: the rung of each, the reason of its refusal, or an error.

    *sites* are where the text was changed: of a probe on a landing pad that is behind the pad.
    """

    rungs: Mapping[VirtAddr, Rung]
    refused: Mapping[VirtAddr, str]
    failed: Mapping[VirtAddr, str]
    sites: frozenset[VirtAddr]


@dataclass(frozen=True, slots=True)
class Counts:
    """What the plugin says of one probe."""

    hits: int
    missed: int


def prepare(gdb: GdbMi) -> None:
    """Define in *gdb*, which has the plugin, what the functions here call."""
    gdb.console(f"python exec({_IN_GDB!r})")


def arm(gdb: GdbMi, addresses: Iterable[VirtAddr], strategy: str) -> Armed:
    """Probe each of *addresses* with *strategy* (``set kprobe strategy``)."""
    gdb.console(f"set kprobe strategy {strategy}")
    armed, refused, failed = json.loads(gdb.console(f"python kprobe_arm({list(addresses)})", _TIMEOUT))
    return Armed(
        {VirtAddr(int(addr)): Rung(rung) for addr, (rung, _) in armed.items()},
        {VirtAddr(int(addr)): reason for addr, reason in refused.items()},
        {VirtAddr(int(addr)): error for addr, error in failed.items()},
        frozenset(VirtAddr(site) for _, site in armed.values()),
    )


def counts(gdb: GdbMi) -> dict[VirtAddr, Counts]:
    """The counts of all probes, by address."""
    found = json.loads(gdb.console("python kprobe_counts()", _TIMEOUT))
    return {VirtAddr(int(addr)): Counts(*count) for addr, count in found.items()}


def is_quiet(gdb: GdbMi) -> bool:
    """Whether no task of the stopped guest is on the way through a probe: every hit is counted."""
    return gdb.console("python print(api.is_quiet())").strip() == "True"


def disarm(gdb: GdbMi) -> None:
    """Delete all probes."""
    gdb.console("kprobe delete all", _TIMEOUT)
