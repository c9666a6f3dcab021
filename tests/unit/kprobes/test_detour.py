"""Detours in unicorn: what the probed code would have done, and the counter, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest

from gdb_kprobe.actions.lower import COUNTER, ENABLE, HITS, REGIONS, lower
from gdb_kprobe.bpf.verifier import check
from gdb_kprobe.kprobes.action import ASK_JUMP, MISS_SIZE, UNDO_SIZE, Action, Ask, Verdict
from gdb_kprobe.kprobes.detour import Detour, Flags
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.kprobes.window import Window
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.decode import decode, iter_insns
from tests.proof.emulator import Emulator, random_state
from tests.proof.state import State, differences

ADDR = VirtAddr(0xFFFF_FFFF_8123_4000)
SLOT = VirtAddr(0xFFFF_FFFF_C012_3040)
DATA = VirtAddr(0xFFFF_FFFF_C05F_0000)
GATE = VirtAddr(0xFFFF_FFFF_C015_0000)
MISSED = VirtAddr(DATA + 0x100)
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

ASKING = {
    text: Program(check(lower(parse_condition(text) if text else None, Verdict.HOST), REGIONS), COUNTER, decides=True)
    for text in CONDITIONS
}


def make(window: str, handlers: tuple[Handler, ...], flags: Flags, dead: bool = False) -> Detour:
    text = bytes.fromhex(WINDOWS[window])
    insns = tuple(iter_insns(text, ADDR))
    end = offset(ADDR, len(text))
    return Detour(Window(ADDR, end, tuple(insn.addr for insn in insns[1:])), insns, text, action(handlers), flags, dead)


def action(handlers: tuple[Handler, ...]) -> Action:
    asks = any(handler.decides for handler in handlers)
    return Action(handlers, Ask(GATE, MISSED, VirtAddr(0)) if asks else None)


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


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("flags", Flags)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_host_is_asked_with_the_machine_as_it_was(window: str, flags: Flags, dead: bool) -> None:
    """Of three probes, any of which ask: all registers, all flags, those too that nobody reads, and the stack."""
    rng = random.Random(f"{window} {flags} {dead}")
    machine = Emulator()
    counters = [offset(DATA, 32 * number) for number in range(3)]
    for texts in rng.sample(list(product(CONDITIONS, repeat=3)), 12):
        asking = [rng.random() < 0.6 for _ in texts]
        handlers = tuple(
            Handler((ASKING if asks else PROGRAMS)[text], counter)
            for text, asks, counter in zip(texts, asking, counters, strict=True)
        )
        made = make(window, handlers, flags, dead).code(SLOT)
        plain = make(window, (), flags, dead)
        for _ in range(STATES):
            before = random_state(rng)
            enabled = [rng.random() < 0.8 for _ in counters]
            for counter, is_enabled in zip(counters, enabled, strict=True):
                before.write(counter, bytes(ENABLE) + is_enabled.to_bytes(4, "little"))
            held = [on and CONDITIONS[text](before) for on, text in zip(enabled, texts, strict=True)]
            found = run(machine, before, made.code, SLOT)
            hits = [int.from_bytes(found.read(counter + HITS, 8), "little") for counter in counters]
            assert hits == [int(hold and not asks) for hold, asks in zip(held, asking, strict=True)]
            for counter in counters:
                found.write(counter + HITS, bytes(8))
            if not any(hold and asks for hold, asks in zip(held, asking, strict=True)):
                expected = run(machine, before, plain.emit(SLOT), SLOT)
                if dead:
                    expected.registers["eflags"] = found.registers["eflags"]
                    if window in ("flags are read", "flags are pushed", "a branch"):
                        continue  # they are not dead there
                assert not differences(expected, found, below(before, expected))
                continue
            assert found.registers.pop("rip") == GATE
            wanted = {**before.registers, "rsp": before.registers["rsp"] - 8}
            assert found.registers == wanted
            assert int.from_bytes(found.read(found.registers["rsp"], 8), "little") == made.answer
            top = before.registers["rsp"]
            assert found.read(top, 64) == before.read(top, 64)


def below(before: State, after: State) -> range:
    top = min(before.registers["rsp"], after.registers["rsp"])
    return range(top - BELOW, top)


@pytest.mark.parametrize("window", WINDOWS)
def test_with_nobody_there_a_miss_is_counted_and_the_guest_goes_on(window: str) -> None:
    rng = random.Random(window)
    machine = Emulator()
    detour = make(window, (Handler(ASKING[""], DATA),), Flags.LAHF)
    made = detour.code(SLOT)
    assert made.answer is not None
    assert made.code[made.answer - SLOT - UNDO_SIZE :][:UNDO_SIZE] == bytes(8)
    jump = decode(made.code[made.answer - SLOT - ASK_JUMP :], offset(made.answer, -ASK_JUMP))
    assert jump.branch_target == GATE
    for start, missed in ((made.answer, 1), (offset(made.answer, MISS_SIZE), 0)):
        for _ in range(STATES):
            before = random_state(rng)
            before.write(MISSED, bytes(8))
            expected = run(machine, before, make(window, (), Flags.LAHF).emit(SLOT), SLOT)
            state = before.copy()
            state.registers["rip"] = start
            found = machine.run(state, {SLOT: made.code}, SLOT, most=200, at=start)
            assert int.from_bytes(found.read(MISSED, 8), "little") == missed
            found.write(MISSED, bytes(8))
            assert not differences(expected, found, below(before, expected))


@pytest.mark.parametrize("window", WINDOWS)
def test_each_displaced_instruction_has_its_copy(window: str) -> None:
    detour = make(window, (Handler(PROGRAMS[""], DATA),), Flags.LAHF)
    copy = detour.code(SLOT).displaced
    assert [original for original, _ in copy.ways] == [insn.addr for insn in detour.insns]
    assert copy.way(ADDR) == copy.start
    assert copy.way(detour.window.end) is None


def test_flags_that_nobody_reads_are_not_saved_unless_the_host_may_look() -> None:
    counter, asking = Handler(PROGRAMS[""], DATA), Handler(ASKING[""], DATA)
    dead, pushf, lahf = (
        make("nop", (counter,), flags, dead).size
        for flags, dead in ((Flags.LAHF, True), (Flags.PUSHF, False), (Flags.LAHF, False))
    )
    assert dead < pushf < lahf
    assert {make("nop", (), flags, dead).size for flags, dead in product(Flags, (False, True))} == {10}
    code = make("nop", (asking,), Flags.PUSHF, True).emit(SLOT)
    assert (code[:1], code.count(b"\x9d")) == (b"\x9c", 2)  # pushfq; popfq where the host is asked, and by the miss


def test_the_jump_leads_there() -> None:
    detour = make("pushes", (Handler(PROGRAMS[""], DATA),), Flags.LAHF, True)
    patch = detour.patch(SLOT)
    # All of the window is replaced, so that what decodes it comes out behind it.
    assert (patch.addr, patch.old) == (ADDR, bytes.fromhex(WINDOWS["pushes"]))
    assert decode(patch.new, ADDR).branch_target == SLOT
    assert patch.new[5:] == b"\xcc"
    assert detour.size == len(detour.emit(SLOT))
