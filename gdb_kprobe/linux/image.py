"""Where the kernel image is in memory, and which kernel it is.

The kernel's high mapping holds the image and nothing else: everything around it is unmapped during boot
(``cleanup_highmap``), so the permission runs of that window are the image's text, read-only data and data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.linux.strings import c_string
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.system.paging import PageTable
from gdb_kprobe.target.protocols import Memory

START_KERNEL_MAP = VirtAddr(0xFFFF_FFFF_8000_0000)
"""``__START_KERNEL_map``: the lowest address of a kernel image."""

KERNEL_IMAGE_END = VirtAddr(0xFFFF_FFFF_C000_0000)
"""``KERNEL_IMAGE_SIZE`` (1 GiB with CONFIG_RANDOMIZE_BASE) above it; modules begin here."""

MODULES_END = VirtAddr(0xFFFF_FFFF_FF00_0000)

LINK_ADDRESS = VirtAddr(0xFFFF_FFFF_8100_0000)
"""Link address of ``_text``: ``__START_KERNEL_map`` + CONFIG_PHYSICAL_START (16 MiB)."""

_NT_GNU_BUILD_ID = 3


@dataclass(frozen=True, slots=True)
class KernelImage:
    """The mapped runs of the image, by permission, each in ascending order.

    *base* is the lowest mapped address, which is ``_text``.
    """

    base: VirtAddr
    end: VirtAddr
    text: tuple[AddressRange, ...]
    rodata: tuple[AddressRange, ...]
    data: tuple[AddressRange, ...]

    @property
    def slide(self) -> int:
        """How far KASLR moved the image from its link address, in bytes."""
        return self.base - LINK_ADDRESS


def find_image(table: PageTable, inside: VirtAddr) -> KernelImage:
    """Find the image around *inside*, an address of its text such as the #BP handler.

    A run that is both writable and executable (all of them, while the guest is booting) counts as text and as data.

    :raises GuestStateError: *inside* is not in mapped text of a kernel image.
    """
    runs = list(table.mappings(AddressRange(START_KERNEL_MAP, KERNEL_IMAGE_END)))
    if not any(inside in run.range and run.executable for run in runs):
        raise GuestStateError(
            f"the #BP handler {inside:#x} is not in the text of a Linux kernel image",
            "is the guest a 64-bit Linux kernel, and has it finished booting?",
        )
    return KernelImage(
        base=runs[0].range.start,
        end=runs[-1].range.end,
        text=tuple(run.range for run in runs if run.executable),
        rodata=tuple(run.range for run in runs if not run.executable and not run.writable),
        data=tuple(run.range for run in runs if run.writable),
    )


def read_string(memory: Memory, addr: VirtAddr, limit: int = 512) -> str:
    """Read a NUL-terminated string of at most *limit* bytes, as it can be shown.

    :raises UnmappedError: the string runs into unmapped memory.
    """
    return c_string(read_c_string(memory, addr, limit))


def read_c_string(memory: Memory, addr: VirtAddr, limit: int = 512) -> bytes:
    """Read the bytes of a string of at most *limit* bytes, without its NUL.

    :raises UnmappedError: the string runs into unmapped memory.
    """
    data = b""
    while b"\0" not in data and len(data) < limit:
        # Never read further than to the end of a page before it is known that the string goes on.
        step = min(64 - (addr + len(data)) % 64, limit - len(data))
        data += memory.read(VirtAddr(addr + len(data)), step)
    return data.partition(b"\0")[0]


def find_build_id(memory: Memory, notes: AddressRange) -> str:
    """Return the GNU build id in the ELF notes at *notes* (``__start_notes``..``__stop_notes``), in hex; "" if none."""
    try:
        data = memory.read(notes.start, notes.size)
    except UnmappedError:
        return ""
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        name = data[at + 12 : at + 12 + name_size]
        start = at + 12 + (name_size + 3 & ~3)
        if name == b"GNU\0" and kind == _NT_GNU_BUILD_ID:
            return data[start : start + size].hex()
        at = start + (size + 3 & ~3)
    return ""
