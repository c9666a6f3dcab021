"""What it takes to probe every function of the kernel, to continue, to stop: beside a client that sends the same bytes.

The acts are timed inside gdb, and the packets are noted in which they read and write guest memory. Then gdb lets go of
the guest, and a bare client of the gdbstub, which knows nothing but these packets, sends them one by one: that is the
floor. What it has overwritten it puts back before the guest runs again.

An act counts only where it has happened: while the guest runs with all armed, the text in the file that backs its RAM
must begin with a jump or an int3 at each site that gdb names, and in the end it must be what it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.testing.oracle import text_of
from gdb_kprobe.testing.text import TextSnapshot
from tests.bench.machine import TIMEOUT, Machine
from tests.bench.ways import Measured
from tests.support.inside import TIMED_ACTS

_ROUNDS: Final = 3
"""How often the guest is continued and stopped with all armed."""
_RUN: Final = 1.0
"""Seconds that the guest runs in each."""
_US: Final = 1e6
_PHYSICAL: Final = b"Qqemu.PhyMemMode:1"
_VIRTUAL: Final = b"Qqemu.PhyMemMode:0"

ACTS: Final = ("arm_all", "continue_all", "stop_all")
"""The acts that have a floor."""
PLAN: Final = "plan_each"
"""What arming takes beside its floor, for each probe."""
ROWS: Final = ("attach", PLAN, *(row for act in ACTS for row in (act, f"{act}_floor")))


@dataclass(frozen=True, slots=True)
class _Act:
    """What gdb did in so many *seconds*, and the *packets* of memory that it sent."""

    name: str
    seconds: float
    packets: Sequence[bytes]

    def and_then(self, more: _Act) -> _Act:
        """This act and *more* of it."""
        return _Act(self.name, self.seconds + more.seconds, (*self.packets, *more.packets))


def measure_bulk(machine: Machine, profile: str) -> dict[str, Measured]:
    """Measure each of :data:`ROWS` once, on a guest that runs and has no probes; the same afterwards.

    :raises KprobeError: not all is armed that gdb says is, or the text is not what it was.
    """
    machine.gdb.console(f"python exec({TIMED_ACTS!r})")
    before = text_of(machine.guest)
    # gdb says first where the guest was stopped.
    attached = float(machine.gdb.console(f"python bulk_attach({profile!r})", TIMEOUT).split()[-1])
    armed = int(machine.gdb.console("python bulk_arm()", TIMEOUT))
    sites = _sites(machine)
    seen = []
    for _ in range(_ROUNDS):
        machine.gdb.cont()
        machine.guest.check_output("true")  # once all are armed
        time.sleep(_RUN)
        seen.append(_patched(before, sites))
        machine.gdb.interrupt(TIMEOUT)
    acts = _unchanged(_take(machine))
    machine.gdb.console("kprobe detach", TIMEOUT)
    _check_text(before, "a detach")
    floors = _floors(machine.guest.gdb_address, acts)
    _check_text(before, "the bare client")
    arming = next(act.seconds for act in acts if act.name == "arm_all") * _US - floors["arm_all"].points[0][1]
    found = {
        "attach": Measured(((1, attached * _US),), 1, 1),
        PLAN: Measured(((1, arming / len(sites)),), len(sites), armed),
    }
    for name in ACTS:
        points = tuple((1, act.seconds * _US) for act in acts if act.name == name)
        # Armed is what is there while it runs: once for each time that it ran.
        found[name] = Measured(points, sum(seen), len(sites) * _ROUNDS)
        found[f"{name}_floor"] = floors[name]
    return found


def _sites(machine: Machine) -> dict[VirtAddr, Rung]:
    path = machine.guest.directory / "sites.json"
    machine.gdb.console(f"python bulk_sites({str(path)!r})", TIMEOUT)
    return {VirtAddr(addr): Rung(rung) for addr, rung in json.loads(path.read_text())}


def _patched(text: TextSnapshot, sites: dict[VirtAddr, Rung]) -> int:
    """At how many of *sites* memory has our jump, or our int3; the guest may run."""
    memory = text.guest.memory
    return sum(memory.read(addr, 1) == (b"\xe9" if rung is Rung.OPTIMIZED else b"\xcc") for addr, rung in sites.items())


def _check_text(before: TextSnapshot, what: str) -> None:
    left = before.leftovers()
    if left:
        raise KprobeError(f"the text is not what it was after {what}: {len(left)} bytes, the first at {left[0]}")


def _take(machine: Machine) -> list[_Act]:
    path = machine.guest.directory / "acts"
    machine.gdb.console(f"python bulk_take({str(path)!r})", TIMEOUT)
    acts: list[_Act] = []
    with path.open("rb") as file:
        for line in file:
            name, seconds, count = json.loads(line)
            act = _Act(name, seconds, [file.readline().rstrip(b"\n") for _ in range(count)])
            if acts and acts[-1].name == name:
                act = acts.pop().and_then(act)  # at a stop gdb calls twice
            acts.append(act)
    return acts


def _unchanged(acts: list[_Act]) -> list[_Act]:
    """*acts* without the first continue, at which all sites are new."""
    first = next(index for index, act in enumerate(acts) if act.name == "continue_all")
    return acts[:first] + acts[first + 1 :]


def _floors(address: str, acts: Sequence[_Act]) -> dict[str, Measured]:
    """What each of *acts* takes a bare client, all of them in turn."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in ACTS}
    sent = dict.fromkeys(ACTS, 0)
    answered = dict.fromkeys(ACTS, 0)
    with RspSocket(address, TIMEOUT) as client:
        with _undone(client, acts):
            for act in acts:
                started = time.monotonic()
                replies = [client.send(packet) for packet in act.packets]
                found[act.name].append((1, (time.monotonic() - started) * _US))
                sent[act.name] += len(replies)
                answered[act.name] += sum(reply[:1] != b"E" for reply in replies)
        client.detach()
    return {name: Measured(tuple(found[name]), answered[name], sent[name]) for name in ACTS}


@contextlib.contextmanager
def _undone(client: RspSocket, acts: Sequence[_Act]) -> Iterator[None]:
    """Put back what is overwritten meanwhile; the machine must not run."""
    heads = {packet[1 : packet.index(b":")] for act in acts for packet in act.packets if packet[:1] == b"M"}
    client.send(_PHYSICAL)
    kept = {head: client.send(b"m" + head) for head in sorted(heads)}
    client.send(_VIRTUAL)
    try:
        yield
    finally:
        client.send(_PHYSICAL)
        wrong = [head for head, data in kept.items() if client.send(b"M%b:%b" % (head, data)) != b"OK"]
        client.send(_VIRTUAL)
        if wrong:
            raise KprobeError(f"{len(wrong)} pieces of memory could not be put back")
