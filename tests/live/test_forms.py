"""Every form of instruction in the live text of a kernel: moved and stepped, it does what the original does.

The text is read from the running guest's RAM, after it has applied its alternatives; loaded modules are part of it. The
table at the end (``pytest -s``) says how many forms there are, and by which oracle each is proven.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from gdb_kprobe.guest.linux import open_linux
from gdb_kprobe.model import Reason, VirtAddr
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from gdb_kprobe.x86 import relocate, step
from gdb_kprobe.x86.decode import Insn, decode
from gdb_kprobe.x86.families import Family, Unhandled, classify
from kprobe_guest import GuestSpec, GuestVm
from tests.proof.bare import BASE, OPERAND, SLOTS, TEXT, BareMachine, arena_state
from tests.proof.cases import CASES
from tests.proof.decoding import check_branch, check_decoding
from tests.proof.differential import check
from tests.proof.emulator import Emulator
from tests.proof.forms import Forms, read_forms
from tests.proof.privileged import state_for, transplanted
from tests.proof.prover import MODULE_AREA, Oracle, Prover
from tests.proof.state import State, differences
from tests.support.probed import Booted

pytestmark = pytest.mark.live

STATES = 4
"""Random states for each form."""

REFUSED = {Reason.FAR_TRANSFER, Reason.SOFTWARE_INTERRUPT, Reason.RAISES_UD, Reason.FOREIGN_INT3, Reason.TRANSACTION}
"""What no slot can hold."""


@pytest.fixture(scope="module")
def bare() -> Iterator[BareMachine]:
    spec = GuestSpec(kernel="bare", memory_mb=1024, region="none")
    with GuestVm(spec) as guest, RspSocket(guest.gdb_address) as rsp:
        yield BareMachine(rsp, guest.ram(), guest.bare_image().symbols)


@pytest.fixture(scope="module")
def prover(bare: BareMachine) -> Prover:
    return Prover(Emulator(), bare, STATES)


_FORMS: dict[int, Forms] = {}


def live_forms(guest: GuestVm) -> Forms:
    """The forms in the text of *guest*, read once; the VM goes on running."""
    if guest.pid not in _FORMS:
        _FORMS.clear()
        _FORMS[guest.pid] = _read(guest)
    return _FORMS[guest.pid]


def _read(guest: GuestVm) -> Forms:
    linux = open_linux(GuestMonitor(guest), GuestRam(guest))
    init = linux.kallsyms.section("__init_begin", "__init_end")
    starts = sorted({symbol.addr for symbol in linux.kallsyms if symbol.is_text})
    texts = [(window.start, linux.memory.read(window.start, window.size)) for window in linux.text_ranges()]
    return read_forms(texts, starts, [init] if init is not None else [])


@pytest.mark.parametrize("family", CASES, ids=lambda family: family.replace(" ", "-"))
def test_written_cases_are_the_same_when_the_stub_steps(bare: BareMachine, family: Family) -> None:
    """On the machine that makes the steps of real probes; unicorn has its own idea of a step."""
    executed: Counter[str] = Counter()
    for text in CASES[family]:
        insn = transplanted(decode(bytes.fromhex(text), TEXT), 0x567)
        if insn.is_pause:
            continue  # a step of it executes the next instruction too: relocate.copy_for_step
        for number in range(STATES):
            rng = random.Random(f"{text} {number}")
            slot = VirtAddr(SLOTS + rng.randrange(0x1000))
            executed[text] += check(bare, state_for(insn, bare, rng), insn, slot)
    assert [text for text, count in executed.items() if not count] == [], "never executed without a fault"


def assert_same_exception(bare: BareMachine, before: State, insn: Insn, slot: VirtAddr) -> int:
    """Compare what the guest's handler is given: of the original, and of the stepped copy after the fix-up.

    Returns the vector.
    """
    repeats = step.most_steps(insn, before.registers)
    original = bare.run_into(before, {insn.addr: insn.raw}, insn.addr, repeats)
    state, copy = before.copy(), relocate.copy_for_step(insn, slot)
    state.registers["rip"] = slot
    while True:
        after = bare.run_into(state, {slot: copy.code}, slot)
        outcome = step.outcome(copy, state.registers, after.registers, bare.is_exception_entry)
        if outcome is not step.StepOutcome.PARTIAL:
            break
        state = after
    assert outcome is step.StepOutcome.FAULTED, insn
    fix = step.fix_up_fault(copy, after.registers, after.read)
    assert fix.registers == {}
    for addr, data in fix.memory:
        after.write(addr, data)
    assert differences(original, after) == [], insn
    return bare.vector(original)


UNMAPPED = BASE + (1 << 30)  # the first address behind what the bare-metal guest maps


@pytest.mark.parametrize(
    ("text", "registers", "vector"),
    [
        ("48 f7 f1", {"rcx": 0}, 0),  # div rcx
        ("48 8b 01", {"rcx": UNMAPPED}, 14),
        ("48 8b 01", {"rcx": 1 << 63}, 13),
        ("89 51 fe", {"rcx": UNMAPPED}, 14),  # across the end
        ("ff 11", {"rcx": UNMAPPED}, 14),  # call [rcx]
        ("f3 aa", {"rdi": UNMAPPED - 3, "rcx": 8}, 14),  # rep stosb
        ("f3 a4", {"rsi": UNMAPPED - 5, "rcx": 8}, 14),  # rep movsb
        ("f3 48 a5", {"rsi": UNMAPPED - 8, "rcx": 2}, 14),
        ("f3 a6", {"rsi": UNMAPPED, "rcx": 2}, 14),
        ("8e d9", {"rcx": 0x1238}, 13),  # mov ds, ecx: no such selector
        ("0f 33", {}, 6),  # rdpmc, which TCG does not have
    ],
)
def test_fault_of_a_stepped_copy_names_the_original(
    bare: BareMachine, text: str, registers: dict[str, int], vector: int
) -> None:
    before = arena_state(random.Random(text), extended=False)
    before.registers.update(registers)
    assert assert_same_exception(bare, before, decode(bytes.fromhex(text), TEXT), SLOTS) == vector


@pytest.mark.parametrize(
    "text", ["90", "55", "75 f0", "eb f0", "e8 f0 ff ff ff", "ff d0", "ff 13", "ff e0", "c3", "f3 aa"]
)
def test_trap_flag_of_the_guest_itself_traps_behind_the_original(bare: BareMachine, text: str) -> None:
    for number in range(STATES):
        before = arena_state(random.Random(f"{text} {number}"), extended=False)
        before.registers.update(eflags=before.registers["eflags"] | 0x100, rbx=OPERAND, rcx=1)
        assert assert_same_exception(bare, before, decode(bytes.fromhex(text), TEXT), SLOTS) == 1


def test_step_that_qemu_does_not_end_is_put_right(bare: BareMachine) -> None:
    """A ``pause`` in a slot, not replaced by a nop: QEMU steps over it and over the jump back behind it."""
    before = arena_state(random.Random(0), extended=False)
    pause = decode(b"\xf3\x90", TEXT)
    copy = relocate.copy_for_step(pause, SLOTS)
    after = bare.run_into(before, {SLOTS: pause.raw + copy.code[copy.length :]}, SLOTS)
    if after.registers["rip"] == copy.behind:
        pytest.skip("this QEMU ends the step")
    assert after.registers == {**before.registers, "rip": pause.end}
    assert step.outcome(copy, before.registers, after.registers, lambda _: False) is step.StepOutcome.DONE
    assert step.fix_up(copy, after.registers, after.read) == step.StepFixup({})


@pytest.fixture(
    scope="module",
    params=[
        GuestSpec(kernel="newest"),
        pytest.param(GuestSpec(kernel="debian"), marks=pytest.mark.full),
        pytest.param(GuestSpec(kernel="debian", extra_cmdline=("mitigations=off",)), marks=pytest.mark.full),
        pytest.param(GuestSpec(kernel="newest", extra_cmdline=("mitigations=off",)), marks=pytest.mark.full),
        pytest.param(GuestSpec(kernel="newest", cpu="default", vcpus=2), marks=pytest.mark.full),
    ],
    ids=["newest", "debian", "debian-off", "newest-off", "newest-default-cpu"],
)
def spec(request: pytest.FixtureRequest) -> GuestSpec:
    """The guest whose text is read; by the module, so that its tests are run one after another."""
    asked: GuestSpec = request.param
    return asked


def test_every_form_of_the_live_text_is_proven(booted_guest: Booted, prover: Prover, spec: GuestSpec) -> None:
    guest = booted_guest(spec)
    started = time.monotonic()
    forms = live_forms(guest)
    read = time.monotonic()

    oracles: Counter[Oracle] = Counter()
    refused: Counter[Reason] = Counter()
    differences: list[str] = []
    decoded: list[str] = []
    for form, sample in forms.samples.items():
        insn = decode(sample.raw, sample.addr)
        family = classify(insn)
        if isinstance(family, Unhandled):
            refused[family.reason] += 1
            continue
        try:
            oracle = prover.prove(insn)
        except AssertionError as error:
            differences.append(f"{form}: {error}")
            continue
        oracles[oracle] += 1
        if oracle is Oracle.DECODING:
            decoded.append(insn.mnemonic)

    print(
        f"\n{guest.run('uname -r')[1].strip()}: {forms.instructions} instructions, {len(forms.distinct)} distinct ones,"
    )
    print(f"{len(forms.samples)} forms, read in {read - started:.1f} s, proven in {time.monotonic() - read:.1f} s")
    for name, count in (*oracles.items(), *((f"refused: {reason}", count) for reason, count in refused.items())):
        print(f"  {count:6}  {name}")
    print(f"  {len(differences):6}  differences")
    print(f"  by decoding: {', '.join(sorted(decoded))}")
    print(f"  no instructions: {', '.join(f'{at:#x} ({why})' for at, why in forms.bad.items())}")

    assert differences == []
    assert set(refused) <= REFUSED
    assert sum(oracles.values()) + sum(refused.values()) == len(forms.samples)


def test_every_distinct_instruction_decodes_to_the_same_in_a_slot(booted_guest: Booted, spec: GuestSpec) -> None:
    """Not what a form does, which is proven above, but each displacement in it, for a slot anywhere in reach."""
    forms = live_forms(booted_guest(spec))
    rng = random.Random(0)
    started = time.monotonic()
    checked: Counter[str] = Counter()
    for raw, addr in forms.distinct.items():
        insn = decode(raw, addr)
        slot = VirtAddr(rng.randrange(MODULE_AREA.start, MODULE_AREA.end))
        match classify(insn):
            case Unhandled():
                checked["refused"] += 1
            case Family.JCC | Family.JMP | Family.CALL_REL:
                check_branch(insn, slot)
                checked["relative branches"] += 1
            case Family.CALL_INDIRECT | Family.JMP_INDIRECT | Family.RET | Family.LOOP as family:
                checked[f"{family}: by its forms"] += 1
            case _:
                check_decoding(insn, slot)
                checked["copies"] += 1
    print(f"\n{len(forms.distinct)} distinct instructions in {time.monotonic() - started:.1f} s: {dict(checked)}")
    assert checked.total() == len(forms.distinct)
    assert checked["copies"] > checked["relative branches"] > 0
