"""Proof by decoding, for instructions that no machine at hand executes: iced must see the same instruction in the slot.

That covers what is plain: the instruction itself, its operands at the same effective addresses, and the jump back.
"""

from __future__ import annotations

import iced_x86

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86 import relocate
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Family, classify

_PLAIN = (Family.NOP, Family.PLAIN, Family.RIP_RELATIVE, Family.REPEATED, Family.PUSH_FLAGS)
_FIELDS = (
    "code", "len", "op_count", "memory_base", "memory_index", "memory_index_scale", "memory_segment",
    "has_lock_prefix", "has_rep_prefix", "has_repne_prefix", "segment_prefix", "op_mask", "zeroing_masking",
    "is_broadcast", "rounding_control", "suppress_all_exceptions",
)  # fmt: skip
_REGISTERS = ("op0_register", "op1_register", "op2_register", "op3_register", "op4_register")
_IMMEDIATES = frozenset(
    getattr(iced_x86.OpKind, name) for name in vars(iced_x86.OpKind) if name.startswith("IMMEDIATE")
)


def check_decoding(insn: Insn, slot: VirtAddr) -> None:
    """Compare *insn* with what is made of it at *slot*, relocated and as the copy for a step.

    :raises AssertionError: it is another instruction there, or does not lead back; or this proof is not enough for it.
    """
    assert classify(insn) in _PLAIN, f"{insn} is more than a copy"
    original = _decode(insn.raw, insn.addr)
    code = relocate.relocate(insn, slot)
    moved = _decode(code, slot)
    _assert_same(insn, original, moved)
    back = _decode(code[moved.len :], slot + moved.len)
    assert (back.code, back.near_branch_target) == (iced_x86.Code.JMP_REL32_64, insn.end), insn
    assert moved.len + back.len == len(code), insn
    if insn.is_halt:
        return
    stepped = relocate.copy_for_step(insn, slot)
    assert stepped.code[stepped.length :] == code[moved.len :], insn
    copy = _decode(stepped.code, slot)
    if insn.is_pause:
        assert (copy.mnemonic, copy.len) == (iced_x86.Mnemonic.NOP, original.len), insn
    else:
        _assert_same(insn, original, copy)


def check_branch(insn: Insn, slot: VirtAddr) -> None:
    """Compare a relative branch with the code that stands in for it: condition, target, return address, way out.

    :raises AssertionError: one of them is another; or *insn* is no jcc, jmp or call to a target in the upper 2 GiB.
    """
    original = _decode(insn.raw, insn.addr)
    assert original.len == insn.length, insn
    code = relocate.relocate(insn, slot)
    first = _decode(code, slot)
    second = _decode(code[first.len :], slot + first.len)
    match classify(insn):
        case Family.JMP:
            assert first.code == iced_x86.Code.JMP_REL32_64, insn
            assert first.len == len(code), insn
            last = first
        case Family.JCC:
            assert first.is_jcc_near, insn
            assert first.condition_code == original.condition_code, insn
            assert second.near_branch_target == insn.end, insn
            last = first
        case Family.CALL_REL:
            assert first.code == iced_x86.Code.PUSHQ_IMM32, insn
            assert first.immediate(0) & (1 << 64) - 1 == insn.end, insn
            last = second
        case family:
            raise AssertionError(f"{insn} is a {family}")
    assert last.near_branch_target == original.near_branch_target, insn
    if last is not first or first.is_jcc_near:
        assert second.code == iced_x86.Code.JMP_REL32_64, insn
        assert first.len + second.len == len(code), insn


def _decode(code: bytes, addr: int) -> iced_x86.Instruction:
    return iced_x86.Decoder(64, code, ip=addr).decode()


def _assert_same(insn: Insn, original: iced_x86.Instruction, moved: iced_x86.Instruction) -> None:
    assert original.code != iced_x86.Code.INVALID, f"iced does not know {insn} [{insn.raw.hex(' ')}]"
    assert original.len == insn.length, insn
    for name in (*_FIELDS, *_REGISTERS[: original.op_count]):
        assert getattr(moved, name) == getattr(original, name), (insn, name)
    for index in range(original.op_count):
        assert moved.op_kind(index) == original.op_kind(index), (insn, index)
        if original.op_kind(index) in _IMMEDIATES:
            assert moved.immediate(index) == original.immediate(index), (insn, index)
    if original.is_ip_rel_memory_operand:
        assert moved.ip_rel_memory_address == original.ip_rel_memory_address, insn
    else:
        assert moved.memory_displacement == original.memory_displacement, insn
