"""States for the bare-metal machine in which vector and system instructions can be executed without an exception."""

from __future__ import annotations

import random
from typing import Final

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import Insn, decode
from tests.proof.bare import BASE, OPERAND, TEXT, BareMachine, arena_state, random_image
from tests.proof.emulator import is_extended
from tests.proof.operands import decoded, make_sensible, place_operand
from tests.proof.state import State

_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16))
)  # fmt: skip
_KERNEL_GS_BASE: Final = 0xC000_0102
_DATA_SELECTOR: Final = 0x10
_POST_PORT: Final = 0x80
_PORTS: Final = frozenset((0, opcode) for opcode in b"\x6c\x6d\x6e\x6f\xe4\xe5\xe6\xe7\xec\xed\xee\xef")

CHANGING: Final = {"rdtsc": ("rax", "rdx"), "rdtscp": ("rax", "rdx")}
"""Registers that are different each time."""


def transplanted(insn: Insn, page_offset: int) -> Insn:
    """The same form in the bare-metal guest: at *page_offset* in its text, its fixed operand in the arena."""
    addr = VirtAddr(TEXT + page_offset)
    raw = insn.raw
    at, size = insn.encoding.disp_offset, insn.encoding.disp_size
    absolute = insn.has_memory_operand and insn.modrm is not None and insn.modrm < 0x40 and size == 4
    if insn.is_rip_relative:
        # Cut to 32 bits, the operand is where the arena is mapped once more: at its physical address.
        operand = OPERAND - BASE if 0x67 in insn.prefixes else OPERAND
        raw = raw[:at] + (operand - addr - len(raw) & 0xFFFF_FFFF).to_bytes(4, "little") + raw[at + 4 :]
    elif not insn.encoding.space and insn.opcode_map == 0 and 0xA0 <= insn.opcode <= 0xA3:
        size = insn.encoding.imm_size
        raw = raw[:-size] + (OPERAND if size == 8 else OPERAND - BASE).to_bytes(size, "little")
    elif absolute and not _has_registers(insn):
        raw = raw[:at] + (OPERAND & 0xFFFF_FFFF).to_bytes(4, "little") + raw[at + 4 :]
    return decode(raw, addr)


def state_for(insn: Insn, machine: BareMachine, rng: random.Random) -> State:
    """A random state, changed where *insn* would only fault."""
    state = arena_state(rng, extended=is_extended(insn))
    make_sensible(insn, state, rng)
    operand = OPERAND if _is_fixed(insn) else OPERAND + 64 * rng.randrange(16)
    if not _is_fixed(insn):
        place_operand(insn, state, operand)
    _set_registers(insn, state, machine)
    if insn.has_memory_operand:
        _set_memory(insn, state, machine, operand, rng)
    return state


def changing(insn: Insn) -> tuple[str, ...]:
    """Registers that *insn* leaves different each time."""
    if insn.mnemonic in ("rdrand", "rdseed"):
        return (_rm(insn),)
    return CHANGING.get(insn.mnemonic, ())


def _has_registers(insn: Insn) -> bool:
    other = decoded(insn)
    return bool(other.memory_base or other.memory_index)


def _is_fixed(insn: Insn) -> bool:
    return insn.has_memory_operand and (insn.is_rip_relative or not _has_registers(insn))


def _rm(insn: Insn) -> str:
    assert insn.modrm is not None
    return _NAMES[insn.modrm & 7 | (insn.rex & 1) << 3]


def _set_registers(insn: Insn, state: State, machine: BareMachine) -> None:
    registers, name = state.registers, insn.mnemonic
    where = (insn.opcode_map, insn.opcode) if not insn.encoding.space else (-1, 0)
    if name in ("rdmsr", "wrmsr"):
        registers.update(rcx=_KERNEL_GS_BASE, rax=0x1000, rdx=0)
    elif name in ("xsetbv", "xgetbv", "wrpkru", "rdpkru"):
        registers.update(rcx=0, rax=7 if name == "xsetbv" else 0, rdx=0)
    elif name in ("monitor", "monitorx"):
        registers.update(rax=OPERAND, rcx=0, rdx=0)
    elif where in _PORTS:
        registers.update(rdx=_POST_PORT, rax=0)
    elif where == (1, 0x22):
        control = (insn.reg or 0) | (insn.rex & 4) << 1
        registers[_rm(insn)] = machine.system[f"cr{control}"] if control in (0, 3, 4) else 0
    elif where == (1, 0x23):
        registers[_rm(insn)] = {7: 0x400, 6: 0xFFFF_0FF0}.get(insn.reg or 0, 0x1000)
    elif insn.modrm is not None and insn.modrm >= 0xC0:
        if where in ((0, 0x8E), (1, 0x02), (1, 0x03)) or name in ("verr", "verw"):
            registers[_rm(insn)] = _DATA_SELECTOR
        elif name == "lldt":
            registers[_rm(insn)] = 0
        elif name == "lmsw":
            registers[_rm(insn)] = machine.system["cr0"] & 0xFFFF
        elif name in ("wrfsbase", "wrgsbase"):
            registers[_rm(insn)] = 0x1234_5000
    elif name.startswith(("xsave", "xrstor", "fxrstor")):
        registers.update(rax=7, rdx=0)
    elif name in ("invpcid", "invept", "invvpid"):
        registers[_NAMES[(insn.reg or 0) | (insn.rex & 4) << 1]] = 2


def _set_memory(insn: Insn, state: State, machine: BareMachine, operand: int, rng: random.Random) -> None:
    name = insn.mnemonic
    if name in ("lgdt", "lidt"):
        state.write(operand, machine.gdt_pointer if name == "lgdt" else machine.idt_pointer)
    elif name.startswith(("xrstor", "fxrstor")):
        state.write(operand, random_image(rng))
    elif name == "ldmxcsr":
        state.write(operand, (0x1F80).to_bytes(4, "little"))
    elif name == "fldcw":
        state.write(operand, (0x37F).to_bytes(2, "little"))
    elif name in ("invpcid", "invept", "invvpid", "lldt"):
        state.write(operand, bytes(16))
    elif name in ("verr", "verw", "lar", "lsl") or (insn.opcode_map, insn.opcode) == (0, 0x8E):
        state.write(operand, _DATA_SELECTOR.to_bytes(2, "little"))
    elif name == "lmsw":
        state.write(operand, (machine.system["cr0"] & 0xFFFF).to_bytes(2, "little"))
