"""The code that handles an int3 inside the guest, and the table it looks addresses up in. Pure: bytes, no guest.

``asm_exc_int3`` calls the dispatcher in place of ``exc_int3``, with a ``struct pt_regs *`` in RDI::

    dispatcher:  from user mode, or not in the table?        -> jmp exc_int3
                 jmp to the site's handler
    handler:     its programs; regs->ip = slot; ret
                 the rest of the programs; regs->ip = ask; ret  (one has said that the host is to see the hit)
    ask:         as in a detour: in the interrupted context     (gdb_kprobe.kprobes.action)
    retired:     an int3 is there now?                       -> jmp exc_int3   (it is the guest's own)
                 regs->ip -= 1; ret                             (ours was removed meanwhile: take the original)

So the host sees the same, whether a hit comes from an int3 or from a jump, and has the same to do.

The dispatcher's jump to a handler is the one indirect branch, so that each of its targets, the handlers and
``retired``, begins with ``endbr64`` (left out above): with indirect branch tracking (CR4.CET, IA32_S_CET) anything else
there would be a #CP.

All of it runs before the kernel has entered its NMI-like context, so it calls nothing; interrupts are off. It is a C
function to its caller: it keeps RBX, RBP, RSP and R12-R15.

The table is open addressing with linear probing over a power of two of entries, each the probed address and the
handler's. Address 0 is an entry that was never used. An address is never taken out while the machine may run: its
handler becomes ``retired``, for a vCPU may have executed the int3 before it was removed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.bpf.frame import InHandler
from gdb_kprobe.kprobes.action import Action, emit_ask, emit_programs, emit_rest
from gdb_kprobe.linux.pt_regs import OFFSETS
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.assemble import Assembler, Label, rel32

ENTRY: Final = struct.Struct("<QQ")
"""One entry of the table: probed address, handler's address."""

ENDBR64: Final = b"\xf3\x0f\x1e\xfa"
"""What an indirect branch may lead to."""

PAGE_BITS: Final = 12
_MULTIPLIER: Final = 0x9E3779B1  # 2**32 / golden ratio, odd: Knuth's multiplicative hashing
_Z, _NZ = 4, 5
_IP = OFFSETS["rip"].to_bytes(4, "little")
_CS = OFFSETS["cs"].to_bytes(4, "little")


def table_word(table: VirtAddr, bits: int) -> int:
    """What the dispatcher reads to know its *table*, of 2**bits entries, on a page of its own: both at once.

    So a table can be exchanged while a vCPU is searching: it goes on in the one that it has begun with.
    """
    assert 1 <= bits <= 31
    assert not table & (1 << PAGE_BITS) - 1
    return table | 32 - bits


def table_index(addr: int, bits: int) -> int:
    """Where the search for *addr* begins in a table of 2**bits entries."""
    return (addr & 0xFFFF_FFFF) * _MULTIPLIER % (1 << 32) >> (32 - bits)


@dataclass(frozen=True, slots=True)
class GateCode:
    """Where hits stop for the host; the breakpoint goes on :attr:`gate`."""

    gate: VirtAddr
    retired: VirtAddr
    code: bytes


def emit_gate(at: VirtAddr, forward: VirtAddr) -> GateCode:
    """The gate and what follows when there is no breakpoint on it, for the address *at*.

    :raises DisplacementError: *forward*, the guest's own handler, is out of reach.
    """
    asm = Assembler(at)
    asm.raw(b"\x90")  # nop
    asm.ret()
    retired = asm.pc
    asm.raw(ENDBR64)
    asm.raw(b"\x48\x8b\x87" + _IP)  # mov rax, [rdi+ip]
    asm.raw(b"\x80\x78\xff\xcc")  # cmp byte ptr [rax-1], int3
    asm.jcc_rel32(_Z, forward)
    asm.raw(b"\x48\xff\x8f" + _IP)  # dec qword ptr [rdi+ip]
    asm.ret()
    return GateCode(at, retired, asm.finish())


def emit_dispatcher(at: VirtAddr, cell: VirtAddr, forward: VirtAddr) -> bytes:
    """The dispatcher for the address *at*; what is not in the table that *cell* names goes on to *forward*.

    :param cell: where the :func:`table_word` is.
    :raises DisplacementError: one of them is out of reach.
    """
    asm = Assembler(at)
    away, found, search = Label("forward"), Label("found"), Label("search")
    asm.raw(b"\xf6\x87" + _CS + b"\x03")  # test byte ptr [rdi+cs], 3
    asm.jcc_rel32(_NZ, away)
    asm.raw(b"\x48\x8b\x87" + _IP)  # mov rax, [rdi+ip]
    asm.raw(b"\x48\xff\xc8")  # dec rax
    here = asm.pc
    asm.raw(b"\x48\x8b\x15" + rel32("mov", here, offset(here, 7), cell))  # mov rdx, [rip+cell]
    asm.raw(b"\x89\xd1")  # mov ecx, edx; a shift takes the low five bits of it: 32 - bits
    asm.raw(b"\x48\x81\xe2" + (-(1 << PAGE_BITS)).to_bytes(4, "little", signed=True))  # and rdx, -4096
    asm.raw(b"\x44\x69\xd0" + _MULTIPLIER.to_bytes(4, "little"))  # imul r10d, eax, multiplier
    asm.raw(b"\x41\xd3\xea")  # shr r10d, cl
    asm.raw(b"\x41\x83\xcb\xff")  # or r11d, -1
    asm.raw(b"\x41\xd3\xeb")  # shr r11d, cl
    asm.bind(search)
    asm.raw(b"\x4d\x89\xd0")  # mov r8, r10
    asm.raw(b"\x49\xc1\xe0\x04")  # shl r8, 4
    asm.raw(b"\x49\x01\xd0")  # add r8, rdx
    asm.raw(b"\x4d\x8b\x08")  # mov r9, [r8]
    asm.raw(b"\x4c\x39\xc8")  # cmp rax, r9
    asm.jcc_rel32(_Z, found)
    asm.raw(b"\x4d\x85\xc9")  # test r9, r9
    asm.jcc_rel32(_Z, away)
    asm.raw(b"\x41\xff\xc2")  # inc r10d
    asm.raw(b"\x45\x21\xda")  # and r10d, r11d
    asm.jmp_rel32(search)
    asm.bind(found)
    asm.raw(b"\x41\xff\x60\x08")  # jmp [r8+8]
    asm.bind(away)
    asm.jmp_rel32(forward)
    return asm.finish()


@dataclass(frozen=True, slots=True)
class HandlerCode:
    """What handles the hits of a site.

    :ivar entry: where the dispatcher jumps to.
    :ivar answer: what the guest goes on with when the host does not answer; ``None``: the host is never asked.
    """

    code: bytes
    entry: VirtAddr
    answer: VirtAddr | None


def emit_handler(
    at: VirtAddr, action: Action, addr: VirtAddr, slot: VirtAddr, copy: Callable[[VirtAddr], bytes] | None = None
) -> HandlerCode:
    """What does *action* for a hit at the probed *addr*, and goes on in *slot*. The ask comes first, if there is one.

    :param copy: makes what the guest goes on with in place of what is in *slot*, which the host steps.
    :raises DisplacementError: something that it refers to is out of reach.
    """
    asm = Assembler(at)
    answer, goes_on = None, slot
    if action.ask is not None:
        answer = emit_ask(asm, action.ask)
        if copy is None:
            asm.jmp_rel32(slot)
        else:
            goes_on = asm.pc
            asm.raw(copy(goes_on))
    entry = asm.pc
    asm.raw(ENDBR64)
    frame = InHandler(addr)
    said = []
    if not action.always:
        said = emit_programs(asm, frame, action.handlers)
        _go_on(asm, goes_on)
    if action.ask is not None:
        if not action.always:
            emit_rest(asm, frame, action.handlers, said)
        _go_on(asm, at)
    return HandlerCode(asm.finish(), entry, answer)


def _go_on(asm: Assembler, at: VirtAddr) -> None:
    """Have the interrupted code go on *at*."""
    _lea(asm, 0, at)
    asm.raw(b"\x48\x89\x87" + _IP)  # mov [rdi+ip], rax
    asm.ret()


def _lea(asm: Assembler, register: int, target: VirtAddr) -> None:
    at = asm.pc
    asm.raw(bytes((0x48, 0x8D, 0x05 | register << 3)) + rel32("lea", at, offset(at, 7), target))
