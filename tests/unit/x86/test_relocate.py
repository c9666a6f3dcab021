"""Golden listings: what stands in the slot for one instruction of each kind. The text is the disassembler's."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import Reason, VirtAddr, offset
from gdb_kprobe.x86.decode import Insn, decode, iter_insns
from gdb_kprobe.x86.relocate import RelocateError, copy_for_step, relocate, relocated_size, step_copy_size

ADDR = VirtAddr(0xFFFF_FFFF_8123_4567)
SLOT = VirtAddr(0xFFFF_FFFF_C0FF_E000)
LOW = VirtAddr(0x10_0000)
LOW_SLOT = VirtAddr(0x20_0000)
USER_HALF = VirtAddr(0x7FFF_1234_5678)  # needs more than an imm32


def listing(code: bytes, addr: VirtAddr) -> str:
    lines = [f"{insn.addr - addr:04x}  {insn.raw.hex(' '):<26}  {insn}" for insn in iter_insns(code, addr)]
    return "\n".join(lines)


def insn(text: str, addr: VirtAddr = ADDR) -> Insn:
    return decode(bytes.fromhex(text), addr)


# fmt: off
BOOSTED = {
    "fentry_nop": (  # nop dword ptr [rax + rax]
        "0f 1f 44 00 00", ADDR, SLOT,
        "0000  0f 1f 44 00 00              nop dword ptr [rax + rax]\n"
        "0005  e9 62 65 23 c0              jmp 0xffffffff8123456c",
    ),
    "endbr64": (  # endbr64
        "f3 0f 1e fa", ADDR, SLOT,
        "0000  f3 0f 1e fa                 endbr64\n"
        "0004  e9 62 65 23 c0              jmp 0xffffffff8123456b",
    ),
    "push": (  # push r15
        "41 57", ADDR, SLOT,
        "0000  41 57                       push r15\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569",
    ),
    "locked_rip_relative": (  # lock inc qword ptr [rip + 0x10]
        "f0 48 ff 05 10 00 00 00", ADDR, SLOT,
        "0000  f0 48 ff 05 77 65 23 c0     lock inc qword ptr [rip - 0x3fdc9a89]\n"
        "0008  e9 62 65 23 c0              jmp 0xffffffff8123456f",
    ),
    "evex_rip_relative": (  # vmovups zmm0, zmmword ptr [rip + 0x10]
        "62 f1 7c 48 10 05 10 00 00 00", ADDR, SLOT,
        "0000  62 f1 7c 48 10 05 77 65 23 c0  vmovups zmm0, zmmword ptr [rip - 0x3fdc9a89]\n"
        "000a  e9 62 65 23 c0              jmp 0xffffffff81234571",
    ),
    "rep_movsb": (  # rep movsb byte ptr [rdi], byte ptr [rsi]
        "f3 a4", ADDR, SLOT,
        "0000  f3 a4                       rep movsb byte ptr [rdi], byte ptr [rsi]\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569",
    ),
    "mov_from_stack": (  # mov rax, qword ptr [rsp + 0x10]
        "48 8b 44 24 10", ADDR, SLOT,
        "0000  48 8b 44 24 10              mov rax, qword ptr [rsp + 0x10]\n"
        "0005  e9 62 65 23 c0              jmp 0xffffffff8123456c",
    ),
    "rip_relative_load": (  # mov rax, qword ptr [rip + 0x10]
        "48 8b 05 10 00 00 00", ADDR, SLOT,
        "0000  48 8b 05 77 65 23 c0        mov rax, qword ptr [rip - 0x3fdc9a89]\n"
        "0007  e9 62 65 23 c0              jmp 0xffffffff8123456e",
    ),
    "rip_relative_with_immediate": (  # mov dword ptr [rip - 0x10], 1
        "c7 05 f0 ff ff ff 01 00 00 00", ADDR, SLOT,
        "0000  c7 05 57 65 23 c0 01 00 00 00  mov dword ptr [rip - 0x3fdc9aa9], 1\n"
        "000a  e9 62 65 23 c0              jmp 0xffffffff81234571",
    ),
    "jcc_rel8_backwards": (  # jne 0xffffffff81234559
        "75 f0", ADDR, SLOT,
        "0000  0f 85 53 65 23 c0           jne 0xffffffff81234559\n"
        "0006  e9 5e 65 23 c0              jmp 0xffffffff81234569",
    ),
    "jcc_rel32": (  # jg 0xffffffff8123466d
        "0f 8f 00 01 00 00", ADDR, SLOT,
        "0000  0f 8f 67 66 23 c0           jg 0xffffffff8123466d\n"
        "0006  e9 62 65 23 c0              jmp 0xffffffff8123456d",
    ),
    "jcc_with_branch_hint": (  # je 0xffffffff8123455a
        "2e 74 f0", ADDR, SLOT,
        "0000  0f 84 54 65 23 c0           je 0xffffffff8123455a\n"
        "0006  e9 5f 65 23 c0              jmp 0xffffffff8123456a",
    ),
    "jmp_rel8_backwards": (  # jmp 0xffffffff81234559
        "eb f0", ADDR, SLOT,
        "0000  e9 54 65 23 c0              jmp 0xffffffff81234559",
    ),
    "jmp_rel32": (  # jmp 0xffffffff8123466c
        "e9 00 01 00 00", ADDR, SLOT,
        "0000  e9 67 66 23 c0              jmp 0xffffffff8123466c",
    ),
    "jmp_onto_itself": (  # jmp 0xffffffff81234567
        "eb fe", ADDR, SLOT,
        "0000  e9 62 65 23 c0              jmp 0xffffffff81234567",
    ),
    "call": (  # call 0xffffffff8123455c
        "e8 f0 ff ff ff", ADDR, SLOT,
        "0000  68 6c 45 23 81              push -0x7edcba94\n"
        "0005  e9 52 65 23 c0              jmp 0xffffffff8123455c",
    ),
    "call_with_cs_prefix_returns_after_six_bytes": (  # call 0xffffffff8123455d
        "2e e8 f0 ff ff ff", ADDR, SLOT,
        "0000  68 6d 45 23 81              push -0x7edcba93\n"
        "0005  e9 53 65 23 c0              jmp 0xffffffff8123455d",
    ),
    "call_in_low_memory": (  # call 0xffff5
        "e8 f0 ff ff ff", LOW, LOW_SLOT,
        "0000  68 05 00 10 00              push 0x100005\n"
        "0005  e9 eb ff ef ff              jmp 0xffff5",
    ),
    "call_beyond_imm32": (  # call 0x7fff1234566d
        "e8 f0 ff ff ff", USER_HALF, offset(USER_HALF, 0x10000),
        "0000  68 7d 56 34 12              push 0x1234567d\n"
        "0005  c7 44 24 04 ff 7f 00 00     mov dword ptr [rsp + 4], 0x7fff\n"
        "000d  e9 e3 ff fe ff              jmp 0x7fff1234566d",
    ),
    "call_register": (  # call rax
        "ff d0", ADDR, SLOT,
        "0000  68 69 45 23 81              push -0x7edcba97\n"
        "0005  ff e0                       jmp rax",
    ),
    "call_r11_with_cs_prefix": (  # call r11
        "2e 41 ff d3", ADDR, SLOT,
        "0000  68 6b 45 23 81              push -0x7edcba95\n"
        "0005  2e 41 ff e3                 jmp r11",
    ),
    "call_rsp": (  # call rsp
        "ff d4", ADDR, SLOT,
        "0000  ff f4                       push rsp\n"
        "0002  ff 34 24                    push qword ptr [rsp]\n"
        "0005  48 c7 44 24 08 69 45 23 81  mov qword ptr [rsp + 8], 0xffffffff81234569\n"
        "000e  c3                          ret",
    ),
    "call_stack_operand": (  # call qword ptr [rsp + 8]
        "ff 54 24 08", ADDR, SLOT,
        "0000  ff 74 24 08                 push qword ptr [rsp + 8]\n"
        "0004  ff 34 24                    push qword ptr [rsp]\n"
        "0007  48 c7 44 24 08 6b 45 23 81  mov qword ptr [rsp + 8], 0xffffffff8123456b\n"
        "0010  c3                          ret",
    ),
    "call_rip_relative": (  # call qword ptr [rip + 0x10]
        "ff 15 10 00 00 00", ADDR, SLOT,
        "0000  ff 35 77 65 23 c0           push qword ptr [rip - 0x3fdc9a89]\n"
        "0006  ff 34 24                    push qword ptr [rsp]\n"
        "0009  48 c7 44 24 08 6d 45 23 81  mov qword ptr [rsp + 8], 0xffffffff8123456d\n"
        "0012  c3                          ret",
    ),
    "call_gs_absolute": (  # call qword ptr gs:[0x10]
        "65 ff 14 25 10 00 00 00", ADDR, SLOT,
        "0000  65 ff 34 25 10 00 00 00     push qword ptr gs:[0x10]\n"
        "0008  ff 34 24                    push qword ptr [rsp]\n"
        "000b  48 c7 44 24 08 6f 45 23 81  mov qword ptr [rsp + 8], 0xffffffff8123456f\n"
        "0014  c3                          ret",
    ),
    "call_memory_beyond_imm32": (  # call qword ptr [rax + 8]
        "ff 50 08", USER_HALF, offset(USER_HALF, 0x10000),
        "0000  ff 70 08                    push qword ptr [rax + 8]\n"
        "0003  ff 34 24                    push qword ptr [rsp]\n"
        "0006  c7 44 24 08 7b 56 34 12     mov dword ptr [rsp + 8], 0x1234567b\n"
        "000e  c7 44 24 0c ff 7f 00 00     mov dword ptr [rsp + 0xc], 0x7fff\n"
        "0016  c3                          ret",
    ),
    "jmp_register": (  # jmp rax
        "ff e0", ADDR, SLOT,
        "0000  ff e0                       jmp rax",
    ),
    "jmp_table": (  # jmp qword ptr [rax*8 - 0x7f000000]
        "ff 24 c5 00 00 00 81", ADDR, SLOT,
        "0000  ff 24 c5 00 00 00 81        jmp qword ptr [rax*8 - 0x7f000000]",
    ),
    "jmp_rip_relative": (  # jmp qword ptr [rip + 0x10]
        "ff 25 10 00 00 00", ADDR, SLOT,
        "0000  ff 25 77 65 23 c0           jmp qword ptr [rip - 0x3fdc9a89]",
    ),
    "ret": (  # ret
        "c3", ADDR, SLOT,
        "0000  c3                          ret",
    ),
    "ret_imm16": (  # ret 8
        "c2 08 00", ADDR, SLOT,
        "0000  c2 08 00                    ret 8",
    ),
    "repz_ret": (  # repz ret
        "f3 c3", ADDR, SLOT,
        "0000  f3 c3                       repz ret",
    ),
    "loop_backwards": (  # loop 0xffffffff81234559
        "e2 f0", ADDR, SLOT,
        "0000  e2 05                       loop 0xffffffffc0ffe007\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569\n"
        "0007  e9 4d 65 23 c0              jmp 0xffffffff81234559",
    ),
    "jecxz": (  # jecxz 0xffffffff8123457a
        "67 e3 10", ADDR, SLOT,
        "0000  67 e3 05                    jecxz 0xffffffffc0ffe008\n"
        "0003  e9 62 65 23 c0              jmp 0xffffffff8123456a\n"
        "0008  e9 6d 65 23 c0              jmp 0xffffffff8123457a",
    ),
    "loop_onto_itself": (  # loop 0xffffffff81234567
        "e2 fe", ADDR, SLOT,
        "0000  e2 05                       loop 0xffffffffc0ffe007\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569\n"
        "0007  e9 5b 65 23 c0              jmp 0xffffffff81234567",
    ),
}
# fmt: on


@pytest.mark.parametrize(("name", "text", "addr", "slot", "expected"), [(n, *case) for n, case in BOOSTED.items()])
def test_boosted_slot_reads(name: str, text: str, addr: VirtAddr, slot: VirtAddr, expected: str) -> None:
    original = insn(text, addr)
    code = relocate(original, slot)
    assert listing(code, slot) == expected
    assert len(code) == relocated_size(original)


# fmt: off
STEPPED = {
    "plain": ("41 57", 2, {SLOT + 2: ADDR + 2, ADDR + 2: ADDR + 2},
        "0000  41 57                       push r15\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569"),
    "jcc_rel8_backward": ("75 f0", 6, {SLOT + 6: ADDR + 2, ADDR - 14: ADDR - 14},
        "0000  0f 85 53 65 23 c0           jne 0xffffffff81234559\n"
        "0006  e9 5e 65 23 c0              jmp 0xffffffff81234569"),
    "jmp_rel8": ("eb 10", 5, {ADDR + 0x12: ADDR + 0x12},
        "0000  e9 74 65 23 c0              jmp 0xffffffff81234579"),
    "jmp_to_itself": ("eb fe", 5, {ADDR: ADDR},
        "0000  e9 62 65 23 c0              jmp 0xffffffff81234567"),
    "call": ("e8 10 00 00 00", 5, {ADDR + 0x15: ADDR + 0x15},
        "0000  e8 77 65 23 c0              call 0xffffffff8123457c\n"
        "0005  e9 62 65 23 c0              jmp 0xffffffff8123456c"),
    "call_with_a_prefix": ("2e e8 10 00 00 00", 5, {ADDR + 0x16: ADDR + 0x16},
        "0000  e8 78 65 23 c0              call 0xffffffff8123457d\n"
        "0005  e9 63 65 23 c0              jmp 0xffffffff8123456d"),
    "call_memory_on_the_stack": ("ff 54 24 08", 4, {},
        "0000  ff 54 24 08                 call qword ptr [rsp + 8]\n"
        "0004  e9 62 65 23 c0              jmp 0xffffffff8123456b"),
    "call_register": ("ff d0", 2, {},
        "0000  ff d0                       call rax\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569"),
    "jmp_register": ("ff e0", 2, {},
        "0000  ff e0                       jmp rax"),
    "ret": ("c3", 1, {},
        "0000  c3                          ret"),
    "loop_backward": ("e2 f0", 2, {SLOT + 2: ADDR + 2, SLOT + 7: ADDR - 14},
        "0000  e2 05                       loop 0xffffffffc0ffe007\n"
        "0002  e9 62 65 23 c0              jmp 0xffffffff81234569\n"
        "0007  e9 4d 65 23 c0              jmp 0xffffffff81234559"),
}
# fmt: on


@pytest.mark.parametrize(("text", "length", "ends", "expected"), STEPPED.values(), ids=STEPPED)
def test_slot_of_a_stepped_copy_reads(text: str, length: int, ends: dict[int, int], expected: str) -> None:
    original = insn(text)
    copy = copy_for_step(original, SLOT)
    assert listing(copy.code, SLOT) == expected
    assert (copy.insn, copy.slot, copy.length, dict(copy.ends)) == (original, SLOT, length, ends)
    assert copy.behind == SLOT + length
    assert len(copy.code) == step_copy_size(original)


def test_where_a_step_ends_says_where_the_original_ends() -> None:
    copy = copy_for_step(insn("e2 f0"), SLOT)
    assert [copy.original_end(rip) for rip in (SLOT, SLOT + 2, SLOT + 7, ADDR)] == [None, ADDR + 2, ADDR - 14, None]


@pytest.mark.parametrize(
    "text", ["48 8b 05 10 00 00 00", "c7 05 10 00 00 00 01 00 00 00", "ff 15 10 00 00 00", "ff 25 10 00 00 00"]
)
def test_stepped_copy_keeps_its_rip_relative_operand(text: str) -> None:
    original = insn(text)
    copy = decode(copy_for_step(original, SLOT).code, SLOT)
    assert copy.rip_target == original.rip_target
    assert (copy.mnemonic, copy.length, copy.immediate) == (original.mnemonic, original.length, original.immediate)


def test_displacement_reaches_exactly_2_gib() -> None:
    jump = insn("ff 25 00 00 00 00", LOW)
    operand = jump.end
    assert decode(copy_for_step(jump, VirtAddr(operand - 6 + 0x8000_0000)).code, LOW).displacement == -0x8000_0000
    with pytest.raises(RelocateError) as caught:
        copy_for_step(jump, VirtAddr(operand - 6 + 0x8000_0001))
    assert caught.value.reason is Reason.OUT_OF_REACH


@pytest.mark.parametrize("text", ["90", "48 8b 05 00 00 00 00", "75 f0", "eb f0", "e8 f0 ff ff ff", "e2 f0", "55"])
def test_slot_out_of_reach_is_refused_with_both_addresses(text: str) -> None:
    far = offset(ADDR, -0x9000_0000)
    for act in (relocate, copy_for_step):
        with pytest.raises(RelocateError, match="cannot reach") as caught:
            act(insn(text), far)
        assert caught.value.reason is Reason.OUT_OF_REACH
        assert f"{ADDR:#x}" in str(caught.value)


@pytest.mark.parametrize("text", ["ff d0", "ff 10", "ff e0", "c3"])
def test_indirect_transfers_reach_from_anywhere(text: str) -> None:
    assert relocate(insn(text), offset(ADDR, -0x9000_0000))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("48 cf", Reason.FAR_TRANSFER),
        ("cd 80", Reason.SOFTWARE_INTERRUPT),
        ("0f 0b", Reason.RAISES_UD),
        ("c7 f8 00 00 00 00", Reason.TRANSACTION),
        ("66 ff d0", Reason.OPERAND_SIZE_BRANCH),
    ],
)
def test_what_no_family_takes_is_never_copied(text: str, reason: Reason) -> None:
    for act in (relocated_size, step_copy_size, lambda i: relocate(i, SLOT), lambda i: copy_for_step(i, SLOT)):
        with pytest.raises(RelocateError) as caught:
            act(insn(text))
        assert caught.value.reason is reason
        assert insn(text).mnemonic in caught.value.detail


@pytest.mark.parametrize(("text", "nop"), [("f3 90", "66 90"), ("2e f3 90", "2e 66 90"), ("f3 48 90", "66 48 90")])
def test_pause_is_stepped_as_a_nop(text: str, nop: str) -> None:
    assert copy_for_step(insn(text), SLOT).code.hex(" ").startswith(f"{nop} e9")
    assert relocate(insn(text), SLOT).startswith(bytes.fromhex(text))


@pytest.mark.parametrize("text", ["f4", "0f 01 c9", "0f 01 fb"])
def test_what_halts_is_moved_but_not_stepped(text: str) -> None:
    assert relocate(insn(text), SLOT).startswith(bytes.fromhex(text))
    with pytest.raises(RelocateError) as caught:
        copy_for_step(insn(text), SLOT)
    assert caught.value.reason is Reason.HALTS


def test_eip_relative_operand_reaches_from_anywhere() -> None:
    load = insn("67 8b 05 10 00 00 00")
    for slot in (SLOT, offset(ADDR, -0x4000_0000), offset(ADDR, 0x7000_0000)):
        copy = copy_for_step(load, slot)
        assert copy.length == 7
        assert decode(copy.code, slot).rip_target == load.rip_target == 0x8123_457E
