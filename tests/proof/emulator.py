"""Unicorn (QEMU's TCG of another version, apart from everything in this project) as the machine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final

import unicorn
from unicorn import x86_const

from gdb_kprobe.model import GENERAL_REGISTERS
from gdb_kprobe.x86.decode import Insn
from tests.proof.state import PAGE, State

_REGISTER: Final = {
    name: getattr(x86_const, f"UC_X86_REG_{'RFLAGS' if name == 'eflags' else name.upper()}")
    for name in GENERAL_REGISTERS
}
_XMM: Final = tuple(getattr(x86_const, f"UC_X86_REG_XMM{number}") for number in range(16))
_FLAGS: Final = 0xCD5  # CF PF AF ZF SF DF OF
_GS_BASE: Final = 0xFFFF_8880_1234_0000


class Emulator:
    """A :class:`~tests.proof.state.Machine`: 64-bit mode where every page exists, at any address.

    *State.extended*, when it is not empty, is XMM0-15.
    """

    def __init__(self) -> None:
        self.uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_BROADWELL)
        self.uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self.uc.mem_map(PAGE, 256 * PAGE)
        self.uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)
        self._physical: dict[int, int] = {}
        self._state = State({}, 0)

    def _fill(self, uc: Any, vaddr: int, access: int, entry: Any, data: object) -> bool:
        entry.paddr = self._page(vaddr & -PAGE)
        entry.perms = unicorn.UC_PROT_ALL
        return True

    def _page(self, base: int) -> int:
        if base not in self._physical:
            physical = PAGE * (1 + len(self._physical))
            self._physical[base] = physical
            self.uc.mem_write(physical, self._state.page(base))
        return self._physical[base]

    def run(self, before: State, code: Mapping[int, bytes], start: int, most: int = 1, at: int | None = None) -> State:
        """Run the piece of *code* at *start*, from *at* on if that is given, until it is left."""
        self._physical.clear()
        self._state = before.copy()
        for addr, piece in code.items():
            self._state.write(addr, piece)
        self.uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        self.uc.ctl_flush_tb()
        for name, value in before.registers.items():
            if name != "rip":
                self.uc.reg_write(_REGISTER[name], value)
        self.uc.reg_write(x86_const.UC_X86_REG_GS_BASE, _GS_BASE)
        for number, register in enumerate(_XMM if before.extended else ()):
            self.uc.reg_write(register, int.from_bytes(before.extended[number * 16 :][:16], "little"))

        fault, rip = "", start if at is None else at
        for _ in range(most):
            try:
                self.uc.emu_start(rip, 0, 0, 1)
            except unicorn.UcError as error:
                fault = str(error)
                break
            rip = self.uc.reg_read(x86_const.UC_X86_REG_RIP)
            if not start <= rip < start + len(code[start]):
                break

        values = {name: self.uc.reg_read(_REGISTER[name]) for name in GENERAL_REGISTERS}
        after = State(values, before.seed, dict(before.pages), fault=fault)
        if before.extended:
            after.extended = b"".join(self.uc.reg_read(register).to_bytes(16, "little") for register in _XMM)
        for base, physical in self._physical.items():
            after.pages[base] = bytes(self.uc.mem_read(physical, PAGE))
        for addr, piece in code.items():
            assert after.read(addr, len(piece)) == piece, "the code was overwritten"
            after.write(addr, State({}, before.seed).read(addr, len(piece)))
        return after


def random_state(rng: random.Random, *, extended: bool = False) -> State:
    """Registers that hold anything, a kernel stack, and flags in any combination."""
    registers = {
        name: rng.choice(
            (
                rng.getrandbits(64),
                rng.getrandbits(8),
                rng.getrandbits(32),
                0xFFFF_8880_0000_0000 + rng.getrandbits(32),
                0,
                1,
            )
        )
        for name in GENERAL_REGISTERS
        if name not in ("rip", "eflags")
    }
    registers["rsp"] = 0xFFFF_C900_0000_0000 + rng.randrange(0x4000, 1 << 24) * 8
    registers["eflags"] = (rng.getrandbits(16) & _FLAGS) | 2
    return State(registers, rng.getrandbits(32), extended=rng.randbytes(256) if extended else b"")


# What unicorn takes for an instruction, and "executes" without its meaning: by map, ports, halts and what is the
# system's; segment registers too, for it has no descriptor tables.
_WITHOUT_MEANING: Final[tuple[frozenset[int], ...]] = (
    frozenset(b"\x6c\x6d\x6e\x6f\x8e\xe4\xe5\xe6\xe7\xec\xed\xee\xef\xf4\x9b") | frozenset(range(0xD8, 0xE0)),
    frozenset(b"\x00\x01\x02\x03\x06\x08\x09\x20\x21\x22\x23\x30\x31\x32\x33\x37\x78\x79\xa1\xa2\xa9\xae\xb2\xb4\xb5"),
    frozenset(b"\x80\x81\x82\xf5\xf6\xf8\xf9"),
    frozenset(),
)


def has_meaning(insn: Insn) -> bool:
    """Whether unicorn does what *insn* means, if it executes it at all."""
    encoding = insn.encoding
    if encoding.space:
        return not is_extended(insn)
    if (encoding.map, encoding.opcode) == (1, 0xC7):
        return insn.reg == 1  # cmpxchg16b; not rdrand, xsaves, vmptrld
    if insn.has_repeat_prefix and (encoding.map, encoding.opcode) == (1, 0x1E):
        return insn.modrm == 0xFA  # endbr64; not the instructions of the shadow stack
    return encoding.opcode not in _WITHOUT_MEANING[encoding.map]


def is_extended(insn: Insn) -> bool:
    """Whether *insn* works on x87 or vector registers (some of these that do not are taken for it)."""
    encoding, opcode = insn.encoding, insn.opcode
    if encoding.space:
        # BMI: andn, bextr, pdep and their like, all on general registers.
        return (encoding.map, opcode) not in ((2, 0xF2), (2, 0xF3), (2, 0xF5), (2, 0xF6), (2, 0xF7), (3, 0xF0))
    if encoding.map == 0:
        return 0xD8 <= opcode <= 0xDF or opcode == 0x9B
    if encoding.map == 1:
        return (
            opcode in (0x0E, 0x0F, 0x77, 0xAE, 0xC2, 0xC4, 0xC5, 0xC6)
            or 0x10 <= opcode <= 0x17
            or 0x28 <= opcode <= 0x2F
            or 0x50 <= opcode <= 0x7F
            or 0xD0 <= opcode <= 0xFE
        )
    return encoding.map == 3 or opcode not in (0x80, 0x81, 0x82, 0xF0, 0xF1, 0xF5, 0xF6, 0xF8, 0xF9)
