"""Which instruction of the guest an address in our code stands for."""

from __future__ import annotations

from gdb_kprobe.kprobes.slots import SLOT_HEADER
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.region.region import Region
from gdb_kprobe.session.site_table import SiteTable
from gdb_kprobe.system.paging import PageTable


def original_of(memory: PageTable, region: Region, sites: SiteTable, addr: int) -> VirtAddr | None:
    """The instruction that a vCPU at *addr* in a slot is at, or has just executed; ``None`` outside of slots.

    In a detour that of the displaced instructions; in front of them, where the programs are, the probed one.
    """
    if addr not in region.header.code:
        return None
    for site in sites.all():
        insn = site.plan.insn
        if addr in site.plan.slot.range:
            if site.plan.detour is not None:
                original = site.plan.detour.code(site.plan.slot.code).displaced.original(VirtAddr(addr))
                return insn.addr if original is None else original
            return insn.addr if addr == site.plan.slot.code or insn.is_branch else insn.end
        if site.service is not None and addr in site.service.handling.slot.range:
            return insn.addr
    # One that no probe has any more says by itself what it was made for.
    freed = next((slot for slot in region.slots.quarantined if addr in slot.range), None)
    if freed is None:
        return None
    return VirtAddr(int.from_bytes(memory.read(freed.start, SLOT_HEADER), "little"))
