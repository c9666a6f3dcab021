"""Golden listings of displaced windows. The text is the disassembler's."""

from __future__ import annotations

import pytest

from gdb_kprobe.model import Reason, VirtAddr, offset
from gdb_kprobe.x86.decode import iter_insns
from gdb_kprobe.x86.detour import displaced, displaced_size
from gdb_kprobe.x86.relocate import RelocateError

ADDR = VirtAddr(0xFFFF_FFFF_8100_0000)
SLOT = VirtAddr(0xFFFF_FFFF_C000_0000)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("55 4889e5 53", ["push rbp", "mov rbp, rsp", "push rbx", "jmp 0xffffffff81000005"]),
        ("55 7402 4889e5", ["push rbp", "je 0xffffffff81000005", "mov rbp, rsp", "jmp 0xffffffff81000006"]),
        (  # the return address is behind the jump: it is the original one
            "55 e800000000", ["push rbp", "push -0x7efffffa", "jmp 0xffffffff81000006"],
        ),
        ("ffd0 0f1f00", ["push -0x7efffffb", "jmp rax"]),  # call rax; nop3: returns to the window's end
        ("488b0500100000", ["mov rax, qword ptr [rip - 0x3efff000]", "jmp 0xffffffff81000007"]),
        ("5b c3 cccccc", ["pop rbx", "ret"]),
        ("5b ebfd 9090", ["pop rbx", "jmp 0xffffffff81000000"]),
        (
            "55 e2f0 5b 5d",
            ["push rbp", "loop 0xffffffffc0000008", "jmp 0xffffffffc000000d", "jmp 0xffffffff80fffff3", "pop rbx",
             "pop rbp", "jmp 0xffffffff81000005"],
        ),
    ],
)  # fmt: skip
def test_displaced(code: str, expected: list[str]) -> None:
    raw = bytes.fromhex(code)
    insns = list(iter_insns(raw, ADDR))
    found = displaced(insns, SLOT, offset(ADDR, len(raw)), offset(ADDR, 5))
    assert [str(insn) for insn in iter_insns(found.code, SLOT)] == expected
    assert len(found.code) <= displaced_size([insn for insn in insns if insn.raw != b"\xcc"])


def test_out_of_reach_is_refused() -> None:
    insns = list(iter_insns(bytes.fromhex("55 4889e5 53"), ADDR))
    with pytest.raises(RelocateError) as caught:
        displaced(insns, VirtAddr(0x1000_0000), offset(ADDR, 5), offset(ADDR, 5))
    assert caught.value.reason is Reason.OUT_OF_REACH
