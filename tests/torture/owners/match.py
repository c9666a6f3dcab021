"""Both owners at one function of a live guest, beside a guest that has only the one of its own.

The guest that never meets us takes the same steps of the guest's own. What it says must be what the other says, step by
step; and in the end the text of the other must be its own again, and its log clean.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.linux.ftrace import read_ftrace_records
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.testing import TextSnapshot
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from kprobe_guest import GuestError, GuestVm
from tests.support.functions import function_insns
from tests.support.live_patch import make_live_patch
from tests.torture.owners.guest_side import PATCHED, TRACING, Function, GuestSide, prepare
from tests.torture.owners.our_side import OurSide, WrongError
from tests.torture.owners.steps import Field, Sequence, Step

_CALLS = {
    "__x64_sys_getpriority": "140 0 0",
    "__x64_sys_getpgid": "121 0",
    "__x64_sys_getsid": "124 0",
    "__x64_sys_sched_getparam": "143 0 b:",
    "__x64_sys_sched_getscheduler": "145 0",
    "__x64_sys_capget": "125 0 0",
    "__x64_sys_sched_get_priority_max": "146 1",
    "__x64_sys_personality": "135 0xffffffff",
    "__x64_sys_timer_getoverrun": "225 5",
    "__x64_sys_getitimer": "36 0 b:",
    "__x64_sys_mincore": "27 0 0 0",
    "__x64_sys_msgget": "68 0 0",
}
"""System calls that nothing else in the guest makes, with harmless arguments. Their entries differ."""
_REACH = 14
"""Bytes behind the nop of a function's entry in which the two meet."""
_ASKED = 8
"""Every so many sequences a guest is asked to find the function by its name, for which it looks at all it has."""


class _Memory:
    """Of the copy of a guest that is looked at now: all have the same things at the same places."""

    def __init__(self, guest: GuestVm) -> None:
        self.ram = GuestRam(guest)

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self.ram.read_physical(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self.ram.write_physical(addr, data)

    def batch(self) -> AbstractContextManager[None]:
        return self.ram.batch()


class Ground:
    """What is known of a kernel: its text, and the functions where the two meet.

    Found once, in the guest of which copies are made: it has never met us.
    """

    def __init__(self, guest: GuestVm) -> None:
        """Look at *guest*, and give it what its copies take their steps by."""
        self._memory = _Memory(guest)
        with guest.held():
            self._text = TextSnapshot(GuestMonitor(guest), self._memory)
        kernel = self._text.guest
        ids = kernel.types.functions(_CALLS)
        sites = list(read_ftrace_records(kernel.memory, kernel.kallsyms, kernel.types))
        numbers = {site.ip: number for number, site in enumerate(sites, start=1)}
        found = (_function(kernel, name, call, numbers, ids.get(name, 0)) for name, call in _CALLS.items())
        self.functions = {function.name: function for function in found}
        self._starts = {name: int(kernel.kallsyms.address(name)) for name in self.functions}
        self._nops = {int(site.record): site.ip for site in sites}
        self._step = sites[0].layout.size
        self._records = list(_runs(sorted(self._nops), self._step))
        patches = _patches(kernel, guest, self.functions)
        prepare(guest, patches)
        # Unlike the other files of tracefs, this one says what it takes.
        has_fprobe = guest.run(f"grep -q 'f\\[' {TRACING}/README")[0] == 0
        places = {name: len(function.places) for name, function in self.functions.items()}
        has_bpf = len(ids) == len(_CALLS) and kernel.kallsyms.find("bpf_trampoline_link_prog") is not None
        self.field = Field(places, has_fprobe, has_bpf, bool(patches))

    def address(self, function: Function, place: str) -> int:
        return self._starts[function.name] + function.place(place)

    def leftovers(self, guest: GuestVm) -> list[str]:
        """What of the text of *guest* is not that of one that has never met us."""
        self._memory.ram = GuestRam(guest)
        return self._text.leftovers(self._touched())

    def different_records(self, guest: GuestVm, other: GuestVm) -> list[str]:
        """Which records of the core kernel's ftrace are not the same in the two guests, and what the first has."""
        here, there = self._read_records(guest), self._read_records(other)
        return [
            f"{self._text.guest.place_of(self._nops[start + at])} {found[at : at + self._step].hex()}"
            for (start, _), found, expected in zip(self._records, here, there, strict=True)
            if found != expected
            for at in range(0, len(found), self._step)
            if found[at : at + self._step] != expected[at : at + self._step]
        ]

    def _read_records(self, guest: GuestVm) -> list[bytes]:
        memory = self._text.guest.memory
        self._memory.ram = GuestRam(guest)
        memory.invalidate()
        return [memory.read(start, size) for start, size in self._records]

    def _touched(self) -> set[int]:
        """All bytes that belong to one of the two at times."""
        return {
            start + offset
            for name, start in self._starts.items()
            for offset in range(self.functions[name].places[-1] + 2 * JUMP_SIZE)
        }


def _runs(starts: list[int], step: int) -> Iterator[tuple[VirtAddr, int]]:
    """What things at sorted *starts*, each *step* bytes, take up: address and size of each run of them."""
    first = starts[0]
    for before, start in pairwise([*starts, 0]):
        if start != before + step:
            yield VirtAddr(first), before + step - first
            first = start


def _function(kernel: LinuxGuest, name: str, call: str, numbers: dict[VirtAddr, int], btf: int) -> Function:
    place = kernel.place_of(kernel.kallsyms.address(name))
    (nop,) = kernel.ftrace_sites(AddressRange(place.start, place.end))
    insns = function_insns(kernel, place.start, place.end)
    last = nop.window.end + _REACH
    places = tuple(insn.addr - place.start for insn in insns if insn.addr < last)
    return Function(name, call, places, numbers[nop.ip], btf)


def _patches(kernel: LinuxGuest, guest: GuestVm, functions: Iterable[str]) -> dict[str, bytes]:
    """A live patch of each function, as far as the kernel has such."""
    if kernel.kallsyms.find("klp_enable_patch") is None:
        return {}
    another = guest.read_file(guest.check_output("find /modules -name loop.ko").strip())
    with tempfile.TemporaryDirectory() as directory:
        return {name: make_live_patch(kernel, another, name, Path(directory), returns=PATCHED) for name in functions}


class Match:
    """Two copies of one guest: *subject* has both owners, *reference* never meets us."""

    def __init__(self, ground: Ground, subject: GuestVm, reference: GuestVm) -> None:
        self._ground = ground
        self._subject = subject
        self._reference = reference
        self._here = GuestSide(subject)
        self._there = GuestSide(reference, by_number=True)
        self.ours = OurSide(subject, self._here)
        self._function = next(iter(ground.functions.values()))
        self._owners: dict[str, bool] = {}
        """The guest's own events, its tracer and BPF program; whether they are on."""
        self._finished = 0
        self._is_patched = False
        """A live patch has calls go elsewhere: nobody enters the function behind the nop of its entry."""
        self.excused: list[str] = []

    def play(self, sequence: Sequence) -> None:
        """Take all steps, and look at what is left.

        :raises WrongError: one of them does not do as it should.
        :raises GuestError: the guest is lost.
        """
        for step in sequence:
            self.take(step)
        self.finish()

    def take(self, step: Step) -> None:
        """Take one step.

        :raises WrongError: it does not do as it should.
        :raises GuestError: the guest is lost.
        """
        if step.verb == "on":
            self._function = self._ground.functions[step.words[0]]
        elif step.verb.startswith("our."):
            addr = None
            if step.verb == "our.add":
                addr = self._ground.address(self._function, step.words[1])
            self.ours.take(step, addr, bool(self._owners))
        else:
            self.ours.let_run()
            self._take_guests(step)
            if step.verb == "call":
                calls = int(step.words[0]) * self._subject.spec.vcpus
                self.ours.count(0 if self._is_patched else calls)

    def _take_guests(self, step: Step) -> None:
        said = self._here.take(self._function, step)
        if step.verb != "guest.settle":
            expected = self._there.take(self._function, step)
            if said != expected:
                self._excuse(step, said, expected)
        match step.verb:
            case "guest.define":
                self._owners[step.words[0]] = False
            case "guest.enable" if step.words[0] in self._owners:
                self._owners[step.words[0]] = True
            case "guest.remove":
                self._owners.pop(step.words[0], None)
            case "guest.tracer":
                self._owners["tracer"] = True
            case "guest.bpf" | "guest.patch":
                self._owners[step.verb] = True
            case "guest.clear":
                self._owners.clear()
        if step.verb in ("guest.patch", "guest.unpatch", "guest.clear"):
            self._is_patched = step.verb == "guest.patch"

    def _excuse(self, step: Step, said: str, expected: str) -> None:
        """The guest said something else than without us: the one reason is that a jump of ours hides the place.

        :raises WrongError: it is not that.
        """
        if step.verb == "guest.define" and step.words[1] == "p":
            addr = self._ground.address(self._function, step.words[2])
            if "define 1" in said and self.ours.hides(addr):
                self.excused.append(said)
                self._there.take(self._function, Step("guest.remove", step.words[:1]))
                return
        raise WrongError(f"at '{step}' the guest says\n{said}\nand without us\n{expected}")

    def finish(self) -> None:
        """Look at what is left when both are gone.

        :raises WrongError: something is.
        """
        self.ours.let_run()
        self.ours.give_way()
        self._finished += 1
        if self._finished % _ASKED == 1:
            said = self._here.take(self._function, Step("guest.has"))
            if said != "filter 0":
                raise WrongError(f"its function tracer does not take the function any more: {said}")
        if different := self._ground.different_records(self._subject, self._reference):
            raise WrongError(f"its ftrace has other records than that of a guest without us: {different[:12]}")
        if left := self._ground.leftovers(self._subject):
            raise WrongError(f"text is left changed: {left[:12]}")

    def is_alive(self) -> bool:
        """Whether the guest with both owners still answers."""
        try:
            return self._subject.alive() and self._here.answers()
        except GuestError:
            return False

    def close(self) -> None:
        """End gdb, and what runs in the guests."""
        try:
            self.ours.close()
        finally:
            for side in (self._here, self._there):
                with contextlib.suppress(GuestError, AssertionError, OSError):
                    side.close()
