"""Call functions of the guest's own kernel from outside, on a vCPU that is stopped where that is allowed.

The vCPU is made to call as if an exception had come right there: below its stack pointer lies a ``struct pt_regs`` with
all that it had, and the function returns by way of the kernel's own end of an exception. ::

    rsp ->  what the vCPU has on its stack
            struct pt_regs                         all registers as they were
            restore_regs_and_return_to_kernel      pops that frame, iretq
    rsp'->  the address of a `ret`                 where the function returns to, and we wait

So the guest is safe whatever happens to us meanwhile: left alone, the vCPU goes on where it was. For that its registers
are always written at once: it has ours, or its own. We stop it at the ``ret`` for the result. Nobody else comes there:
it is a byte in the middle of another instruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from gdb_kprobe.errors import GuestStateError, NeedsTypesError, UnmappedError
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.linux.page_allocator import RETURN, may_call_here, way_points
from gdb_kprobe.model import GENERAL_REGISTERS, CpuId, VirtAddr, offset
from gdb_kprobe.region.generation import was_reset
from gdb_kprobe.target.protocols import Machine
from gdb_kprobe.x86.decode import iter_insns

_PATIENCE: Final = 5.0
"""Seconds in which a vCPU comes to where a call may be made. An idle one is woken by timers."""
_CALL_SECONDS: Final = 2.0
"""Seconds in which a call returns, unless the host is very busy."""
_CALL_PATIENCE: Final = 30.0
"""Seconds in which a call returns that has nothing to wait for."""

_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_RET: Final = b"\xc3"
_SEARCHED: Final = 1 << 14
"""Bytes of text in which such a byte is looked for; ``mov rbx, rax``, which has one, is everywhere."""
_RESERVED: Final = 1 << 1
"""RFLAGS of a call: interrupts, direction, alignment check and single step off; bit 1 is always set."""


Call = Callable[..., int]
"""Calls a function at an address with integers, and gives what it returns."""


@contextlib.contextmanager
def guest_calls(machine: Machine, guest: LinuxGuest) -> Iterator[Call]:
    """Bring a vCPU of the stopped *machine* to where the page allocator may be called, and give a way to call.

    If one stands at such a place already, it calls there; else all run until one comes to one. Nothing of ours may be
    armed. The vCPU's registers are as before at the end; but not when a call has not come back: it goes on by itself
    then, and there are no more calls.

    :raises GuestStateError: none came there in time; nothing was called.
    :raises GuestResetError: by a call, too: the machine is not where it was left. Nothing is written to it.
    """
    machine.check_can_run()
    back = guest.kallsyms.address(RETURN)
    ret = _hidden_ret(guest)
    cpu = _ready(machine, guest)
    saved = machine.read_registers(cpu)
    inside = False
    where = saved["rip"], saved["rsp"]

    def check() -> None:
        """While the machine ran, it may have been reset, or have got another's memory and registers."""
        found = machine.read_registers(cpu)
        if (found["rip"], found["rsp"]) != where:
            raise was_reset()

    def call(function: VirtAddr, *arguments: int) -> int:
        nonlocal inside, where
        if inside:
            raise _not_back()
        check()
        frame = _frame_below(saved["rsp"])
        guest.memory.write(frame, pt_regs.pack({**saved, "orig_rax": (1 << 64) - 1}))
        stack = offset(frame, -16)
        guest.memory.write(stack, ret.to_bytes(8, "little") + back.to_bytes(8, "little"))
        registers = dict(zip(_ARGUMENTS, arguments, strict=False))
        inside = True
        machine.write_registers(cpu, {**registers, "rsp": stack, "eflags": _RESERVED, "rip": function})
        # A Ctrl-C is raised when the call is over, with its result in our hands; but not of a call that hangs.
        reached = machine.run_to((ret,), _CALL_SECONDS, heed=False)
        if reached is None:
            reached = machine.run_to((ret,), _CALL_PATIENCE - _CALL_SECONDS)
        if reached != cpu:
            raise _not_back()
        inside = False
        where = ret, offset(stack, 8)
        guest.memory.invalidate()
        return machine.read_register(cpu, "rax")

    try:
        yield call
    finally:
        if not inside:  # else it is in the middle of something, and has its registers on its stack
            check()
            machine.write_registers(cpu, {name: saved[name] for name in GENERAL_REGISTERS})
        guest.refresh()


def _not_back() -> GuestStateError:
    return GuestStateError(
        f"a call of the guest's page allocator has not come back in {_CALL_PATIENCE:g} s",
        "its vCPU goes on by itself when the guest runs; what it has allocated stays so until the next boot",
    )


def _ready(machine: Machine, guest: LinuxGuest) -> CpuId:
    # That of the user's first: where another one calls, theirs goes on meanwhile.
    for cpu in sorted(machine.cpus(), key=lambda cpu: cpu != machine.shown):
        registers = machine.read_registers(cpu)
        # Without the kernel's types that cannot be told of a vCPU that is not at the entry of a certain function.
        with contextlib.suppress(UnmappedError, NeedsTypesError):
            if may_call_here(guest.memory, guest.kallsyms, guest.types, registers):
                return cpu
    reached = machine.run_to(way_points(guest.kallsyms), _PATIENCE)
    if reached is None:
        raise GuestStateError(
            f"no vCPU came to where the guest's page allocator may be called, in {_PATIENCE:g} s",
            "is the guest hung, or do its vCPUs only run user programs with interrupts off? Let it run, and try again",
        )
    guest.memory.invalidate()
    return reached


def _frame_below(rsp: int) -> VirtAddr:
    """Where a ``struct pt_regs`` fits below *rsp*; what is called below it has its stack aligned as the ABI has it."""
    return VirtAddr((rsp - pt_regs.SIZE - 16) // 16 * 16 + 8)


def _hidden_ret(guest: LinuxGuest) -> VirtAddr:
    """A byte of live text that is a ``ret``, in the middle of an instruction that begins elsewhere."""
    start = guest.kallsyms.address("schedule")
    code = guest.memory.read(start, _SEARCHED)
    for insn in iter_insns(code, start):
        at = insn.raw.find(_RET, 1)
        if at > 0 and not insn.is_branch and not insn.is_call:  # what goes elsewhere may be changed by the guest
            return offset(insn.addr, at)
    raise GuestStateError("no ret is to be found in the kernel's text", "reserve the region's memory instead")
