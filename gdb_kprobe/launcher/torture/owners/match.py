"""Both owners at one function of a live guest, beside a guest that has only the one of its own.

The guest that never meets us takes the same steps of the guest's own. What it says must be what the other says, step by
step; and in the end the text of the other must be its own again, and its log clean.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from gdb_kprobe.kprobes.window import JUMP_SIZE
from gdb_kprobe.launcher.oracle import GuestMonitor, GuestRam
from gdb_kprobe.launcher.torture.owners import guest_side
from gdb_kprobe.launcher.torture.owners.guest_side import Function
from gdb_kprobe.launcher.torture.owners.our_side import OurSide, WrongError
from gdb_kprobe.launcher.torture.owners.steps import Field, Sequence, Step
from gdb_kprobe.model import AddressRange, PhysAddr
from gdb_kprobe.session.linux_guest import LinuxGuest
from gdb_kprobe.testing import TextSnapshot
from gdb_kprobe.testing.functions import function_insns
from kprobe_guest import GuestError, GuestVm

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

    Found once, in a copy of the guest that is thrown away: it has never met us.
    """

    def __init__(self, guest: GuestVm) -> None:
        self._memory = _Memory(guest)
        self._text = TextSnapshot(GuestMonitor(guest), self._memory)
        kernel = self._text.guest
        found = (_function(kernel, name, call) for name, call in _CALLS.items())
        self.functions = {function.name: function for function in found}
        self._starts = {name: int(kernel.kallsyms.address(name)) for name in self.functions}
        # Unlike the other files of tracefs, this one says what it takes.
        has_fprobe = guest.run(f"grep -q 'f\\[' {guest_side.TRACING}/README")[0] == 0
        places = {name: len(function.places) for name, function in self.functions.items()}
        self.field = Field(places, has_fprobe)

    def address(self, function: Function, place: str) -> int:
        return self._starts[function.name] + function.place(place)

    def leftovers(self, guest: GuestVm) -> list[str]:
        """What of the text of *guest* is not that of one that has never met us."""
        self._memory.ram = GuestRam(guest)
        return self._text.leftovers(self._touched())

    def _touched(self) -> set[int]:
        """All bytes that belong to one of the two at times."""
        return {
            start + offset
            for name, start in self._starts.items()
            for offset in range(self.functions[name].places[-1] + 2 * JUMP_SIZE)
        }


def _function(kernel: LinuxGuest, name: str, call: str) -> Function:
    place = kernel.place_of(kernel.kallsyms.address(name))
    (nop,) = kernel.ftrace_sites(AddressRange(place.start, place.end))
    insns = function_insns(kernel, place.start, place.end)
    last = nop.window.end + _REACH
    return Function(name, call, tuple(insn.addr - place.start for insn in insns if insn.addr < last))


class Match:
    """Two copies of one guest: *subject* has both owners, *reference* never meets us."""

    def __init__(self, ground: Ground, subject: GuestVm, reference: GuestVm) -> None:
        self._ground = ground
        self._subject = subject
        self._reference = reference
        for guest in (subject, reference):
            guest_side.prepare(guest)
        self.ours = OurSide(subject)
        self._function = next(iter(ground.functions.values()))
        self._owners: dict[str, bool] = {}
        """The guest's own events, and its tracer; whether they are on."""
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
                self.ours.count(int(step.words[0]))

    def _take_guests(self, step: Step) -> None:
        said = guest_side.take(self._subject, self._function, step)
        if step.verb != "guest.settle":
            expected = guest_side.take(self._reference, self._function, step)
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
            case "guest.clear":
                self._owners.clear()

    def _excuse(self, step: Step, said: str, expected: str) -> None:
        """The guest said something else than without us: the one reason is that a jump of ours hides the place.

        :raises WrongError: it is not that.
        """
        if step.verb == "guest.define" and step.words[1] == "p":
            addr = self._ground.address(self._function, step.words[2])
            if said.endswith("define 1\n") and self.ours.hides(addr):
                self.excused.append(said)
                guest_side.take(self._reference, self._function, Step("guest.remove", step.words[:1]))
                return
        raise WrongError(f"at '{step}' the guest says\n{said}\nand without us\n{expected}")

    def finish(self) -> None:
        """Look at what is left when both are gone.

        :raises WrongError: something is.
        """
        self.ours.let_run()
        self.ours.give_way()
        said = guest_side.take(self._subject, self._function, Step("guest.has"))
        if said != "filter 0\n":
            raise WrongError(f"its function tracer does not take the function any more: {said}")
        self._subject.check()
        if left := self._ground.leftovers(self._subject):
            raise WrongError(f"text is left changed: {left[:12]}")

    def is_alive(self) -> bool:
        """Whether the guest with both owners still answers."""
        try:
            return self._subject.alive() and self._subject.run("true", timeout=20)[0] == 0
        except GuestError:
            return False

    def close(self) -> None:
        """End gdb."""
        self.ours.close()
