"""Per-CPU variables."""

from __future__ import annotations

import struct

from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.system.bounds import damaged
from gdb_kprobe.target.protocols import Memory

_MOST_CPUS = 8192
"""NR_CPUS_RANGE_END with CONFIG_MAXSMP, arch/x86/Kconfig."""


def possible_cpus(memory: Memory, kallsyms: Kallsyms, types: Types | None) -> tuple[int, ...]:
    """Return the numbers of the CPUs in ``cpu_possible_mask``.

    :param types: without them the mask is taken for as long as its symbol is.
    :raises GuestStateError: this kernel lacks the mask.
    """
    mask = kallsyms.address("__cpu_possible_mask")
    if types is None:
        [symbol, *_] = kallsyms.lookup("__cpu_possible_mask")
        size = min(kallsyms.size(symbol), _MOST_CPUS // 8)
    else:
        size = types.size_of("cpumask")
    if size > _MOST_CPUS // 8:
        raise damaged(f"struct cpumask has {size} bytes")
    bits = int.from_bytes(memory.read(mask, size), "little")
    if not bits:
        raise damaged("there is no CPU in __cpu_possible_mask")
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def per_cpu_offsets(memory: Memory, kallsyms: Kallsyms, types: Types | None) -> dict[int, int]:
    """Return what to add to a per-CPU symbol's address (modulo 2**64), for each possible CPU.

    :raises GuestStateError: this kernel lacks the table.
    """
    cpus = possible_cpus(memory, kallsyms, types)
    data = memory.read(kallsyms.address("__per_cpu_offset"), 8 * (cpus[-1] + 1))
    return {cpu: struct.unpack_from("<Q", data, 8 * cpu)[0] for cpu in cpus}


def per_cpu_ptr(symbol: VirtAddr, offset: int) -> VirtAddr:
    """Return the address of one CPU's copy of the variable at *symbol*."""
    return VirtAddr((symbol + offset) & 0xFFFF_FFFF_FFFF_FFFF)


def hot_symbol(kallsyms: Kallsyms, types: Types, name: str) -> VirtAddr:
    """A per-CPU variable that was a member of ``pcpu_hot`` for a while.

    Linux kernel commit e57ef2ed97c1 "x86: Put hot per CPU variables into a struct" (in v6.2), undone in v6.15.
    """
    if types.has_member("pcpu_hot", name) and kallsyms.find("pcpu_hot") is not None:
        return VirtAddr(kallsyms.address("pcpu_hot") + types.offset_of("pcpu_hot", name))
    return kallsyms.address(name)
