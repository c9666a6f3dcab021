"""Detours in unicorn: what the probed code would have done, and the counter, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest

from gdb_kprobe.bpf.check import check
from gdb_kprobe.handlers.count import COUNTER, ENABLE, HITS, REGIONS, lower
from gdb_kprobe.kprobes.detour import Action, Detour, Flags
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.kprobes.window import Window
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.testing.proof.emulator import Emulator, random_state
from gdb_kprobe.testing.proof.state import State, differences
from gdb_kprobe.x86.decode import decode, iter_insns

ADDR = VirtAddr(0xFFFF_FFFF_8123_4000)
SLOT = VirtAddr(0xFFFF_FFFF_C012_3040)
DATA = VirtAddr(0xFFFF_FFFF_C05F_0000)
BELOW = 256
"""Bytes of stack below RSP that a detour may use: there is no red zone."""
STATES = 6
WINDOWS = {
    "nop": "0f1f440000",
    "flags are read": "0f94c0 4811d1",  # sete al; adc rcx, rdx
    "pushes": "4157 4156 4155",
    "flags are pushed": "9c 4889f8 90",
    "a branch": "7402 4889e5",
    "a call": "53 e8f0ffffff",
}
CONDITIONS: dict[str, Callable[[State], bool]] = {
    "": lambda state: True,
    "di > 0x7fffffffffffffff": lambda state: state.registers["rdi"] >> 63 == 1,
    "(ax & 1) == (r9 & 1)": lambda state: state.registers["rax"] & 1 == state.registers["r9"] & 1,
    "flags & 1": lambda state: bool(state.registers["eflags"] & 1),
    f"ip == {ADDR:#x} && (sp & 7) == 0": lambda state: state.registers["rsp"] & 7 == 0,
}
PROGRAMS = {
    text: Program(check(lower(parse_condition(text) if text else None), REGIONS), COUNTER) for text in CONDITIONS
}


def make(window: str, handlers: tuple[Handler, ...], flags: Flags) -> Detour:
    text = bytes.fromhex(WINDOWS[window])
    insns = tuple(iter_insns(text, ADDR))
    end = offset(ADDR, len(text))
    return Detour(Window(ADDR, end, tuple(insn.addr for insn in insns[1:])), insns, text, Action(handlers), flags)


def run(machine: Emulator, before: State, code: bytes, at: VirtAddr) -> State:
    """Until it leaves *code*."""
    state = before.copy()
    state.registers["rip"] = at
    return machine.run(state, {at: code}, at, most=200)


@pytest.mark.parametrize("flags", [Flags.LAHF, Flags.PUSHF])
@pytest.mark.parametrize("window", WINDOWS)
def test_it_does_what_the_window_does_and_counts(window: str, flags: Flags) -> None:
    rng = random.Random(f"{window} {flags}")
    machine = Emulator()
    for first, second in product(CONDITIONS, repeat=2):
        counters = DATA, offset(DATA, 32)
        detour = make(window, (Handler(PROGRAMS[first], counters[0]), Handler(PROGRAMS[second], counters[1])), flags)
        plain = make(window, (), flags)
        for _ in range(STATES):
            before = random_state(rng)
            enabled = [rng.random() < 0.8, rng.random() < 0.8]
            for counter, is_enabled in zip(counters, enabled, strict=True):
                before.write(counter, bytes(ENABLE) + is_enabled.to_bytes(4, "little"))
            expected = run(machine, before, plain.emit(SLOT), SLOT)
            found = run(machine, before, detour.emit(SLOT), SLOT)
            wanted = [
                is_enabled and CONDITIONS[text](before)
                for is_enabled, text in zip(enabled, (first, second), strict=True)
            ]
            counted = [int.from_bytes(found.read(counter + HITS, 8), "little") for counter in counters]
            assert counted == [int(want) for want in wanted], (first, second)
            for counter in counters:
                found.write(counter + HITS, bytes(8))
            top = min(before.registers["rsp"], expected.registers["rsp"])
            told = differences(expected, found, range(top - BELOW, top))
            assert not told, (window, first, second, told, detour.emit(SLOT).hex())


def test_flags_that_nobody_reads_are_not_saved() -> None:
    counter = Handler(PROGRAMS[""], DATA)
    sizes = {flags: make("nop", (counter,), flags).size for flags in Flags}
    assert sizes[Flags.DEAD] < sizes[Flags.PUSHF] < sizes[Flags.LAHF]
    assert [make("nop", (), flags).size for flags in Flags] == [10, 10, 10]


def test_the_jump_leads_there() -> None:
    detour = make("pushes", (Handler(PROGRAMS[""], DATA),), Flags.DEAD)
    patch = detour.patch(SLOT)
    # All of the window is replaced, so that what decodes it comes out behind it.
    assert (patch.addr, patch.old) == (ADDR, bytes.fromhex(WINDOWS["pushes"]))
    assert decode(patch.new, ADDR).branch_target == SLOT
    assert patch.new[5:] == b"\xcc"
    assert detour.size == len(detour.emit(SLOT))
