from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from gdb_kprobe.linux.ftrace import NOP, FtraceLayout, FtraceRecords, FtraceSite, FtraceTracers
from gdb_kprobe.model import AddressRange, VirtAddr

# Linux 6.12: ENABLED 31, DISABLED 25, TOUCHED 20 and MODIFIED 19; the bits below count the users.
LAYOUT = FtraceLayout(size=16, ip=0, flags=8, enabled=1 << 31, disabled=1 << 25, history=3 << 19)
TEXT = 0xFFFF_FFFF_8100_0000
MODULE = 0xFFFF_FFFF_C000_0000
PAGE = 0xFFFF_8880_0100_0000
OTHER_PAGE = 0xFFFF_8880_0050_0000


def packed(*records: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", ip, flags) for ip, flags in records)


def site(flags: int) -> FtraceSite:
    return FtraceSite(LAYOUT, VirtAddr(PAGE), packed((TEXT + 4, flags)))


@pytest.fixture
def records() -> FtraceRecords:
    """A module's records come before some of the kernel's, as when its pages were put between."""
    pages = [(PAGE, packed((TEXT + 4, 0), (TEXT + 0x20, 1))), (OTHER_PAGE, packed((MODULE, 0), (TEXT + 0x40, 0)))]
    return FtraceRecords(LAYOUT, [(VirtAddr(start), data) for start, data in pages])


def window(start: int, end: int) -> AddressRange:
    return AddressRange(VirtAddr(start), VirtAddr(end))


@pytest.mark.parametrize(
    ("addr", "record"),
    [(TEXT + 4, PAGE), (TEXT + 0x20, PAGE + 16), (MODULE, OTHER_PAGE), (TEXT + 0x40, OTHER_PAGE + 16)],
)
def test_a_record_is_found_by_the_address_of_its_nop(records: FtraceRecords, addr: int, record: int) -> None:
    found = records.find(addr)
    assert found is not None
    assert (found.ip, found.record) == (addr, record)
    assert records.find(addr - 1) is records.find(addr + 1) is None


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (TEXT, TEXT + 4, []),
        (TEXT, TEXT + 5, [TEXT + 4]),
        (TEXT + 8, TEXT + 9, [TEXT + 4]),
        (TEXT + 9, TEXT + 0x20, []),
        (TEXT + 8, TEXT + 0x41, [TEXT + 4, TEXT + 0x20, TEXT + 0x40]),
        (MODULE + 4, MODULE + 0x100, [MODULE]),
    ],
)
def test_records_that_share_a_byte_with_a_window(
    records: FtraceRecords, start: int, end: int, expected: list[int]
) -> None:
    assert [found.ip for found in records.sites_in(window(start, end))] == expected


def test_records_are_listed_in_the_order_of_the_pages(records: FtraceRecords) -> None:
    assert [found.ip for found in records] == [TEXT + 4, TEXT + 0x20, MODULE, TEXT + 0x40]


def test_a_kernel_without_ftrace_has_no_record() -> None:
    none = FtraceRecords(None, [])
    assert (len(none), list(none), none.find(TEXT), none.sites_in(window(TEXT, MODULE))) == (0, [], None, [])


@pytest.mark.parametrize("history", [0, 1 << 20, 3 << 19])
def test_borrowing_sets_one_bit_and_keeps_the_rest(history: int) -> None:
    free = site(history)
    assert free.why_not_borrow(NOP) is None
    assert struct.unpack("<QQ", free.borrowed) == (TEXT + 4, history | 1 << 25)
    assert replace(free, data=free.borrowed).is_disabled


@pytest.mark.parametrize(
    ("flags", "text", "why"),
    [
        (1 << 25, NOP, "disabled"),
        (1 << 31 | 1, bytes.fromhex("e8fbffffff"), "is called"),
        (1 << 31, NOP, "is called"),
        (1, NOP, "about to be called"),
        (1 << 30, NOP, "about to be called"),
        (0, bytes.fromhex("cc1f440000"), "cc 1f 44 00 00"),
    ],
)
def test_what_is_in_use_is_not_borrowed(flags: int, text: bytes, why: str) -> None:
    reason = site(flags).why_not_borrow(text)
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize(("changing", "may"), [(False, True), (True, False)])
def test_nothing_is_given_back_while_the_guest_switches_tracers(changing: bool, may: bool) -> None:
    """In that moment a tracer may be off the list, and not yet off the counts."""
    assert (FtraceTracers((), changing).why_not_return(TEXT) is None) == may
