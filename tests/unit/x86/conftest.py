"""A processor that is not ours: unicorn (QEMU's TCG, apart from everything in this project) as the oracle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import unicorn
from unicorn import x86_const

from gdb_kprobe.model import GENERAL_REGISTERS

PAGE = 0x1000
FLAGS = 0xCD5  # CF PF AF ZF SF DF OF
_REGISTER = {
    name: getattr(x86_const, f"UC_X86_REG_{'RFLAGS' if name == 'eflags' else name.upper()}")
    for name in GENERAL_REGISTERS
}


@dataclass
class State:
    """Registers by name, and the content of every page that differs from what *seed* makes of it."""

    registers: dict[str, int]
    seed: int
    pages: dict[int, bytes] = field(default_factory=dict)
    fault: str = ""

    def page(self, base: int) -> bytes:
        return self.pages.get(base) or random.Random(f"{self.seed} {base}").randbytes(PAGE)

    def read(self, addr: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            at = addr + len(data) & (1 << 64) - 1
            data += self.page(at & -PAGE)[at % PAGE :][: size - len(data)]
        return data

    def write(self, addr: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            at = addr + i & (1 << 64) - 1
            page = bytearray(self.page(at & -PAGE))
            page[at % PAGE] = byte
            self.pages[at & -PAGE] = bytes(page)


class Machine:
    """Runs one piece of code in a 64-bit address space where every page exists, at the kernel's own addresses."""

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

    def run(self, before: State, code: Mapping[int, bytes], start: int, most: int = 1) -> State:
        """Put *code* in place, and execute at *start* until RIP leaves that piece, *most* instructions at most.

        The pages returned do not contain the code.
        """
        self._physical.clear()
        self._state = State(dict(before.registers), before.seed, dict(before.pages))
        for addr, piece in code.items():
            self._state.write(addr, piece)
        self.uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        self.uc.ctl_flush_tb()
        for name, value in before.registers.items():
            if name != "rip":
                self.uc.reg_write(_REGISTER[name], value)
        self.uc.reg_write(x86_const.UC_X86_REG_GS_BASE, 0xFFFF_8880_1234_0000)

        fault, rip = "", start
        for _ in range(most):
            try:
                self.uc.emu_start(rip, 0, 0, 1)
            except unicorn.UcError as error:
                fault = str(error)
                break
            rip = self.uc.reg_read(x86_const.UC_X86_REG_RIP)
            if not start <= rip < start + len(code[start]):
                break

        after = State({n: self.uc.reg_read(_REGISTER[n]) for n in GENERAL_REGISTERS}, before.seed, fault=fault)
        for base, physical in self._physical.items():
            after.pages[base] = bytes(self.uc.mem_read(physical, PAGE))
        for addr, piece in code.items():
            assert after.read(addr, len(piece)) == piece, "the code was overwritten"
            after.write(addr, State({}, before.seed).read(addr, len(piece)))
        return after


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


def random_state(rng: random.Random) -> State:
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
    registers["eflags"] = (rng.getrandbits(16) & FLAGS) | 2
    return State(registers, rng.getrandbits(32))


@pytest.fixture(scope="session")
def state_from() -> Any:
    """A random machine state for a seed."""
    return lambda seed: random_state(random.Random(seed))
