"""What a probe has of a program that is compiled once is what compiling it for that probe gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.actions.lower import COUNTER, REGIONS, lower
from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.jit import emit
from gdb_kprobe.bpf.verifier import check
from gdb_kprobe.kprobes.action import Verdict
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, DisplacementError, Label

CONDITIONS = (
    None,
    "di == 3",
    "di == 3 && (si & 0x40)",
    "di > 0xffffffff81000000 || ax < 5 && !(dx == cx)",
    "di < 2 && r8 != 7 || r9 == 0x123456789abcdef0",
    "ip == 12345",
    "flags & 0x200",
)
REGION = 0xFFFF_FFFF_FE00_0000
FRAMES: tuple[Frame, ...] = (
    InDetour(VirtAddr(REGION - (1 << 30))),
    InDetour(VirtAddr(REGION - (1 << 30)), 8, {"eflags": 0}),
    InDetour(VirtAddr(REGION - (1 << 30)), 16, {"rax": 8}),
    InHandler(VirtAddr(REGION - (1 << 30))),
)


def program_of(condition: str | None, verdict: Verdict = Verdict.CONTINUE) -> Program:
    parsed = None if condition is None else parse_condition(condition)
    return Program(check(lower(parsed, verdict), REGIONS), COUNTER, bool(verdict))


PROGRAMS = {condition: program_of(condition) for condition in CONDITIONS}


def directly(program: Program, frame: Frame, at: VirtAddr, data: VirtAddr) -> bytes:
    asm = Assembler(at)
    emit(asm, program.prepared(frame), {program.region: data})
    return asm.finish()


@given(
    st.sampled_from(CONDITIONS),
    st.sampled_from(FRAMES),
    st.integers(0, 1 << 24),
    st.integers(0, 1 << 19).map(lambda number: 32 * number),
)
def test_each_probe_has_the_code_that_is_compiled_for_it(
    condition: str | None, frame: Frame, at: int, data: int
) -> None:
    program = PROGRAMS[condition]
    if program.prepared(frame).reads_flags and isinstance(frame, InDetour) and "eflags" not in frame.saved:
        return
    code, counter = VirtAddr(REGION + at), VirtAddr(REGION + data)
    asm = Assembler(code)
    Handler(program, counter).emit(asm, frame, Label("said"))
    assert asm.finish() == directly(program, frame, code, counter)


def test_a_program_that_only_counts_is_compiled_once() -> None:
    template = PROGRAMS[None].template(FRAMES[0])
    assert template is not None
    assert template.displacements
    assert PROGRAMS[None].template(InDetour(VirtAddr(5))) is template


@pytest.mark.parametrize("frame", FRAMES[1:])
def test_one_that_sees_where_it_is_is_compiled_for_each_place(frame: Frame) -> None:
    assert PROGRAMS["ip == 12345"].template(frame) is None
    assert program_of("di == 3", Verdict.HOST).template(frame) is None, "it leads to somewhere else"


def test_data_out_of_reach_are_an_error_as_ever() -> None:
    asm = Assembler(VirtAddr(REGION))
    with pytest.raises(DisplacementError, match="more than 2 GiB away"):
        Handler(PROGRAMS[None], VirtAddr(REGION - (1 << 32))).emit(asm, FRAMES[0], Label("said"))
