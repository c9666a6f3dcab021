"""States in which an instruction can do something: its operand where memory is, its values what it accepts."""

from __future__ import annotations

import random
from typing import Final

import iced_x86

from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, classify
from tests.proof.state import State

_MASK: Final = (1 << 64) - 1
_REGISTER: Final = {
    getattr(iced_x86.Register, name.upper()): name
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)))
}
_VECTORS: Final = tuple(
    getattr(iced_x86.Register, f"{kind}{number}") for kind in ("XMM", "YMM", "ZMM") for number in range(32)
)
_TF: Final = 0x100


def decoded(insn: Insn) -> iced_x86.Instruction:
    """The same instruction in the eyes of iced."""
    return iced_x86.Decoder(64, insn.raw, ip=insn.addr).decode()


def make_sensible(insn: Insn, state: State, rng: random.Random) -> None:
    """Change *state* so that *insn* does not always fault, and repeats only a little."""
    registers = state.registers
    if classify(insn) is Family.REPEATED:
        registers["rcx"] = rng.choice((0, 1, 2, 5))
    if insn.is_loop:
        registers["rcx"] = rng.choice((0, 1, 2, 1 << 32, registers["rcx"]))
    name = insn.mnemonic
    if name in ("div", "idiv"):
        registers["rax"] &= 0x3F
        registers["rdx"] = 0 if insn.opcode == 0xF7 else registers["rdx"] | 1
        if not insn.has_memory_operand:
            for register in ("rbx", "rcx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16))):
                registers[register] |= 1
    elif name in ("popf", "popfq"):
        # With the trap flag a #DB follows, which is one instruction late for code in a slot.
        flags = int.from_bytes(state.read(registers["rsp"], 2), "little") & ~_TF
        state.write(registers["rsp"], flags.to_bytes(2, "little"))
    elif name == "cmpxchg16b":
        place_operand(insn, state, 0xFFFF_8880_0000_0000 + rng.getrandbits(24) * 16)


def place_operand(insn: Insn, state: State, address: int) -> bool:
    """Set base and index registers so that the memory operand is at *address*; false when there are none to set."""
    other = decoded(insn)
    base, index = other.memory_base, other.memory_index
    if not insn.has_memory_operand or index in _VECTORS:
        return False
    rest = address - other.memory_displacement & _MASK
    if index in _REGISTER and index != base:
        scaled = state.registers[_REGISTER[index]] & 0x3F8
        state.registers[_REGISTER[index]] = scaled
        rest = rest - scaled * other.memory_index_scale & _MASK
    if base not in _REGISTER:
        return False
    if index == base:
        rest //= 1 + other.memory_index_scale
    state.registers[_REGISTER[base]] = rest
    return True
