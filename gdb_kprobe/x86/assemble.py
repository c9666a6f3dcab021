"""Puts machine code together for an address where it does not lie yet.

The buffer and the program counter are apart: code for a guest address is composed here and shipped in one write. A
label is an identity, not a name; places that refer to it before it is bound are patched when it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import VirtAddr, offset

JMP_REL32_SIZE: Final = 5


class DisplacementError(KprobeError):
    """A displacement does not fit the signed field that the instruction has for it."""

    def __init__(self, what: str, at: VirtAddr, target: int) -> None:
        super().__init__(f"{what} at {at:#x} cannot reach {target & (1 << 64) - 1:#x}: more than 2 GiB away")
        self.at = at
        self.target = target


def fits_s32(value: int) -> bool:
    """Whether the processor's sign extension of 32 bits gives *value*, taken modulo 2**64."""
    return (value + 0x8000_0000) & 0xFFFF_FFFF_FFFF_FFFF < 0x1_0000_0000


def signed_distance(source: int, target: int) -> int:
    """What to add to *source* to come to *target*, modulo 2**64, as a signed number."""
    return ((target - source + (1 << 63)) & 0xFFFF_FFFF_FFFF_FFFF) - (1 << 63)


def rel32(what: str, at: VirtAddr, end: VirtAddr, target: VirtAddr) -> bytes:
    """The displacement field of an instruction at *at* that ends at *end* and refers to *target*.

    :raises DisplacementError: out of reach.
    """
    distance = signed_distance(end, target)
    if not fits_s32(distance):
        raise DisplacementError(what, at, target)
    return distance.to_bytes(4, "little", signed=True)


class Label:
    """A place in the code, compared by identity."""

    __slots__ = ("addr", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.addr: VirtAddr | None = None


@dataclass(frozen=True, slots=True)
class _FixUp:
    """A rel32 field at *position* in the buffer that waits for *label*."""

    position: int
    label: Label
    what: str
    insn_addr: VirtAddr


class Assembler:
    """Emits instructions one after another; each method is named after the instruction it emits."""

    def __init__(self, pc: VirtAddr) -> None:
        self._base = pc
        self._code = bytearray()
        self._fix_ups: list[_FixUp] = []

    @property
    def pc(self) -> VirtAddr:
        """The address that the next emitted byte will have."""
        return offset(self._base, len(self._code))

    def finish(self) -> bytes:
        """Return the code; every label that was used must be bound by now."""
        assert not self._fix_ups, f"label {self._fix_ups[0].label.name} was never bound"
        return bytes(self._code)

    def bind(self, label: Label) -> None:
        """*label* is here.

        :raises DisplacementError: an instruction emitted before cannot reach this place.
        """
        assert label.addr is None, f"label {label.name} is bound twice"
        label.addr = self.pc
        for fix_up in [f for f in self._fix_ups if f.label is label]:
            at = fix_up.position
            self._code[at : at + 4] = rel32(fix_up.what, fix_up.insn_addr, offset(self._base, at + 4), label.addr)
            self._fix_ups.remove(fix_up)

    def raw(self, code: bytes) -> None:
        """Bytes that other code composed for this address."""
        self._code += code

    def _rel32_insn(self, what: str, opcode: bytes, target: VirtAddr | Label) -> None:
        at = self.pc
        self._code += opcode
        end = offset(self.pc, 4)
        if isinstance(target, Label):
            if target.addr is None:
                self._fix_ups.append(_FixUp(len(self._code), target, what, at))
                self._code += bytes(4)
                return
            target = target.addr
        self._code += rel32(what, at, end, target)

    def jmp_rel32(self, target: VirtAddr | Label) -> None:
        self._rel32_insn("jmp", b"\xe9", target)  # jmp rel32

    def jcc_rel32(self, condition: int, target: VirtAddr | Label) -> None:
        """*condition* is the condition code 0-15."""
        assert 0 <= condition <= 15
        self._rel32_insn("jcc", bytes((0x0F, 0x80 | condition)), target)  # jcc rel32

    def call_rel32(self, target: VirtAddr | Label) -> None:
        self._rel32_insn("call", b"\xe8", target)  # call rel32

    def push_imm32(self, value: int) -> None:
        """*value* is what the 8 bytes on the stack will hold, and must be a sign-extended 32-bit number."""
        assert fits_s32(value), f"{value:#x} is not a sign-extended 32-bit number"
        self._code += b"\x68" + _low32(value)  # push imm32

    def push_imm64(self, value: int) -> None:
        """Push any 8 bytes without a register and without touching the flags."""
        if fits_s32(value):
            self.push_imm32(value)
            return
        low = value & 0xFFFF_FFFF
        self.push_imm32(low if low < 0x8000_0000 else low - 0x1_0000_0000)
        self._code += b"\xc7\x44\x24\x04" + _low32(value >> 32)  # mov dword ptr [rsp+4], imm32

    def store_qword_at_rsp(self, displacement: int, value: int) -> None:
        """Store *value* to ``[rsp + displacement]`` without a register and without touching the flags."""
        assert 0 <= displacement <= 0x78
        if fits_s32(value):
            self._code += bytes((0x48, 0xC7, 0x44, 0x24, displacement)) + _low32(value)  # mov qword ptr [rsp+d], imm32
            return
        self._code += bytes((0xC7, 0x44, 0x24, displacement)) + _low32(value)  # mov dword ptr [rsp+d], imm32
        self._code += bytes((0xC7, 0x44, 0x24, displacement + 4)) + _low32(value >> 32)  # the same, upper half

    def push_stack_top(self) -> None:
        self._code += b"\xff\x34\x24"  # push qword ptr [rsp]

    def ret(self) -> None:
        self._code += b"\xc3"  # ret

    def int3(self) -> None:
        self._code += b"\xcc"  # int3

    def ud2(self) -> None:
        self._code += b"\x0f\x0b"  # ud2


def _low32(value: int) -> bytes:
    return (value & 0xFFFF_FFFF).to_bytes(4, "little")
