"""Proves one instruction by the strongest oracle that there is for it."""

from __future__ import annotations

import random
from enum import StrEnum

from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86.decode import Insn
from tests.proof.bare import SLOTS, BareMachine
from tests.proof.decoding import check_decoding
from tests.proof.differential import check
from tests.proof.emulator import Emulator, has_meaning, is_extended, random_state
from tests.proof.operands import make_sensible
from tests.proof.privileged import changing, state_for, transplanted

MODULE_AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))


class Oracle(StrEnum):
    UNICORN = "unicorn"
    """Executed by unicorn, all three ways, without an exception in at least one state."""
    BARE_GUEST = "bare-metal guest"
    """The same in a real QEMU at ring 0; branches are never left to it."""
    DECODING = "decoding"
    """No machine at hand executes it: iced sees the same instruction with the same operands."""


class Prover:
    """Compares instructions in *states* random states each, in slots all over the module area."""

    def __init__(self, emulator: Emulator, bare: BareMachine, states: int) -> None:
        self._emulator = emulator
        self._bare = bare
        self._states = states

    def prove(self, insn: Insn) -> Oracle:
        """Return the oracle that proved *insn*.

        :raises AssertionError: a difference.
        """
        if has_meaning(insn) and not is_extended(insn) and self._on_emulator(insn):
            return Oracle.UNICORN
        if not insn.is_branch and not insn.is_halt and self._on_bare_machine(insn):
            return Oracle.BARE_GUEST
        check_decoding(insn, _slot(random.Random(insn.raw)))
        return Oracle.DECODING

    def _on_emulator(self, insn: Insn) -> bool:
        executed = False
        for number in range(self._states):
            rng = random.Random(f"{insn.raw.hex()} {number}")
            before = random_state(rng)
            make_sensible(insn, before, rng)
            executed |= check(self._emulator, before, insn, _slot(rng))
        return executed

    def _on_bare_machine(self, insn: Insn) -> bool:
        executed = False
        moved = transplanted(insn, insn.addr & 0xFFF)
        for number in range(self._states):
            rng = random.Random(f"{insn.raw.hex()} {number}")
            before = state_for(moved, self._bare, rng)
            slot = VirtAddr(SLOTS + rng.randrange(0x1000))
            executed |= check(self._bare, before, moved, slot, changing(moved))
        return executed


def _slot(rng: random.Random) -> VirtAddr:
    return VirtAddr(rng.randrange(MODULE_AREA.start, MODULE_AREA.end))
