"""The distinct forms of the instructions of a text, each with one instruction that stands for it.

Two instructions are of one form when they have the same prefixes (REX: whether there is one, and its W), opcode, class
of ModRM operand and size of the immediate. What a rule of :mod:`gdb_kprobe.x86` can tell apart is told apart here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.x86.encoding import Encoding, EncodingError, parse

_INT3: Final = b"\xcc"
_ZEROS: Final = bytes(64)

# Opcodes of which ModRM.reg is a part: by map.
_GROUPS: Final = (
    frozenset(b"\x80\x81\x83\x8e\x8f\xc0\xc1\xc6\xc7\xd0\xd1\xd2\xd3\xd8\xd9\xda\xdb\xdc\xdd\xde\xdf\xf6\xf7\xfe\xff"),
    frozenset(b"\x00\x01\x0d\x18\x1e\x71\x72\x73\xae\xba\xc7\x20\x22\x21\x23"),
    frozenset(b"\x49\xf3"),
    frozenset(b"\xf0"),
)
# Of these the whole of a ModRM byte that names a register is opcode.
_WHOLE: Final = ((0, range(0xD8, 0xE0)), (1, range(0x01, 0x02)), (1, range(0x1E, 0x1F)))


class Form(NamedTuple):
    """*space* holds the fixed bits of a VEX or EVEX prefix too; *extension* is what of ModRM belongs to the opcode."""

    prefixes: bytes
    rex: str
    space: bytes
    map: int
    opcode: int
    extension: int | None
    operand: str
    imm_size: int

    def __str__(self) -> str:
        words = [self.prefixes.hex(), self.rex, self.space.hex(), f"{self.map}:{self.opcode:02x}"]
        words.append("" if self.extension is None else f"/{self.extension:x}")
        return " ".join(word for word in (*words, self.operand, f"imm{self.imm_size}" * bool(self.imm_size)) if word)


@dataclass(frozen=True, slots=True)
class Sample:
    """The first instruction met of a form."""

    addr: VirtAddr
    raw: bytes


@dataclass(slots=True)
class Forms:
    """What :func:`read_forms` found.

    *distinct* has the instructions of different bytes, each with the first place where it stands; *samples* one of
    these for each form; *bad* are places that are no instructions, with the reason.
    """

    instructions: int = 0
    distinct: dict[bytes, VirtAddr] = field(default_factory=dict)
    samples: dict[Form, Sample] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


def form_of(encoding: Encoding, raw: bytes) -> Form:
    """The form of the instruction *raw*."""
    modrm, opcode_map, opcode = encoding.modrm, encoding.map, encoding.opcode
    rex = encoding.rex
    space = b""
    if encoding.space:
        # All but the register numbers: the map, W, pp and the length; of EVEX also masking, zeroing, broadcast.
        at = encoding.opcode_offset
        if encoding.space == "evex":
            last = raw[at - 1]
            space = bytes((0x62, raw[at - 2] & 0x83, last & 0xF0 | bool(last & 7)))
        else:
            space = bytes((raw[at - 1] & (0x87 if raw[at - 2] != 0xC5 else 0x07),))
    extension = None
    operand = ""
    if modrm is not None:
        if modrm >= 0xC0 and any(opcode_map == m and opcode in opcodes for m, opcodes in _WHOLE):
            extension = modrm
        elif opcode_map < 4 and opcode in _GROUPS[opcode_map]:
            extension = modrm >> 3 & 7
        operand = _operand(encoding, modrm, rex)
    elif opcode_map == 0 and opcode in (0x54, 0x5C, 0xBC) and not rex & 1:
        operand = "rsp"
    width = "" if not rex else "rex.w" if rex & 8 else "rex"
    return Form(encoding.prefixes, width, space, opcode_map, opcode, extension, operand, encoding.imm_size)


def _operand(encoding: Encoding, modrm: int, rex: int) -> str:
    rm = modrm & 7
    if modrm >= 0xC0:
        return "rsp" if rm == 4 and not rex & 1 else "register"
    if modrm & 0xC7 == 5:
        return "[rip]"
    size = f"+d{encoding.disp_size * 8}" if encoding.disp_size else ""
    if encoding.sib is None:
        return f"[base{size}]"
    index = "+index" if encoding.sib >> 3 & 7 != 4 or rex & 2 else ""
    if encoding.sib & 7 == 5 and modrm < 0x40:
        return f"[{index}{size}]"
    base = "rsp" if encoding.sib & 7 == 4 and not rex & 1 else "base"
    return f"[{base}{index}{size}]"


def read_forms(texts: Iterable[tuple[VirtAddr, bytes]], starts: Sequence[int], skip: Iterable[AddressRange]) -> Forms:
    """Walk *texts* from function to function.

    *starts* are the sorted addresses of symbols, where decoding begins anew; what is in *skip* is left out.
    """
    found = Forms()
    left_out = tuple(skip)
    for base, text in texts:
        first, last = bisect_left(starts, base), bisect_left(starts, base + len(text))
        bounds = [*starts[first:last], base + len(text)]
        for start, end in pairwise(bounds):
            if not any(start in window for window in left_out):
                _walk(found, VirtAddr(start), text[start - base : end - base])
    return found


def _walk(found: Forms, start: VirtAddr, code: bytes) -> None:
    stop = len(code.rstrip(_INT3))  # padding
    zeros = code.find(_ZEROS)
    stop = stop if zeros < 0 else min(stop, zeros)
    at = 0
    while at < stop:
        try:
            encoding = parse(code, at)
        except EncodingError as error:
            found.bad[start + at] = str(error)
            return
        raw = code[at : at + encoding.length]
        found.instructions += 1
        if raw not in found.distinct:
            addr = found.distinct[raw] = VirtAddr(start + at)
            found.samples.setdefault(form_of(encoding, raw), Sample(addr, raw))
        at += encoding.length
