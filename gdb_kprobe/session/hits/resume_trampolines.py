"""Where a vCPU is to be resumed so that it gets to an address: where that is hidden, or the user has a breakpoint."""

from __future__ import annotations

from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import CpuId, VirtAddr
from gdb_kprobe.region.generation import Generation
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.session.transaction import write_verified
from gdb_kprobe.system.paging import PageTable
from gdb_kprobe.target.protocols import Breakpoints

_JMP_QWORD = bytes.fromhex("ff2500000000")  # jmp [rip+0]: the address follows


class ResumeTrampolines:
    """One jump in the region for each vCPU that ever needs one; they stay for the session."""

    def __init__(
        self, memory: PageTable, region: Region, generation: Generation, breakpoints: Breakpoints, sites: SiteTable
    ) -> None:
        self._sites = sites
        self._generation = generation
        self._memory = memory
        self._region = region
        self._breakpoints = breakpoints
        self._slots: dict[CpuId, Slot] = {}

    def to(self, cpu: CpuId, addr: VirtAddr) -> VirtAddr:
        """Where *cpu* is to be resumed to get to *addr*: there, unless it is hidden or the user has a breakpoint at it.

        What a jump of ours hides is executed in the detour.

        A debugger that resumes a program at a breakpoint steps over it, and the user would not stop. So it starts at a
        jump of ours that leads there.
        """
        copy = self._sites.copy_of(addr)
        if copy is not None:
            return copy
        if not self._breakpoints.is_taken(addr):
            return addr
        slot = self._slots.get(cpu)
        if slot is None:
            slot = self._region.slots.allocate(len(_JMP_QWORD) + 8)
            if slot is None:
                return addr
            self._slots[cpu] = slot
            with self._generation.act():
                self._region.commit()
        write_verified(self._memory, slot.start, slot.image(addr, _JMP_QWORD + addr.to_bytes(8, "little")))
        return slot.code
