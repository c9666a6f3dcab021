"""What a handler sees as the instruction pointer of a probe that is patched elsewhere than it was asked for."""

from __future__ import annotations

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.hit_context import Registers

ASKED, PATCHED = VirtAddr(0x1000), 0x1005


def test_the_instruction_pointer_is_the_address_that_was_asked_for() -> None:
    regs = Registers({"rip": PATCHED})
    with regs.shown_at(ASKED):
        assert regs.ip == ASKED
    assert (regs.ip, regs.changed) == (PATCHED, frozenset())


def test_where_a_handler_sends_the_guest_it_goes() -> None:
    regs = Registers({"rip": PATCHED})
    with regs.shown_at(ASKED):
        regs.ip = 0x2000
    with regs.shown_at(ASKED):
        assert regs.ip == 0x2000
    assert (regs.ip, regs.changed) == (0x2000, frozenset({"rip"}))


def test_the_address_that_was_asked_for_is_no_other_place() -> None:
    regs = Registers({"rip": PATCHED})
    with regs.shown_at(ASKED):
        regs.ip = 0x2000
        regs.ip = regs.ip - 0x1000
    assert (regs.ip, regs.changed) == (PATCHED, frozenset())
