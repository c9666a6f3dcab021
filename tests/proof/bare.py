"""A real QEMU at ring 0 as the machine: the bare-metal guest, single-stepped through its stub.

For what unicorn cannot execute, or only without meaning. Everything an instruction needs is set before each run: code,
registers, the x87 and vector state (by ``xrstor``), and an arena of memory in which its operands and its stack are.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Mapping
from typing import Final

from gdb_kprobe.model import GENERAL_REGISTERS, VirtAddr
from gdb_kprobe.target.rsp import RspSocket
from tests.proof.state import PAGE, State

# The guest maps its first GiB here (qemu/kprobe_guest/data/bare.S); it uses the first few MiB itself.
BASE: Final = 0xFFFF_FFFF_8000_0000
TEXT: Final = VirtAddr(BASE + 0x0800_0000)
SLOTS: Final = VirtAddr(BASE + 0x3000_0000)
ARENA: Final = VirtAddr(BASE + 0x1000_0000)
ARENA_SIZE: Final = 16 * PAGE
OPERAND: Final = VirtAddr(ARENA + 4 * PAGE)
_STACK: Final = ARENA + 12 * PAGE
_HELPER: Final = BASE + 0x0700_0000
_IMAGE: Final = BASE + 0x1100_0000

# The packet g (QEMU's gdb-xml/i386-64bit.xml): 16 registers, RIP, EFLAGS; 6 selectors; three bases, CR0, CR2, CR3, CR4,
# CR8, EFER; and more.
_ORDER: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)), "rip"
)  # fmt: skip
_GENERAL: Final = struct.Struct("<17QI")
_SYSTEM_END: Final = _GENERAL.size + 6 * 4 + 9 * 8
_SYSTEM: Final = struct.Struct("<6I9Q")
_SYSTEM_NAMES: Final = (
    "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"
)  # fmt: skip

_FSGSBASE_AND_PKE: Final = 1 << 16 | 1 << 22
_RF: Final = 1 << 16
_FLAGS: Final = 0xCD5
_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17))
_MOST_UNMOVED: Final = 8

# xsave's standard format: FCW, MXCSR, XMM, the header with XSTATE_BV, upper halves of YMM.
IMAGE_SIZE: Final = 832
_FCW, _MXCSR, _XMM, _HEADER, _YMM = 0, 24, 160, 512, 576
_LAST_X87 = slice(6, 24)  # opcode and addresses of the last x87 instruction: told in relocate's docstring
_ALL_STATE: Final = 7


class BareMachine:
    """A :class:`~tests.proof.state.Machine`.

    *rsp* is connected to the guest's stub, *ram* is its RAM, *symbols* those of its image. *State.extended* is an image
    of ``xsave``, *State.system* segment and control registers.
    """

    def __init__(self, rsp: RspSocket, ram: mmap.mmap, symbols: Mapping[str, int]) -> None:
        self._rsp = rsp
        self._ram = ram
        self._stubs = range(symbols["stubs"], symbols["exception"])
        self.bp_entry = symbols["bp_entry"]
        template = bytearray(bytes.fromhex(rsp.send(b"g").decode()))
        system = dict(zip(_SYSTEM_NAMES, _SYSTEM.unpack_from(template, _GENERAL.size), strict=True))
        system["cr4"] |= _FSGSBASE_AND_PKE
        _SYSTEM.pack_into(template, _GENERAL.size, *(system[name] for name in _SYSTEM_NAMES))
        self._template = bytes(template)
        self.system = system
        self.gdt_pointer = self._read(symbols["gdt_pointer"], 10)
        self.idt_pointer = self._read(symbols["idt_pointer"], 10)
        self._xrstor, self._xsave = _HELPER, _HELPER + 16
        self._put_code(self._xrstor, bytes.fromhex("480fae29"))  # xrstor64 [rcx]
        self._put_code(self._xsave, bytes.fromhex("480fae21"))  # xsave64 [rcx]

    def run(self, before: State, code: Mapping[int, bytes], start: int, most: int = 1) -> State:
        after = self.run_into(before, code, start, most)
        if self.is_exception_entry(after.registers["rip"]):
            self._take_exception_off(before, after)
        return after

    def is_exception_entry(self, addr: int) -> bool:
        """Whether *addr* is in the guest's stubs, which its interrupt descriptors point to."""
        return addr in self._stubs

    def vector(self, state: State) -> int:
        """The exception at whose entry *state* is."""
        return (state.registers["rip"] - self._stubs.start) // 16

    def run_into(self, before: State, code: Mapping[int, bytes], start: int, most: int = 1) -> State:
        """As :meth:`run`; but an exception stays as the processor has left it, its frame on the stack."""
        for addr, piece in code.items():
            self._put_code(addr, piece)
        for base in range(ARENA, ARENA + ARENA_SIZE, PAGE):
            self._write(base, before.page(base))
        if before.extended:
            self._write(_IMAGE, before.extended)
            self._help(self._xrstor)
        self._set({**before.registers, "rip": start})
        values, system, unmoved = {**before.registers, "rip": start}, b"", 0
        while most and unmoved < _MOST_UNMOVED:
            self._rsp.send(b"vCont;s:p1.1")
            previous, (values, system) = values, self._get()
            if values == previous:
                unmoved += 1  # a step that did not move, or an instruction that changes nothing
                continue
            most -= 1
            if not start <= values["rip"] < start + len(code[start]):
                break
        after = State(values, before.seed, system=system)
        if before.extended:
            self._write(_IMAGE, bytes(IMAGE_SIZE))
            self._help(self._xsave)
            image = bytearray(self._read(_IMAGE, IMAGE_SIZE))
            image[_LAST_X87] = bytes(_LAST_X87.stop - _LAST_X87.start)
            after.extended = bytes(image)
        for base in range(ARENA, ARENA + ARENA_SIZE, PAGE):
            after.pages[base] = self._read(base, PAGE)
        return after

    def _take_exception_off(self, before: State, after: State) -> None:
        """Make *after* the state that the exception interrupted, and take its frame from the stack."""
        vector = self.vector(after)
        frame = after.registers["rsp"]
        words = struct.unpack("<6Q", after.read(frame, 48))
        after.fault = f"exception {vector}"
        if vector in _WITH_ERROR_CODE:
            after.fault += f" with error code {words[0]:#x}"
            words = words[1:]
        rip, _, eflags, rsp = words[:4]
        after.registers.update(rip=rip, eflags=eflags & ~_RF, rsp=rsp)
        after.write(frame, before.read(frame, rsp - frame))

    def _help(self, at: int) -> None:
        registers = dict.fromkeys(GENERAL_REGISTERS, 0)
        registers.update(rax=_ALL_STATE, rcx=_IMAGE, rip=at, rsp=_STACK, eflags=2)
        self._set(registers)
        for _ in range(_MOST_UNMOVED):
            self._rsp.send(b"vCont;s:p1.1")
            if (rip := self._get()[0]["rip"]) != at:
                assert rip == at + 4, f"the helper at {at:#x} led to {rip:#x}"
                return
        raise AssertionError(f"the helper at {at:#x} is not executed")

    def _set(self, registers: Mapping[str, int]) -> None:
        packed = _GENERAL.pack(*(registers[name] for name in _ORDER), registers["eflags"])
        reply = self._rsp.send(b"G" + (packed + self._template[_GENERAL.size : _SYSTEM_END]).hex().encode())
        assert reply == b"OK", reply

    def _get(self) -> tuple[dict[str, int], bytes]:
        raw = bytes.fromhex(self._rsp.send(b"g").decode())
        values = dict(zip((*_ORDER, "eflags"), _GENERAL.unpack_from(raw), strict=True))
        return values, raw[_GENERAL.size : _SYSTEM_END]

    def _put_code(self, addr: int, code: bytes) -> None:
        # Through the stub: what QEMU has translated of it must go.
        if self._read(addr, len(code)) != code:
            assert self._rsp.send(f"M{addr:x},{len(code):x}:{code.hex()}".encode()) == b"OK"

    def _read(self, addr: int, size: int) -> bytes:
        return self._ram[addr - BASE : addr - BASE + size]

    def _write(self, addr: int, data: bytes) -> None:
        self._ram[addr - BASE : addr - BASE + len(data)] = data


def arena_state(rng: random.Random, *, extended: bool) -> State:
    """Random registers, with RSP, RSI and RDI in the arena, and a random but valid x87 and vector state."""
    registers = {name: rng.choice((rng.getrandbits(64), rng.getrandbits(16))) for name in GENERAL_REGISTERS}
    registers.update(
        rip=0,
        eflags=(rng.getrandbits(16) & _FLAGS & ~0x400) | 2,
        rsp=_STACK + rng.randrange(64) * 16,
        rsi=OPERAND - PAGE + rng.randrange(64) * 8,
        rdi=OPERAND - 2 * PAGE + rng.randrange(64) * 8,
    )
    return State(registers, rng.randrange(8), extended=random_image(rng) if extended else b"")


def random_image(rng: random.Random) -> bytes:
    """An image that ``xrstor`` takes: x87 empty, random vectors, exceptions masked."""
    image = bytearray(IMAGE_SIZE)
    struct.pack_into("<H", image, _FCW, 0x37F)
    struct.pack_into("<I", image, _MXCSR, 0x1F80)
    image[_XMM : _XMM + 256] = rng.randbytes(256)
    struct.pack_into("<Q", image, _HEADER, _ALL_STATE)
    image[_YMM : _YMM + 256] = rng.randbytes(256)
    return bytes(image)
