"""Emitted bytes, labels, and displacements that do not fit."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, DisplacementError, Label, fits_s32, signed_distance
from gdb_kprobe.x86.decode import iter_insns

PC = VirtAddr(0xFFFF_FFFF_C000_0000)


def text(asm: Assembler, pc: VirtAddr = PC) -> list[str]:
    return [str(insn) for insn in iter_insns(asm.finish(), pc)]


def test_methods_emit_the_instruction_they_are_named_after() -> None:
    asm = Assembler(PC)
    asm.jmp_rel32(VirtAddr(0xFFFF_FFFF_8100_0000))
    asm.jcc_rel32(0x5, VirtAddr(PC - 1))
    asm.call_rel32(VirtAddr(PC + 0x1000))
    asm.push_imm32(0xFFFF_FFFF_8123_4567)
    asm.push_imm64(0x1122_3344_8899_AABB)
    asm.store_qword_at_rsp(8, 0xFFFF_FFFF_8123_4567)
    asm.store_qword_at_rsp(0, 0x1122_3344_8899_AABB)
    asm.push_stack_top()
    asm.ret()
    asm.int3()
    asm.ud2()
    assert text(asm) == [
        "jmp 0xffffffff81000000",
        "jne 0xffffffffbfffffff",
        "call 0xffffffffc0001000",
        "push -0x7edcba99",
        "push -0x77665545",
        "mov dword ptr [rsp + 4], 0x11223344",
        "mov qword ptr [rsp + 8], 0xffffffff81234567",
        "mov dword ptr [rsp], 0x8899aabb",
        "mov dword ptr [rsp + 4], 0x11223344",
        "push qword ptr [rsp]",
        "ret",
        "int3",
        "ud2",
    ]


def test_label_is_resolved_forwards_and_backwards() -> None:
    asm = Assembler(PC)
    start, end = Label("start"), Label("end")
    asm.bind(start)
    asm.jcc_rel32(4, end)
    asm.jmp_rel32(end)
    asm.jmp_rel32(start)
    asm.bind(end)
    assert text(asm) == [f"je {PC + 16:#x}", f"jmp {PC + 16:#x}", f"jmp {PC:#x}"]
    assert end.addr == PC + 16


def test_labels_of_the_same_name_are_different() -> None:
    asm = Assembler(PC)
    one, other = Label("out"), Label("out")
    asm.jmp_rel32(one)
    asm.bind(other)
    with pytest.raises(AssertionError, match="never bound"):
        asm.finish()


def test_label_is_bound_once() -> None:
    asm = Assembler(PC)
    label = Label("twice")
    asm.bind(label)
    with pytest.raises(AssertionError, match="bound twice"):
        asm.bind(label)


@pytest.mark.parametrize("distance", [0x7FFF_FFFF, -0x8000_0000])
def test_displacement_at_the_limit(distance: int) -> None:
    low = VirtAddr(0x1_0000_0000)
    asm = Assembler(low)
    asm.jmp_rel32(VirtAddr(low + 5 + distance))
    assert asm.finish() == b"\xe9" + distance.to_bytes(4, "little", signed=True)


@pytest.mark.parametrize("distance", [0x8000_0000, -0x8000_0001])
def test_displacement_past_the_limit_is_an_error_at_emission(distance: int) -> None:
    low = VirtAddr(0x1_0000_0000)
    with pytest.raises(DisplacementError, match=f"jmp at {low:#x} cannot reach {low + 5 + distance:#x}"):
        Assembler(low).jmp_rel32(VirtAddr(low + 5 + distance))


def test_displacement_wraps_around_the_address_space() -> None:
    asm = Assembler(VirtAddr(0xFFFF_FFFF_FFFF_FFF0))
    asm.jmp_rel32(VirtAddr(0x10))
    assert asm.finish() == b"\xe9\x1b\x00\x00\x00"


def test_sign_extension() -> None:
    assert [fits_s32(v) for v in (0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_7FFF_FFFF, -1)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip
    assert signed_distance(0xFFFF_FFFF_FFFF_FFFF, 1) == 2
    assert signed_distance(1, 0xFFFF_FFFF_FFFF_FFFF) == -2
