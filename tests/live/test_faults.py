"""An instruction of the exception table, single-stepped: its faults are the guest's, at the original address."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbCommandError
from gdb_kprobe.x86.decode import Insn, iter_insns
from kprobe_guest import GuestSpec
from kprobe_guest.spec import CpuModel
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

SCHED_SETATTR = 314
"""``sched_setattr(pid, attr, flags)`` reads ``attr->size`` by ``get_user``, in ``__get_user_4``."""

UNMAPPED = 0x10_0000
EFAULT = -14
CALLS = 23


def faulting_insn(guest: Probed) -> Insn:
    """The instruction of ``__get_user_4`` whose fault the kernel fixes up."""
    kernel = guest.snapshot.guest
    start = kernel.kallsyms.address("__get_user_4")
    text = kernel.memory.read(start, 64)
    found: Insn = next(insn for insn in iter_insns(text, VirtAddr(start)) if kernel.fixup_of(insn.addr))
    return found


@pytest.mark.parametrize("kernel", ["debian", "newest"])
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("cpu", ["max", "default"])
def test_a_fault_is_fixed_up_and_counted_once(probed: Boot, kernel: str, vcpus: int, cpu: CpuModel) -> None:
    """Without SMAP, the code that fixes it up begins with a nop."""
    guest = probed(GuestSpec(kernel=kernel, vcpus=vcpus, cpu=cpu))
    insn = faulting_insn(guest)
    with guest.gdb() as gdb:
        place = f"{insn.addr:#x} address=%ax"
        with pytest.raises(GdbCommandError, match="exception table"):
            guest.add(gdb, f"p:boosted {place}", "boosted")
        assert guest.add(gdb, f"p:bad {place} if ax == {UNMAPPED:#x}")["rung"] == "single-step"
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall {SCHED_SETATTR} {CALLS} 0 {UNMAPPED} 0") for _ in range(vcpus)]
        outputs = [guest.guest.finish(job)[1] for job in jobs]
        gdb.interrupt()
        assert guest.hits(gdb) == {"bad": CALLS * vcpus}
        assert outputs == [f"workload: {CALLS} calls done, last result {EFAULT}\n"] * vcpus
        gdb.console("kprobe detach")


def test_a_page_that_is_not_there_yet_is_one_hit(probed: Boot) -> None:
    """The first call faults the page in and runs into the int3 a second time: that is the same hit."""
    guest = probed(GuestSpec())
    insn = faulting_insn(guest)
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:good {insn.addr:#x}")
        gdb.cont()
        status, output = guest.guest.run(f"workload syscall {SCHED_SETATTR} {CALLS} 0 b: 0")
        gdb.interrupt()
        assert (status, output) == (0, f"workload: {CALLS} calls done, last result 0\n")
        assert guest.hits(gdb) == {"good": CALLS}
        gdb.console("kprobe detach")
