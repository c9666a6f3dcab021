"""A running guest that a killed gdb has left armed is changed, and gdb is told to attach, adopt or restore.

A copy of the guest serves for some mutations, each of which is undone. One gdb meets all of them. What it is told to do
must end in time, in an answer or in an error of ours; no output holds a control character; and of the text nothing is
written but what the recorded session has patched.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from qemu.qmp import QMPError

from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.testing import GdbCommandError, GdbDiedError, GdbMi, GdbTimeoutError
from kprobe_guest import GuestSpec, GuestVm, Template
from tests.support.guests import environment, profile
from tests.torture.fuzz.mutation import mutate
from tests.torture.fuzz.replaying import Recording, is_shown, left_armed, record_guest

_READ_BY = ("the region", "the region", "what a session has left", "modules", "tasks", "kprobes of the guest's own")
"""The readers in whose reads something is changed, as often as they are named."""
_DEADLINE = 20.0
"""Seconds for a command; one that finds nothing wrong takes some tenths of one."""
_ACTS = ("attach", "adopt", "restore")
_A_COPY = 3
"""Mutations of one copy of the guest, one after the other."""
_TOLD = 25


@dataclass(slots=True)
class _Ram:
    """The memory of a guest that is stopped, to be changed past QEMU's back: only what is no code."""

    guest: GuestVm
    changes: list[tuple[int, bytes, bytes]] = field(default_factory=list)

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self.guest.read_ram(addr, size)

    def change(self, addr: int, data: bytes) -> None:
        self.changes.append((addr, self.guest.read_ram(addr, len(data)), data))
        self.guest.ram()[addr : addr + len(data)] = data

    def undo(self) -> None:
        """Have the guest hold what it held, where nothing else has come since."""
        for addr, before, data in reversed(self.changes):
            if self.guest.read_ram(addr, len(data)) == data:
                self.guest.ram()[addr : addr + len(data)] = before
        self.changes.clear()


@dataclass
class LiveFuzzer:
    """Copies of one guest, and the gdb that meets them."""

    recording: Recording
    template: Template
    seed: int
    ends: Counter[str] = field(default_factory=Counter)
    """How often each act has ended in which way."""
    _gdb: GdbMi | None = None

    def rounds(self, number: int, first: int) -> Iterator[tuple[int, list[str]]]:
        """Make *number* mutations, the first of that number; yields which, and what is wrong.

        A copy serves for some: the first finds what the session has left, the others what the one before has.
        """
        index = first
        while index < first + number:
            with self.template.fork() as guest:
                for place in range(min(_A_COPY, first + number - index)):
                    try:
                        guest.stop()
                    except (QMPError, OSError):
                        # It ran with what was changed: with page tables of nonsense, say.
                        self.ends["a copy of the guest has ended by itself"] += 1
                        break
                    yield index, self._round(guest, index, place)
                    index += 1

    def _round(self, guest: GuestVm, number: int, place: int) -> list[str]:
        chosen = random.Random(f"{self.seed}:{number}")
        act = _ACTS[(number // _A_COPY + place) % len(_ACTS)]
        ram = _Ram(guest)
        changes = mutate(ram, chosen, self.recording.reads[chosen.choice(_READ_BY)])
        before = self._text(guest)
        wrong = list(self._told(act, guest, ram, before))
        return [f"mutation {number}, {act}: {changes}: {what}" for what in wrong]

    def close(self) -> None:
        """End gdb."""
        if self._gdb is not None:
            self._gdb.close()
            self._gdb = None

    def _told(self, act: str, guest: GuestVm, ram: _Ram, before: dict[VirtAddr, bytes]) -> Iterator[str]:
        gdb = self._gdb = self._gdb or GdbMi({}).__enter__()
        try:
            for name, value in environment(guest).items():
                gdb.console(f"python import os; os.environ[{name!r}] = {value!r}")
            gdb.console("set kprobe watchdog off")
            yield from self._ask(gdb, f"kprobe {act} {profile(guest)}", act)
            yield from self._compare(act, guest, before)
            yield from self._ask(gdb, "kprobe list", "kprobe list")
            ram.undo()  # the guest is about to run
            yield from self._ask(gdb, "kprobe detach", "kprobe detach")
            with contextlib.suppress(GdbCommandError):  # detached already
                gdb.console("disconnect")
            if gdb.evaluate("6 * 7") != 42:
                yield "gdb cannot count"
        except (GdbTimeoutError, GdbDiedError) as error:
            self.ends[f"{act}: gdb hangs or is dead"] += 1
            yield f"{type(error).__name__}: {error}"
            self.close()

    def _ask(self, gdb: GdbMi, command: str, what: str) -> Iterator[str]:
        try:
            told = gdb.console(command, timeout=_DEADLINE)
            self.ends[f"{what}: done"] += 1
        except GdbCommandError as error:
            told = str(error) + gdb.output
            self.ends[f"{what}: an error"] += 1
        if "Error occurred in Python" in told or "Traceback" in told or "Python Exception" in told:
            yield f"{command}: {told}"
        if not is_shown(told.replace("\t", "")):
            yield f"{command} shows {told!r}"

    @cached_property
    def _places(self) -> tuple[tuple[VirtAddr, PhysAddr], ...]:
        """The pages of the text, and where they are: a page table may be what is changed."""
        known = self.recording.known
        return tuple(
            (VirtAddr(page), known.memory.translate(VirtAddr(page)))
            for window in known.text_ranges()
            for page in range(window.start & -PAGE_SIZE, window.end, PAGE_SIZE)
        )

    def _text(self, guest: GuestVm) -> dict[VirtAddr, bytes]:
        return {virt: guest.read_ram(phys, PAGE_SIZE) for virt, phys in self._places}

    def _compare(self, act: str, guest: GuestVm, before: dict[VirtAddr, bytes]) -> Iterator[str]:
        """What of the text is not as it was, and may not be another: adopting puts new patches where the old ones were.

        A guest that was restored runs, and may switch its own jump labels and calls.
        """
        facts = self.recording.known.text_facts()
        allowed: dict[int, set[int]] = {}
        for record in self.recording.records.values():
            for index, old in enumerate(record.patch.old):
                allowed[record.patch.addr + index] = set(range(256)) if act == "adopt" else {old}
        for page, now in self._text(guest).items():
            then = before[page]
            if then == now:
                continue
            for index in (index for index in range(PAGE_SIZE) if then[index] != now[index]):
                addr = VirtAddr(page + index)
                own = any(facts.sites_in(AddressRange(addr, VirtAddr(addr + 1))))
                if now[index] not in allowed.get(addr, set()) and not own:
                    yield f"{addr:#x} held {then[index]:02x}, and holds {now[index]:02x}"


def fuzz_live(spec: GuestSpec, number: int, seed: int, first: int = 0) -> tuple[list[str], Counter[str]]:
    """Make *number* mutations of copies of one guest; returns what was wrong, and how often which command ended how."""
    with GuestVm(spec) as guest:
        left_armed(guest)
        recording = record_guest(guest)
        guest.cont()
        template = Template(guest)
    fuzzer = LiveFuzzer(recording, template, seed)
    problems: list[str] = []
    try:
        for index, wrong in fuzzer.rounds(number, first):
            for problem in wrong:
                problems.append(problem)
                print(f"FAILED {problem}", flush=True)
            if (index - first) % _TOLD == _TOLD - 1:
                print(f"  {index - first + 1} of {number}, {len(problems)} failed", flush=True)
    finally:
        fuzzer.close()
        template.close()
    return problems, fuzzer.ends
