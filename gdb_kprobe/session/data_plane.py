"""The data plane of a session: a way to read and write the region's data while the machine runs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gdb_kprobe.config.profile import SharedMemory
from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PAGE_SIZE, PhysAddr
from gdb_kprobe.region.region import Region
from gdb_kprobe.target.process_memory import find_process_memory
from gdb_kprobe.target.protocols import Machine
from gdb_kprobe.target.ram import RamView, SharedRam


def open_data_plane(
    machine: Machine, memory: RamView, region: Region, pids: Collection[int], shared: SharedMemory | Path
) -> None:
    """Find a way for *memory* to the *region* of the stopped *machine*, whose QEMU may be one of the processes *pids*.

    *shared* is what the profile says of it. That there is no way is no error: :attr:`RamView.not_live` says why, and
    all is read at stops.

    :raises ConnectionLostError: the stub does not answer any more.
    """
    header = region.header
    if shared is SharedMemory.OFF:
        memory.not_live = "the profile says shared_memory: off"
    elif not isinstance(memory.live(header.phys, header.size), SharedRam):
        memory.close()  # its process was told by what another guest's might hold, too
        try:
            found = find_process_memory(machine, pids, header.phys, header.size)
            memory.use_process(found)
            # And what tells whether it is still mapped. Its bytes could be anywhere, but its process is known now.
            for page in {PhysAddr(link.addr & -PAGE_SIZE) for link in region.links}:
                memory.use_process(find_process_memory(machine, (found.pid,), page, PAGE_SIZE))
            memory.use_ram_of(machine, (found.pid,))
        except TargetError as error:
            memory.not_live = error.message


def data_plane_of(memory: RamView, region: Region) -> str:
    """Where the data of *region* is read from while the machine runs, for the user."""
    live = memory.live(region.header.phys, region.header.size)
    return f"only at stops ({memory.not_live})" if live is None else live.name
