"""What QEMU says of its accelerator."""

from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.target.quirks import Accelerator, ask


@pytest.mark.parametrize("answer", ["kvm support: disabled\r\n", "kvm support: not compiled\r\n", "Error\r\n"])
def test_without_kvm_it_is_tcg(fake: Any, answer: str) -> None:
    fake.monitor_texts["info kvm"] = answer
    quirks = ask(fake)
    assert quirks.accelerator is Accelerator.TCG
    assert (quirks.steps_by_trap_flag, quirks.hardware_breakpoints, quirks.flushes_at_write) == (False, None, True)
    assert quirks.holds_off_interrupts


@pytest.mark.parametrize(("bits", "held"), [(b"ENABLE=1,NOIRQ=2,NOTIMER=4", True), (b"ENABLE=1", False)])
def test_kvm_says_whether_a_step_can_hold_interrupts_off(fake: Any, bits: bytes, held: bool) -> None:
    fake.monitor_texts["info kvm"] = "kvm support: enabled\r\n"
    fake.answers[b"qqemu.sstepbits"] = bits
    quirks = ask(fake)
    assert quirks.accelerator is Accelerator.KVM
    assert (quirks.steps_by_trap_flag, quirks.hardware_breakpoints, quirks.flushes_at_write) == (True, 4, False)
    assert quirks.holds_off_interrupts is held


def test_another_accelerator_is_refused(fake: Any) -> None:
    fake.monitor_texts["info jit"] = "Error: JIT information is only available with accel=tcg\r\n"
    with pytest.raises(GuestStateError, match="by neither TCG nor KVM"):
        ask(fake)
