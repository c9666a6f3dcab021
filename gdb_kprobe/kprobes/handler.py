"""What a hit does inside the guest: compiled programs, each with the data that it works on. Pure.

A program is prepared once for each kind of surroundings, however many probes have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gdb_kprobe.bpf.check import CheckedProgram
from gdb_kprobe.bpf.frame import Frame, InDetour, InHandler
from gdb_kprobe.bpf.jit import Prepared, emit, prepare
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.assemble import Assembler, Label

_NOWHERE = VirtAddr(0)


class Program:
    """A checked program, compared by identity. *region* is the number that it knows its data by.

    *decides*: its r0 is a verdict, other than CONTINUE for some hits.
    """

    def __init__(self, checked: CheckedProgram, region: int, decides: bool = False) -> None:
        self.checked = checked
        self.region = region
        self.decides = decides
        self._prepared: dict[object, Prepared] = {}

    def prepared(self, frame: Frame) -> Prepared:
        """The program for *frame*."""
        key: object = InHandler
        if isinstance(frame, InDetour):
            key = frame.pushed, tuple(frame.saved.items())
        if key not in self._prepared:
            self._prepared[key] = prepare(self.checked, replace(frame, ip=_NOWHERE), self.decides)
        return self._prepared[key].moved(frame.ip)


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
        regions: Mapping[int, VirtAddr] = {self.program.region: self.data}
        seen = frame if self.ip is None else replace(frame, ip=self.ip)
        emit(asm, self.program.prepared(seen), regions, said=said if self.decides else None)
