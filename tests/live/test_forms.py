"""Every form of instruction in the live text of a kernel: moved and stepped, it does what the original does.

The text is read from the running guest's RAM, after it has applied its alternatives; loaded modules are part of it. The
table at the end (``pytest -s``) says how many forms there are, and by which oracle each is proven.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from gdb_kprobe.launcher.oracle import GuestMonitor, GuestRam
from gdb_kprobe.model import Reason, VirtAddr
from gdb_kprobe.session.linux_guest import open_linux
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.testing.proof.bare import SLOTS, TEXT, BareMachine
from gdb_kprobe.testing.proof.cases import CASES
from gdb_kprobe.testing.proof.decoding import check_branch, check_decoding
from gdb_kprobe.testing.proof.differential import check
from gdb_kprobe.testing.proof.emulator import Emulator
from gdb_kprobe.testing.proof.forms import Forms, read_forms
from gdb_kprobe.testing.proof.privileged import state_for, transplanted
from gdb_kprobe.testing.proof.prover import MODULE_AREA, Oracle, Prover
from gdb_kprobe.x86.decode import decode
from gdb_kprobe.x86.families import Family, Unhandled, classify
from kprobe_guest import GuestSpec, GuestVm

pytestmark = pytest.mark.live

STATES = 4
"""Random states for each form."""

REFUSED = {Reason.FAR_TRANSFER, Reason.SOFTWARE_INTERRUPT, Reason.RAISES_UD, Reason.FOREIGN_INT3, Reason.TRANSACTION}
"""What no slot can hold."""


FULL = bool(os.environ.get("GDB_KPROBE_FULL"))
only_full = pytest.mark.skipif(not FULL, reason="other text of the same kernels; set GDB_KPROBE_FULL=1")


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


@pytest.fixture(
    scope="module",
    params=[
        GuestSpec(kernel="debian"),
        GuestSpec(kernel="newest"),
        pytest.param(GuestSpec(kernel="debian", extra_cmdline=("mitigations=off",)), marks=only_full),
        pytest.param(GuestSpec(kernel="newest", extra_cmdline=("mitigations=off",)), marks=only_full),
        pytest.param(GuestSpec(kernel="newest", cpu="default", vcpus=2), marks=only_full),
    ],
    ids=["debian", "newest", "debian-off", "newest-off", "newest-default-cpu"],
)
def spec(request: pytest.FixtureRequest) -> GuestSpec:
    """The guest whose text is read; by the module, so that its tests are run one after another."""
    asked: GuestSpec = request.param
    return asked


def test_every_form_of_the_live_text_is_proven(
    booted_guest: Callable[[GuestSpec], GuestVm], prover: Prover, spec: GuestSpec
) -> None:
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


def test_every_distinct_instruction_decodes_to_the_same_in_a_slot(
    booted_guest: Callable[[GuestSpec], GuestVm], spec: GuestSpec
) -> None:
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
