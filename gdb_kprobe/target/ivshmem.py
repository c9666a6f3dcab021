"""Find the memory of an ``ivshmem-plain`` device: BAR 2, which the guest does not count as RAM."""

from __future__ import annotations

import re

from gdb_kprobe.errors import RegionError
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.target.protocols import Monitor

_DEVICE_ID = "1af4:1110"
_BAR2 = re.compile(r"BAR2: 64 bit prefetchable memory at 0x([0-9a-f]+) \[0x([0-9a-f]+)\]")
_UNASSIGNED = 0xFFFF_FFFF_FFFF_FFFF


def find_bar(monitor: Monitor) -> tuple[PhysAddr, int]:
    """Return address and size of the first ivshmem device's BAR 2, as QEMU's ``info pci`` tells.

    :raises RegionError: there is no such device, or the firmware gave it no address.
    """
    options = "-object memory-backend-file,id=shm,size=16M,mem-path=FILE,share=on -device ivshmem-plain,memdev=shm"
    for device in re.split(r"(?m)^\s+Bus\s", monitor.monitor("info pci").replace("\r", "")):
        if _DEVICE_ID not in device:
            continue
        found = _BAR2.search(device)
        if found is None or int(found[1], 16) == _UNASSIGNED:
            raise RegionError(
                "the guest's ivshmem device has no address for its BAR 2", "let the guest's firmware run first"
            )
        start = int(found[1], 16)
        return PhysAddr(start), int(found[2], 16) + 1 - start
    raise RegionError("the machine has no ivshmem device", f"start QEMU with {options}")
