"""Which two instructions no probe may part."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import Reason, VirtAddr, offset
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.shadow import splits_shadow

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)


def pair(first: str, second: str) -> tuple[Insn, Insn]:
    one = decode(bytes.fromhex(first), ADDR)
    return one, decode(bytes.fromhex(second), offset(ADDR, one.length))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fb", "f4"),  # sti; hlt
        ("fb", "0f 01 c9"),  # sti; mwait
        ("fb", "0f 01 fb"),  # sti; mwaitx
        ("8e d0", "48 89 c4"),  # mov ss, eax; mov rsp, rax
        ("8e d0", "48 8b 24 25 00 00 00 00"),
        ("8e d0", "5c"),
        ("8e 10", "48 8d 65 f8"),
        ("8e d0", "48 c7 c4 00 00 00 81"),
    ],
)
def test_belong_together(first: str, second: str) -> None:
    one, two = pair(first, second)
    for found in (splits_shadow(None, one, two), splits_shadow(one, two, None)):
        assert found is not None
        assert found.reason is Reason.INTERRUPT_SHADOW
        assert str(one) in found.detail
        assert str(two) in found.detail


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fb", "c3"),  # an interrupt before the ret instead of behind it
        ("fa", "f4"),  # cli; hlt
        ("8e d8", "48 89 c4"),  # mov ds
        ("8e d0", "48 89 e0"),  # mov rax, rsp
        ("8e d0", "49 89 c4"),  # mov r12, rax
        ("8e d0", "4c 8b 20"),  # mov r12, [rax]
        ("8e d0", "41 5c"),
        ("90", "f4"),
        ("0f fb c1", "f4"),  # psubq: only the second byte is that of sti
    ],
)
def test_may_be_parted(first: str, second: str) -> None:
    one, two = pair(first, second)
    assert splits_shadow(None, one, two) is None
    assert splits_shadow(one, two, None) is None


def test_without_neighbours_nothing_is_parted() -> None:
    one, two = pair("fb", "f4")
    assert splits_shadow(None, one, None) is None
    assert splits_shadow(None, two, None) is None
