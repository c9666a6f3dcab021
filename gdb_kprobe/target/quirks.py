"""What differs between accelerators, each fact once, with where it is from. All is asked of QEMU, nothing is guessed.

The facts about KVM are of Linux 6.12 (x86.c and regs.c in arch/x86/kvm/) and QEMU 10 (accel/kvm/kvm-all.c,
target/i386/kvm/kvm.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.target.protocols import PacketChannel

_DEBUG_REGISTERS: Final = 4
"""Addresses that a processor can watch (DR0 to DR3)."""


class Accelerator(StrEnum):
    """What executes the guest's instructions."""

    TCG = "TCG"
    KVM = "KVM"


@dataclass(frozen=True, slots=True)
class Quirks:
    """How the stub of one QEMU behaves. *holds_off_interrupts*: in a step no interrupt is taken."""

    accelerator: Accelerator
    holds_off_interrupts: bool = True

    @property
    def steps_by_trap_flag(self) -> bool:
        """A step is one with RFLAGS.TF, which QEMU's client has to set where it has written RIP.

        KVM sets TF for a step only while RIP is what it was when the step was asked for (``__kvm_set_rflags`` compares
        ``singlestep_rip`` of ``kvm_arch_vcpu_ioctl_set_guest_debug``), and QEMU asks (``kvm_update_guest_debug``)
        before it hands over the registers (``kvm_arch_put_registers``): a step after RIP was written runs away. With TF
        in the RFLAGS that are handed over it does not. KVM hides TF, and takes it away, when the step is over
        (``kvm_get_rflags``). But what the instruction itself does with RFLAGS is the processor's: ``pushf`` pushes TF,
        and so does an exception, whose handler then runs without it: the step does not end there. Under TCG none of
        that is so, and a TF of ours would give the guest a #DB.
        """
        return self.accelerator is Accelerator.KVM

    @property
    def hardware_breakpoints(self) -> int | None:
        """How many there can be (``kvm_arch_insert_hw_breakpoint``); ``None``: any number, as under TCG."""
        return _DEBUG_REGISTERS if self.accelerator is Accelerator.KVM else None

    @property
    def stops_once(self) -> bool:
        """A hardware breakpoint stops a vCPU once for each time that it comes there.

        Of two vCPUs that come to one at the same time QEMU's client is told of one. Under TCG the other one runs into
        the breakpoint again when the machine is resumed. Under KVM it does not: the processor has had its exception for
        that instruction (SDM volume 3, 17.3.1.1 and 28.3.3: RFLAGS.RF is saved as the exception would push it;
        measured with an emulated SVM, which does not save it there).
        """
        return self.accelerator is Accelerator.KVM

    @property
    def flushes_at_write(self) -> bool:
        """A control register that is written empties the TLB at once.

        TCG does so (``cpu_x86_update_cr4``). KVM does when the vCPU is about to run, and when the value is another
        one than before (``__set_sregs`` resets the MMU and requests ``KVM_REQ_TLB_FLUSH_GUEST``).
        """
        return self.accelerator is not Accelerator.KVM


def ask(channel: PacketChannel) -> Quirks:
    """Ask the QEMU at the other end of *channel*.

    :raises GuestStateError: it has an accelerator that nothing is known of.
    """
    if "enabled" in channel.monitor("info kvm"):
        # QEMU tells what the host's KVM can do (KVM_GUESTDBG_BLOCKIRQ, by KVM_CAP_SET_GUEST_DEBUG2).
        return Quirks(Accelerator.KVM, b"NOIRQ" in channel.send(b"qqemu.sstepbits"))
    if "only available with" in channel.monitor("info jit"):
        raise GuestStateError(
            "QEMU runs this guest by neither TCG nor KVM; how it steps and keeps registers is not known",
            "start it with -accel kvm or -accel tcg",
        )
    return Quirks(Accelerator.TCG)
