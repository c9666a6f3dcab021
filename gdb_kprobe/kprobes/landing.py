"""What may stand at a function's entry in front of all else: where indirect branches land. Pure.

With indirect branch tracking on, an indirect branch must come to an ``endbr64``, or the CPU raises #CP (Intel SDM
vol. 1, 17.3 "Indirect branch tracking"). So it is never replaced, whether or not this guest's CPU tracks; nor are the
forms that the kernel puts there in its place where it knows of no indirect branch (``apply_seal_endbr``,
``gen_endbr_poison``; the second one since Linux 6.15), and whose bytes it reads to know them (``is_endbr``). Its own
kprobes move behind it (``arch_adjust_kprobe_addr``).
"""

from __future__ import annotations

from typing import Final

from gdb_kprobe.model import Reason
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Unhandled

LANDING_PAD_SIZE: Final = 4

_PADS: Final = frozenset(
    bytes.fromhex(form)
    for form in (
        "f30f1efa",  # endbr64
        "f30f1efb",  # endbr32
        "660f1f00",  # sealed: nop word ptr [rax]
        "0f1f40d6",  # sealed: nop dword ptr [rax - 0x2a], the last byte of which is a udb
    )
)


def is_landing_pad(raw: bytes) -> bool:
    """Whether *raw*, an instruction, is a landing pad, or was one."""
    return raw in _PADS


def landing_pad_size(code: bytes) -> int:
    """Bytes of the landing pad that *code*, a function's text from its start, begins with; 0: it has none."""
    return LANDING_PAD_SIZE if code[:LANDING_PAD_SIZE] in _PADS else 0


def landing_pad(insn: Insn) -> Unhandled | None:
    """Why *insn* is never replaced, nor moved, if it is a landing pad."""
    if not is_landing_pad(insn.raw):
        return None
    return Unhandled(Reason.LANDING_PAD, f"{insn} [{insn.raw.hex(' ')}] stays; a probe on a function goes behind it")
