from __future__ import annotations

from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.system.idt import (
    Gate,
    Idt,
    SystemRegisters,
    decode_gate,
    find_breakpoint_handler,
    parse_registers,
    read_idt,
    read_registers,
)

LONG_MODE = """
RAX=000000000000000a RBX=ffffffff8cffc620 RCX=0000000000000000 RDX=00000000000003f8
RIP=ffffffff8b2c2260 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0
FS =0000 000000003953d3c0 00000000 00000000
GS =0000 ff46eaa15f200000 00000000 00000000
GDT=     fffffe0000001000 0000007f
IDT=     fffffe0000000000 00000fff
CR0=80050033 CR2=00000000005e22c0 CR3=000000000259a000 CR4=00751eb0
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000d01
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80
"""
USER_MODE = LONG_MODE.replace("CPL=0", "CPL=3").replace("HLT=0", "HLT=1").replace("259a000", "259b801")
REAL_MODE = """
EAX=00000000 EBX=00000000 ECX=00000000 EDX=00060fb1
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
GS =0000 00000000 0000ffff 00009300
GDT=     00000000 0000ffff
IDT=     00000000 000003ff
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000
EFER=0000000000000000
"""


def test_registers_of_a_vcpu_in_the_kernel() -> None:
    (found,) = parse_registers(LONG_MODE)
    assert found == SystemRegisters(
        index=0, cpl=0, halted=False, cr0=0x8005_0033, cr3=0x259_A000, cr4=0x75_1EB0, efer=0xD01,
        gs_base=0xFF46_EAA1_5F20_0000, idt_base=VirtAddr(0xFFFF_FE00_0000_0000), idt_limit=0xFFF,
    )  # fmt: skip
    assert found.is_long_mode


def test_all_vcpus_are_told_apart() -> None:
    text = f"\r\nCPU#0\r\n{LONG_MODE}\r\nCPU#3\r\n{USER_MODE}"
    first, second = parse_registers(text)
    assert (first.index, first.cpl, first.halted, first.cr3) == (0, 0, False, 0x259_A000)
    assert (second.index, second.cpl, second.halted, second.cr3) == (3, 3, True, 0x259_B801)


def test_registers_are_asked_of_all_vcpus() -> None:
    class Monitor:
        def monitor(self, command: str) -> str:
            return {"info registers -a": f"\nCPU#0\n{LONG_MODE}"}[command]

    assert [one.index for one in read_registers(Monitor())] == [0]


def test_machine_at_its_reset_vector_is_not_in_long_mode() -> None:
    (found,) = parse_registers(REAL_MODE)
    assert not found.is_long_mode
    assert (found.idt_base, found.idt_limit) == (0, 0x3FF)


def test_other_machines_registers_are_refused_by_the_first_field_missing() -> None:
    with pytest.raises(TargetError, match=r"shows no cpl for CPU 0\n.*only x86"):
        parse_registers("PC=0000000040000000 X00=0000000000000000")


def gate(vector: int, handler: int, *, ist: int = 0, kind: int = 0x8E) -> bytes:
    return (
        (handler & 0xFFFF).to_bytes(2, "little") + b"\x10\x00" + bytes([ist, kind])
        + (handler >> 16).to_bytes(6, "little") + bytes(4)
    )  # fmt: skip


def test_gate_fields() -> None:
    found = decode_gate(3, gate(3, 0xFFFF_FFFF_8B80_0BA0, ist=2, kind=0xEF))
    assert found == Gate(3, VirtAddr(0xFFFF_FFFF_8B80_0BA0), 0x10, 2, 3, True, True)
    assert not decode_gate(3, gate(3, 1, kind=0x6E)).present
    assert not decode_gate(3, gate(3, 1, kind=0x8E)).is_trap


def test_exceptions_with_an_error_code() -> None:
    with_code = {vector for vector in range(32) if decode_gate(vector, gate(vector, 1)).pushes_error_code}
    assert with_code == {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}


def test_table_is_read_as_far_as_its_limit(memory: Any) -> None:
    base = 0xFFFF_FE00_0000_0000
    memory.add(base, b"".join(gate(vector, 0x1000 + vector) for vector in range(256)))
    assert len(read_idt(memory, VirtAddr(base), 0xFFF).gates) == 256
    assert len(read_idt(memory, VirtAddr(base), 0x1FF).gates) == 32


def test_handlers_by_address_leave_out_what_is_not_present() -> None:
    gates = (decode_gate(0, gate(0, 0x10)), decode_gate(1, gate(1, 0x20, kind=0)), decode_gate(2, gate(2, 0x10)))
    found = Idt(gates).handlers()
    assert {addr: one.vector for addr, one in found.items()} == {0x10: 0}


def test_breakpoint_handler_is_gate_3(memory: Any) -> None:
    (registers,) = parse_registers(LONG_MODE)
    memory.add(registers.idt_base, b"".join(gate(vector, 0x1000 + vector) for vector in range(256)))
    assert find_breakpoint_handler(memory, registers) == 0x1003


def test_firmware_has_no_breakpoint_handler(memory: Any) -> None:
    (registers,) = parse_registers(REAL_MODE)
    with pytest.raises(GuestStateError, match=r"CPU 0 is not in 64-bit mode.*\n.*let it run"):
        find_breakpoint_handler(memory, registers)


def test_idt_that_is_not_mapped_is_said_to_be(memory: Any) -> None:
    (registers,) = parse_registers(LONG_MODE)
    with pytest.raises(GuestStateError, match=r"IDT of CPU 0 at 0xfffffe0000000000 cannot be read: .*\n.*booting"):
        find_breakpoint_handler(memory, registers)


def test_idt_that_is_not_final_yet_is_said_to_be(memory: Any) -> None:
    (registers,) = parse_registers(LONG_MODE)
    memory.add(registers.idt_base, bytes(0x1000))
    with pytest.raises(GuestStateError, match=r"no handler for #BP.*\n.*booting"):
        find_breakpoint_handler(memory, registers)
    with pytest.raises(GuestStateError, match="no handler for #BP"):
        Idt(()).breakpoint_handler()
