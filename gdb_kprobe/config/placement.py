"""Where a region may be, as far as that can be said before there is a guest.

Linux's windows on x86-64 (Documentation/arch/x86/x86_64/mm.rst). With KASLR the image is anywhere in its window, so no
place in there is safe. Emitted code reaches all kernel text when it lies in the module area: the two together span less
than 2 GiB, the reach of a signed 32-bit displacement. ::

    0xffffffff80000000  kernel image
    0xffffffffc0000000  modules        <- the region
    0xffffffffff000000  fixmap, vsyscall
"""

from __future__ import annotations

from gdb_kprobe.config.document import Value
from gdb_kprobe.config.profile import KernelKind, RegionSource
from gdb_kprobe.config.scalars import as_address, as_size
from gdb_kprobe.model import PAGE_SIZE, AddressRange, PhysAddr, VirtAddr

KERNEL_IMAGE = AddressRange(VirtAddr(0xFFFF_FFFF_8000_0000), VirtAddr(0xFFFF_FFFF_C000_0000))
MODULES = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))

PMD_SIZE = 2 << 20
"""What one entry of a page middle directory maps: the region's page tables hang in such entries."""

_LOW_MEMORY = 1 << 20
_PLATFORM = range(0xFEC0_0000, 1 << 32)
_PHYSICAL_BITS = 52
_BARE_LIMIT = 1 << 31
_SIZES = "write a multiple of 2M, such as 16M"


def check_size(value: Value, kind: KernelKind) -> int:
    """Return the size of the region in bytes."""
    size = as_size(value)
    limit = MODULES.size if kind is KernelKind.LINUX else _BARE_LIMIT
    if size < PMD_SIZE:
        raise value.error(f"'{value.key}' is too small: {value.text}", "at least 2M; 16M is room for 44,000 functions")
    if size % PMD_SIZE:
        raise value.error(f"'{value.key}' is not a multiple of 2 MiB: {value.text}", _SIZES)
    if size > limit:
        raise value.error(
            f"'{value.key}' is too large: {value.text}",
            f"at most {limit >> 20}M can be in s32 reach of the text; 16M is room for 44,000 functions",
        )
    return size


def check_physical(value: Value, size: int) -> PhysAddr:
    """Return where the reserved range begins, a size being good enough for an address here (``256M``)."""
    start = as_size(value)
    end = start + size
    if start % PAGE_SIZE:
        raise value.error(f"'{value.key}' is not aligned to a page: {start:#x}", f"next below: {start & -PAGE_SIZE:#x}")
    if start < _LOW_MEMORY:
        hint = "use the address of the guest's memmap=SIZE$ADDRESS"
        raise value.error(f"'{value.key}' is in the first MiB, which is the firmware's: {start:#x}", hint)
    if end >> _PHYSICAL_BITS and end != 1 << _PHYSICAL_BITS:
        hint = "use the address of the guest's memmap=SIZE$ADDRESS"
        raise value.error(f"'{value.key}' is beyond {_PHYSICAL_BITS} bits of physical address: {start:#x}", hint)
    if start < _PLATFORM.stop and end > _PLATFORM.start:
        raise value.error(
            f"'{value.key}': {start:#x}-{end:#x} overlaps the interrupt controllers and the firmware at "
            f"{_PLATFORM.start:#x}-{_PLATFORM.stop:#x}",
            "choose RAM below 3 GiB, and reserve it with memmap=SIZE$ADDRESS",
        )
    return PhysAddr(start)


def check_virtual(value: Value, size: int, kind: KernelKind, source: RegionSource) -> VirtAddr | None:
    """Return where the region is to appear; None for ``auto``."""
    if value.text == "auto":
        if source is RegionSource.PREMAPPED:
            raise value.error(f"'{value.key}' cannot be auto", "a premapped region is where the guest has mapped it")
        return None
    start = as_address(value)
    align = PAGE_SIZE if source is RegionSource.PREMAPPED else PMD_SIZE
    if start % align:
        unit = "a page" if align == PAGE_SIZE else "2 MiB"
        raise value.error(f"'{value.key}' is not aligned to {unit}: {start:#x}", f"next below: {start & -align:#x}")
    if (start + size - 1) >> 64:
        raise value.error(
            f"'{value.key}': {start:#x} and {size >> 20}M more go beyond the last address", "choose a lower address"
        )
    if kind is KernelKind.LINUX:
        _check_linux_window(value, start, start + size)
    elif start >> 47 not in (0, 0x1FFFF) or (start + size - 1) >> 47 != start >> 47:
        raise value.error(
            f"'{value.key}' is not canonical: {start:#x}", "below 0x800000000000, or from 0xffff800000000000 on"
        )
    return VirtAddr(start)


def _check_linux_window(value: Value, start: int, end: int) -> None:
    hint = f"choose from {MODULES}, or write auto"
    what = f"'{value.key}': {start:#x}-{end:#x}"
    if end <= KERNEL_IMAGE.start:
        raise value.error(f"{what} is out of s32 reach of the kernel's text", hint)
    if start < KERNEL_IMAGE.end:
        raise value.error(f"{what} overlaps the window of the kernel image, {KERNEL_IMAGE}", hint)
    if start >= MODULES.end:
        raise value.error(f"{what} overlaps the fixmap window, from {MODULES.end:#x} on", hint)
    if end > MODULES.end:
        raise value.error(f"{what} reaches into the fixmap window, from {MODULES.end:#x} on", hint)
