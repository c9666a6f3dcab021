"""Dispatch through the stub: what happens when a vCPU stops because of a hit for the host.

A hit is: read the interrupted context, run the handlers, and send the vCPU to what the probe displaced with all
registers as they were. The way to the host is undone; the guest never sees it. Where the vCPU stops, and where its
context is then, is the business of a :class:`~gdb_kprobe.session.hits.stop_points.Gate`. At the #BP entry all that the
probes want is done here; at the gate in the region only what the guest does not do by itself, for the probes whose
programs ask.

We may be killed between any two requests, and another debugger, which knows nothing of us, may let the guest run then.
So registers are written at once, after what they need on the stack, and a slot leads back by itself: a vCPU goes on
right from whatever has been done to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto

from gdb_kprobe.errors import SessionOverError, TargetError
from gdb_kprobe.guest.guest import GuestTraps
from gdb_kprobe.model import CpuId, Rung, VirtAddr
from gdb_kprobe.session.hit_context import Registers
from gdb_kprobe.session.hits.handler_calls import Called, HandlerCalls
from gdb_kprobe.session.hits.host_gate import HostGate
from gdb_kprobe.session.hits.resume_trampolines import ResumeTrampolines
from gdb_kprobe.session.hits.stop_points import Read, Trap
from gdb_kprobe.session.probes import Asked, Site
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.target.protocols import Cpus
from gdb_kprobe.x86 import step
from gdb_kprobe.x86.relocate import StepCopy

MAX_STEPS = 64
"""Steps that may come back with the program counter unmoved before we give up. One in 500 does."""

MAX_ITERATIONS = 4096
"""Iterations of a repeated instruction that are stepped at one hit; in between, a Ctrl-C is heard."""


_Key = tuple[VirtAddr, int]
_Memory = tuple[tuple[int, bytes], ...]


class Outcome(Enum):
    """What a stop at the #BP entry was."""

    FOREIGN = auto()
    """Not a probe of ours: the guest goes its own way."""
    HANDLED = auto()
    """A hit; the vCPU may go on."""
    STOP = auto()
    """A hit whose handler asked for the prompt; the vCPU stands at the probe point."""


class StubDispatcher:
    """Handles hits of the sites in *sites* on the stopped vCPUs of *machine*.

    *gate* is where hits stop, and who asks there. *trampolines* say where a vCPU is to be resumed so that it gets to an
    address. *calls* does what the probes want of the host.
    """

    def __init__(
        self,
        machine: Cpus,
        guest: GuestTraps,
        sites: SiteTable,
        gate: HostGate,
        trampolines: ResumeTrampolines,
        calls: HandlerCalls,
    ) -> None:
        self._machine = machine
        self._guest = guest
        self._sites = sites
        self._gate = gate
        self._trampolines = trampolines
        self._calls = calls
        # Hits that are not through: the instruction faulted, or the user got the prompt before it. The same task comes
        # back to the int3 later, maybe on another vCPU. (address, RSP) -> the probes that were called.
        self._faulted: dict[_Key, Called] = {}
        self._stopped: dict[_Key, Called] = {}
        # What is being written to a vCPU and its stack, and the step that is being made: for who must finish it.
        self._writing: tuple[CpuId, _Memory, dict[str, int]] | None = None
        self._stepping: tuple[CpuId, Site, dict[str, int], Called] | None = None
        self._relocated: CpuId | None = None

    def trap_of(self, cpu: CpuId) -> Trap | None:
        """The trap that *cpu* stands at, or ``None`` when it does not stand at the gate."""
        return self._gate.gate.trap_of(self._machine, cpu)

    def site_of(self, trap: Trap) -> Site | None:
        """The site of ours that *trap* hit."""
        asked = self._asked(trap)
        addr = trap.rip if asked is None else asked.addr
        site = None if addr is None else self._sites.get(addr)
        return site if site is not None and site.armed and not trap.from_user else None

    def dispatch(self, cpu: CpuId) -> Outcome | None:
        """Handle the trap that *cpu* stands at; ``None`` when it stands somewhere else."""
        trap = self.trap_of(cpu)
        if trap is None:
            return None
        site = self.site_of(trap)
        if site is None:
            if trap.answer is None:
                return Outcome.FOREIGN
            # Its probes have gone since their programs have run.
            asked = self._asked(trap)
            where = trap.answer if asked is None else asked.addr if asked.undo else asked.goes_on
            self._leave(cpu, trap, trap.context(where))
            return Outcome.HANDLED
        try:
            return self._hit(cpu, trap, site)
        except SessionOverError:
            raise
        except BaseException:
            # Left alone it would count as missed, or the guest's own handler would run, which knows nothing of it.
            self.undo_trap(cpu)
            raise

    def hit_at(self, rip: int, rsp: int, read: Read) -> tuple[VirtAddr, int] | None:
        """The probed address, and RSP there, for a frame at the gate; ``None``: it is no hit of ours."""
        found = self._gate.gate.interrupted(rip, rsp, read)
        if found is None:
            return None
        word, sp = found
        asked = self._gate.asked(word)
        addr = word if asked is None else asked.addr
        return (addr, sp) if addr in self._sites else None

    def come_again(self, cpus: Iterable[CpuId]) -> None:
        """Have those of *cpus* that stand at the gate come to it once more, for a breakpoint stops each arrival once.

        Nothing of their hits happens twice: they are as they were before the last instruction.
        """
        for cpu in cpus:
            trap = self.trap_of(cpu)
            if trap is not None and (registers := self._gate.gate.again(trap)):
                self._write(cpu, registers)

    def arrive(self, cpu: CpuId, site: Site) -> tuple[bool, Called]:
        """*cpu* is at the instruction of *site*, without a trap: a hit, unless it is one that has rested there.

        Returns whether to stop for the user, and the probes whose condition held.
        """
        values = self._machine.read_registers(cpu)
        called = self._stopped.pop((site.addr, values["rsp"]), None)
        if called is not None:
            return False, called
        regs = Registers(values)
        stop, called = self._calls.before(cpu, site, site.probes, regs)
        if regs.changed:
            self._write(cpu, {name: values[name] for name in regs.changed})
        return stop, called

    def rest(self, site: Site, rsp: int, called: Called) -> None:
        """A vCPU stays at the instruction of *site*, at the hit that :meth:`arrive` has made of *called*.

        What was only counted is taken back; a handler has run, and is not to run again.
        """
        if any(probe.needs_host for probe in called):
            self._stopped[site.addr, rsp] = called
            return
        for probe in called:
            probe.count(hits=-1)

    def resume(self, watched: Collection[VirtAddr]) -> None:
        """The machine is about to run. A vCPU at a hit that has stopped for the user goes on behind it.

        *watched*: the sites that have the guest's own text; there a step of the user's begins.
        """
        for cpu in self._machine.cpus() if self._stopped else ():
            addr = VirtAddr(self._machine.read_register(cpu, "rip"))
            key = addr, self._machine.read_register(cpu, "rsp")
            site = self._sites.get(addr)
            if key not in self._stopped or site is None or not site.armed or addr in watched:
                continue
            stepped = site.plan.rung is Rung.SINGLE_STEP or _have_post(self._stopped[key])
            if not stepped:
                del self._stopped[key]
                self._write(cpu, {"rip": site.way})
            elif site.asked is not None:
                # To be stepped: the host is asked anew, whatever a filter says of the registers by now.
                self._write(cpu, {"rip": site.asked.entry})

    def undo_trap(self, cpu: CpuId, *, wholly: bool = False) -> bool:
        """Send a vCPU that stands at the gate because of a site of ours back to the probed instruction.

        For when the site's text is about to be restored: no handler runs, nothing is counted. Where some programs have
        had their effects, it goes on as if no host was there; *wholly*: then it stays where it is.
        """
        trap = self.trap_of(cpu)
        if trap is None:
            return False
        asked = self._asked(trap)
        if trap.answer is not None:
            if asked is not None and asked.undo and not self._is_saved(asked.addr):
                self._leave(cpu, trap, trap.context(asked.addr))
            elif not wholly:
                self._leave(cpu, trap, trap.context(trap.answer))
            return True
        site = self.site_of(trap)
        if site is None:
            return False
        self._write(cpu, trap.context(site.addr))
        return True

    def undo_traps(self, site: Site) -> None:
        """:meth:`undo_trap`, wholly, of each vCPU that stands at the gate because of *site*."""
        for cpu in self._machine.cpus():
            trap = self.trap_of(cpu)
            if trap is not None and self.site_of(trap) is site:
                self.undo_trap(cpu, wholly=True)

    def complete(self) -> None:
        """Bring a dispatch to its end that the loss of the connection cut off; no handler runs."""
        if self._writing is not None:
            cpu, memory, registers = self._writing
            self._write(cpu, registers, memory)
        if self._stepping is not None:
            cpu, site, before, called = self._stepping
            self._machine.drop_trap_flag(cpu)
            after = self._machine.read_registers(cpu)
            self._fix_up(cpu, site, before, after if step.stepped(_copy_at(site), after) else None, called)

        if self._relocated is not None:
            # The rest it does by itself.
            self._machine.drop_trap_flag(self._relocated)
            self._relocated = None

    def forget_stopped(self) -> None:
        """The user has moved the program counter: a stopped probe's instruction is not what is executed next."""
        self._stopped.clear()

    def forget_all(self) -> None:
        """The machine is at another moment: nothing that was under way is."""
        self._faulted.clear()
        self._stopped.clear()
        self._writing = self._stepping = self._relocated = None

    def forget(self, site: Site) -> None:
        """*site* is not probed any more: no vCPU comes back to it."""
        for table in (self._faulted, self._stopped):
            for key in [key for key in table if key[0] == site.addr]:
                del table[key]

    # -- private ------------------------------------------------------------------------------------------------

    def _is_saved(self, addr: VirtAddr) -> bool:
        """Whether a kprobe of the guest's own is at *addr*, and has seen the hit: it would see it again."""
        site = self._sites.get(addr)
        return site is not None and site.saved

    def _asked(self, trap: Trap) -> Asked | None:
        return None if trap.answer is None else self._gate.asked(trap.answer)

    def _hit(self, cpu: CpuId, trap: Trap, site: Site) -> Outcome:
        asked = self._asked(trap)
        values = self._machine.read_registers(cpu)
        context = trap.context(site.addr)
        values.update(context, cs=trap.cs)
        regs = Registers(values)
        key = (site.addr, trap.rsp)
        called = self._faulted.pop(key, None)
        called = self._stopped.pop(key, called)
        for watcher in site.watchers:
            # The fault was fixed up: the instruction is not executed again.
            self._faulted.pop((watcher, trap.rsp), None)

        stop = False
        if called is None:
            probes = site.probes if asked is None or asked.probes is None else asked.probes
            stop, called = self._calls.before(cpu, site, probes, regs)
        frame = {name: values[name] for name in (*context, *regs.changed)}
        if "rip" in regs.changed:
            # The handler chose where to go on: the instruction is skipped, and no post-handler runs.
            if not stop:
                frame["rip"] = self._trampolines.to(cpu, VirtAddr(frame["rip"]))
            self._leave(cpu, trap, frame)
            return Outcome.STOP if stop else Outcome.HANDLED
        if stop:
            self._stopped[site.addr, frame["rsp"]] = called
            self._leave(cpu, trap, frame)
            return Outcome.STOP

        if site.plan.rung is Rung.SINGLE_STEP:
            frame["rip"] = site.plan.slot.code
            values.update(frame)
            # Known before the vCPU is in the slot: who finishes this must not take the hit for another one.
            self._stepping = cpu, site, values, called
            self._leave(cpu, trap, frame)
            return Outcome.STOP if self._single_step(cpu, site, values, called) else Outcome.HANDLED
        if _have_post(called):
            self._leave(cpu, trap, {**frame, "rip": site.way})
            return Outcome.STOP if self._step_relocated(cpu, site, called) else Outcome.HANDLED
        frame["rip"] = site.way if asked is None else asked.goes_on
        self._leave(cpu, trap, frame)
        return Outcome.HANDLED

    def _leave(self, cpu: CpuId, trap: Trap, registers: dict[str, int]) -> None:
        """Have *cpu* go on from *trap* with *registers*.

        Then, for who is killed before leaves it at the gate, the word there is cleared: dead, but of the region, it
        could be taken for alive under a frame that does not write there. Not if the handler has gone below it.
        """
        self._write(cpu, registers)
        if trap.remains is not None and registers["rsp"] >= trap.rsp:
            self._machine.write_current(cpu, trap.remains, bytes(8))

    def _write(self, cpu: CpuId, registers: dict[str, int], memory: _Memory = ()) -> None:
        """Write to the stack and to the registers of *cpu*; cut off, it can be done again by :meth:`complete`."""
        self._writing = cpu, memory, registers
        for addr, data in memory:
            if not self._machine.write_current(cpu, VirtAddr(addr), data):
                raise TargetError(
                    f"vCPU {cpu}: cannot write the stack at {addr:#x} after a single step",
                    "'kprobe detach', and look at the guest's stack pointer",
                )
        self._machine.write_registers(cpu, registers)
        self._writing = None

    def _single_step(self, cpu: CpuId, site: Site, before: dict[str, int], called: Called) -> bool:
        """Step the copy in the slot and put right what it did relative to the slot; whether to stop for the user."""
        after = self._fix_up(cpu, site, *self._step(cpu, site, before), called)
        if after is None:
            return False
        stop = site.needs_post and self._run_post(cpu, after, called)
        rip = VirtAddr(after["rip"])
        if not stop and self._trampolines.to(cpu, rip) != rip:
            self._write(cpu, {"rip": self._trampolines.to(cpu, rip)})
        return stop

    def _step_relocated(self, cpu: CpuId, site: Site, called: Called) -> bool:
        """Step the instruction of *site* where it was relocated to, and call what wants the state behind it.

        Returns whether to stop for the user, who finds the vCPU in the original text. Cut off anywhere, the vCPU goes
        on by itself, and no post-handler is called.
        """
        first = site.plan.first
        self._relocated = cpu
        for _ in range(MAX_STEPS):
            self._machine.step(cpu)
            rip = VirtAddr(self._machine.read_register(cpu, "rip"))
            if rip not in first:
                break
        self._relocated = None
        if rip in first or self._is_exception_entry(rip):
            for probe in called:
                if probe.post is not None:
                    probe.count(missed=1)  # the guest executes the instruction without us
            return False
        values = self._machine.read_registers(cpu)
        # What follows it may be in the detour as well: the handler sees where that is in the text.
        values["rip"] = behind = site.plan.behind_first(rip)
        regs = Registers(values)
        stop = self._calls.after(cpu, called, regs)
        changed = {name: values[name] for name in regs.changed}
        if "rip" in regs.changed or rip == behind:
            changed["rip"] = VirtAddr(values["rip"]) if stop else self._trampolines.to(cpu, VirtAddr(values["rip"]))
        elif stop:
            changed["rip"] = behind
        if changed and changed != {"rip": rip}:
            self._write(cpu, changed)
        return stop

    def _fix_up(
        self, cpu: CpuId, site: Site, before: dict[str, int], after: dict[str, int] | None, called: Called
    ) -> dict[str, int] | None:
        """Put right what the step left in *after* (``None``: the instruction is not through).

        Returns the registers after the instruction; ``None`` when it is not through: not executed, or it has faulted.
        """
        copy = _copy_at(site)

        def read_stack(addr: int, size: int) -> bytes:
            data = self._machine.read_current(cpu, VirtAddr(addr), size)
            if data is None:
                raise TargetError(f"the stack at {addr:#x} is not mapped after the single step at {site.addr:#x}")
            return data

        key = (site.addr, before["rsp"])
        if after is None:
            # The guest takes the int3 again, which is the same hit and not another one.
            fix, faulted = step.StepFixup({"rip": site.addr}), True
        elif step.outcome(copy, before, after, self._is_exception_entry) is step.StepOutcome.FAULTED:
            # The guest's handler sees the fault where the instruction really is, so that its exception table works.
            # When it returns, the instruction runs into the int3 again, which is the same hit and not another one,
            # or goes on at the fixup, where a site of its own tells us.
            fix, faulted = step.fix_up_fault(copy, after, read_stack), True
        else:
            fix, faulted = step.fix_up(copy, after, read_stack), False
        # From here on it is not the step that is to be finished, but these writes.
        self._writing, self._stepping = (cpu, fix.memory, fix.registers), None
        if faulted:
            self._faulted[key] = called
        self._write(cpu, fix.registers, fix.memory)
        return None if after is None or faulted else {**after, **fix.registers}

    def _run_post(self, cpu: CpuId, values: dict[str, int], called: Called) -> bool:
        regs = Registers(values)
        stop = self._calls.after(cpu, called, regs)
        if regs.changed:
            self._write(cpu, {name: values[name] for name in regs.changed})
        return stop

    def _step(self, cpu: CpuId, site: Site, before: dict[str, int]) -> tuple[dict[str, int], dict[str, int] | None]:
        """Step until the instruction is through; the registers before the last step, and after it.

        ``None`` instead of the latter: nothing was executed, or a repeated instruction has very many iterations left.
        """
        copy = _copy_at(site)
        iterations = min(step.most_steps(copy.insn, before), MAX_ITERATIONS)
        unmoved = 0
        while iterations and unmoved < MAX_STEPS:
            self._machine.step(cpu)
            after = self._machine.read_registers(cpu)
            if step.stepped(copy, after):
                return before, after
            if step.is_repeating(copy, before, after):
                iterations -= 1
            else:
                unmoved += 1
            before = after
        return before, None

    def _is_exception_entry(self, addr: int) -> bool:
        return addr in self._guest.gates


def _have_post(called: Called) -> bool:
    return any(probe.post is not None for probe in called)


def _copy_at(site: Site) -> StepCopy:
    """What the slot of *site*, of the single-step rung, holds."""
    assert site.plan.step_copy is not None
    return site.plan.step_copy
