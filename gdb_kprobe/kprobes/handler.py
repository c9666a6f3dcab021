"""What a hit does inside the guest: compiled programs, each with the data that it works on. Pure.

A program is prepared once for each kind of surroundings, and compiled once, however many probes have it: in code that
refers to nothing but its data, four bytes at known places are all that is another for another probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.jit import Prepared, emit, prepare
from gdb_kprobe.bpf.verifier import CheckedProgram
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, Label

_NOWHERE = VirtAddr(0)
_CODE, _DATA = VirtAddr(1 << 20), VirtAddr(1 << 21)
"""Where a template is compiled for."""
_DISP32 = 4


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled program: *code* for data at one address, and where in it the displacements to the data are."""

    code: bytes
    displacements: tuple[int, ...]

    def moved(self, at: VirtAddr, data: VirtAddr) -> bytes | None:
        """The code for the address *at* and the data at *data*; ``None``: that is out of reach."""
        code, by = bytearray(self.code), (data - at) - (_DATA - _CODE)
        for place in self.displacements:
            distance = int.from_bytes(code[place : place + _DISP32], "little", signed=True) + by
            if not -(1 << 31) <= distance < 1 << 31:
                return None
            code[place : place + _DISP32] = distance.to_bytes(_DISP32, "little", signed=True)
        return bytes(code)


class Program:
    """A checked program, compared by identity. *region* is the number that it knows its data by.

    *decides*: its r0 is a verdict, other than CONTINUE for some hits.
    """

    def __init__(self, checked: CheckedProgram, region: int, decides: bool = False) -> None:
        self.checked = checked
        self.region = region
        self.decides = decides
        self._prepared: dict[object, Prepared] = {}
        self._templates: dict[object, Template] = {}

    def prepared(self, frame: Frame) -> Prepared:
        """The program for *frame*."""
        return self._anywhere(frame).moved(frame.ip)

    def template(self, frame: Frame) -> Template | None:
        """Its code for *frame*; ``None``: that depends on the probed address, or leads to somewhere else as well."""
        key = _kind_of(frame)
        found = self._templates.get(key)
        if found is None and not self.decides and not self._anywhere(frame).reads_ip:
            found = self._templates[key] = self._compiled(frame)
        return found

    def _anywhere(self, frame: Frame) -> Prepared:
        key = _kind_of(frame)
        if key not in self._prepared:
            self._prepared[key] = prepare(self.checked, replace(frame, ip=_NOWHERE), self.decides)
        return self._prepared[key]

    def _compiled(self, frame: Frame) -> Template:
        one, other = (self._at(frame, VirtAddr(_DATA + step)) for step in (0, 8))
        assert len(one) == len(other), "how long the code is does not depend on where its data are"
        places: list[int] = []
        for place, (byte, moved) in enumerate(zip(one, other, strict=True)):
            # The lowest byte of a displacement changes with each step.
            if byte != moved and (not places or place >= places[-1] + _DISP32):
                places.append(place)
        return Template(one, tuple(places))

    def _at(self, frame: Frame, data: VirtAddr) -> bytes:
        asm = Assembler(_CODE)
        emit(asm, self._anywhere(frame), {self.region: data})
        return asm.finish()


def _kind_of(frame: Frame) -> object:
    """What is the same of frames in which a program is prepared in the same way."""
    return (frame.pushed, tuple(frame.saved.items())) if isinstance(frame, InDetour) else InHandler


@dataclass(frozen=True, slots=True)
class Handler:
    """*program*, with its *data* in the region. *ip* is what it sees as ``ip``, if not the address that is patched."""

    program: Program
    data: VirtAddr
    ip: VirtAddr | None = None

    @property
    def decides(self) -> bool:
        return self.program.decides

    def emit(self, asm: Assembler, frame: Frame, said: Label) -> None:
        """Emit it in line; *said* is where it leads with another verdict than CONTINUE.

        :raises DisplacementError: its data is out of reach.
        """
        template = self.program.template(frame)
        code = None if template is None else template.moved(asm.pc, self.data)
        if code is not None:
            asm.raw(code)
            return
        regions: Mapping[int, VirtAddr] = {self.program.region: self.data}
        seen = frame if self.ip is None else replace(frame, ip=self.ip)
        emit(asm, self.program.prepared(seen), regions, said=said if self.decides else None)
