"""The state of a processor and its memory, as far as an instruction can see and change it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Protocol

PAGE: Final = 0x1000
_MASK: Final = (1 << 64) - 1


@lru_cache(maxsize=512)
def _random_page(seed: int, base: int) -> bytes:
    return random.Random(f"{seed} {base}").randbytes(PAGE)


@dataclass
class State:
    """Registers by hardware name, and the content of every page that differs from what *seed* makes of it.

    *extended* is the x87 and vector state, *system* everything else, both in a form that is the machine's own. *fault*
    says which exception there was; then *registers* are those that it interrupted.
    """

    registers: dict[str, int]
    seed: int
    pages: dict[int, bytes] = field(default_factory=dict)
    fault: str = ""
    extended: bytes = b""
    system: bytes = b""

    def copy(self) -> State:
        return State(dict(self.registers), self.seed, dict(self.pages), self.fault, self.extended, self.system)

    def page(self, base: int) -> bytes:
        return self.pages.get(base) or _random_page(self.seed, base)

    def read(self, addr: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            at = addr + len(data) & _MASK
            data += self.page(at & -PAGE)[at % PAGE :][: size - len(data)]
        return data

    def write(self, addr: int, data: bytes) -> None:
        while data:
            base, start = addr & -PAGE & _MASK, addr % PAGE
            piece = data[: PAGE - start]
            page = self.page(base)
            self.pages[base] = page[:start] + piece + page[start + len(piece) :]
            addr, data = addr + len(piece) & _MASK, data[len(piece) :]


class Machine(Protocol):
    """Something that executes instructions, and that is not ours."""

    def run(self, before: State, code: Mapping[int, bytes], start: int, most: int = 1) -> State:
        """Put *code* in place, and execute at *start* until RIP leaves that piece, *most* instructions at most.

        The pages returned do not contain the code.
        """
        ...


def differences(expected: State, found: State, dead: range = range(0)) -> list[str]:
    """Everything in which *found* is not *expected*; *dead* is stack that may differ."""
    told = [
        f"{name} {found.registers[name]:#x} instead of {value:#x}"
        for name, value in expected.registers.items()
        if found.registers[name] != value
    ]
    if found.fault != expected.fault:
        told.append(f"{found.fault or 'no fault'} instead of {expected.fault or 'no fault'}")
    for what in ("extended", "system"):
        old, new = getattr(expected, what), getattr(found, what)
        if old != new:
            at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            told.append(f"{what} state at {at:#x}: {new[at : at + 8].hex()} instead of {old[at : at + 8].hex()}")
    for base in expected.pages.keys() | found.pages.keys():
        old, new = expected.page(base), found.page(base)
        if old != new:
            wrong = [base + i for i in range(PAGE) if old[i] != new[i] and base + i not in dead]
            if wrong:
                told.append(f"memory at {', '.join(f'{at:#x}' for at in wrong[:8])}")
    return told
