"""What a hit does, wherever it is: the programs of the site's probes, and the way to the host. Pure: bytes, no guest.

Each program has a verdict; the strongest of a site counts. A verdict is no value but a place in the code: where a
program says HOST, or STOP, which the host carries out as well, the rest of the programs is run in a second copy, which
leads to the host whatever they say::

    the programs                 -> (nothing was said)  go on
    the rest of the programs     -> (HOST was said)     ask

What asks the host has the machine's state put back as it was at the probe, but for one word on the stack::

    ask:     push answer
             jmp gate
             mov rax, the probed address, or 0                (never executed)
    answer:  count a miss
    go:      what the probe displaced
    gate:    nop                                             (the host's breakpoint is here)
             ret                                             (no host was there)

The host takes the word off the stack, shows the hit at the probe, and lets the guest go on at *go*. With no host there
the guest goes on by itself. The address in front of the answer is for who finds a vCPU at the gate and knows nothing of
the site: the hit is undone there, unless some of its programs have had their effects already (0). It is part of an
instruction so that who decodes the code comes out at the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gdb_kprobe.bpf.frame import Frame
from gdb_kprobe.kprobes.handler import Handler
from gdb_kprobe.model import VirtAddr, offset
from gdb_kprobe.x86.assemble import Assembler, Label, rel32


class Verdict(IntEnum):
    """What a program has in r0: what is to become of the hit."""

    CONTINUE = 0
    """The guest goes on."""
    HOST = 1
    """The host is to see the hit; then the guest goes on."""
    STOP = 2
    """The user is to get the prompt, with the machine as it is at the probe; all handlers are called before."""


@dataclass(frozen=True, slots=True)
class Ask:
    """How a hit is brought before the host.

    :ivar gate: where it stops.
    :ivar missed: the 64-bit word that counts the hits that no host was there for.
    :ivar undo: the probed address, where the hit may be taken back to; 0 if some of it has happened already.
    """

    gate: VirtAddr
    missed: VirtAddr
    undo: VirtAddr


@dataclass(frozen=True, slots=True)
class Action:
    """What a hit does in the guest.

    :ivar handlers: what runs, in this order.
    :ivar ask: the way to the host, where one of them may say HOST.
    :ivar always: the host is asked at each hit, and :attr:`handlers` do not run: it does what they would.
    """

    handlers: tuple[Handler, ...] = ()
    ask: Ask | None = None
    always: bool = False

    def __post_init__(self) -> None:
        decides = self.always or any(handler.decides for handler in self.handlers)
        assert decides is (self.ask is not None), "the way to the host is there exactly if it may be asked"


ASK_SIZE: Final = 20
"""Bytes from the ask to the answer."""
ASK_JUMP: Final = 15
"""Bytes from the ask's jump to the gate to the answer."""
UNDO_SIZE: Final = 8
"""Bytes of the address in front of the answer."""
MISS_SIZE: Final = 10
"""Bytes from the answer to where the guest goes on."""


def emit_programs(asm: Assembler, frame: Frame, handlers: Sequence[Handler]) -> list[Label]:
    """Emit *handlers*; what follows is where a hit goes that no one wants. The labels are for :func:`emit_rest`.

    :raises DisplacementError: what one refers to is out of reach.
    """
    said = [Label(f"handler {number} has said it") for number in range(len(handlers))]
    for handler, label in zip(handlers, said, strict=True):
        handler.emit(asm, frame, label)
    return said


def emit_rest(asm: Assembler, frame: Frame, handlers: Sequence[Handler], said: Sequence[Label]) -> None:
    """Emit what a hit runs after one of *handlers* has *said* that the host is to see it; that follows.

    :raises DisplacementError: what one refers to is out of reach.
    """
    begun = False
    for handler, label in zip(handlers, said, strict=True):
        if begun:
            again = Label("said again")
            handler.emit(asm, frame, again)
            asm.bind(again)
        if handler.decides:
            asm.bind(label)
            begun = True


def emit_ask(asm: Assembler, ask: Ask) -> VirtAddr:
    """Emit the way to the host; what follows is where the guest goes on. Returns the answer's address.

    :raises DisplacementError: the gate or the counter is out of reach.
    """
    answer = offset(asm.pc, ASK_SIZE)
    asm.push_imm32(answer)
    assert offset(asm.pc, ASK_JUMP) == answer
    asm.jmp_rel32(ask.gate)
    asm.raw(b"\x48\xb8" + ask.undo.to_bytes(UNDO_SIZE, "little"))  # mov rax, imm64
    assert asm.pc == answer
    asm.raw(b"\x9c")  # pushfq
    at = asm.pc
    asm.raw(b"\xf0\x48\xff\x05" + rel32("lock inc", at, offset(at, 8), ask.missed))  # lock inc qword ptr [rip+d]
    asm.raw(b"\x9d")  # popfq
    assert asm.pc == offset(answer, MISS_SIZE)
    return answer
