"""Which exceptions of an instruction that is stepped have to be watched for, where a step does not end at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.system.idt import Gate

_VECTORS: Final = (14, 13, 12, 0)
"""#PF and #GP, which an access to memory or a privileged instruction raises; #SS, the #GP of an access by RSP or RBP;
#DE. In this order: of the processor's four breakpoints some may be in use.
"""

GATE_BREAKPOINTS: Final = 1
"""Breakpoints of the processor that stop a hit for the host."""
STEP_BREAKPOINTS: Final = 2
"""Those that a step needs besides: of the first two vectors."""

_FLAGS: Final = 16
"""Where RFLAGS is in an exception's frame: above RIP and CS."""


def fault_entries(gates: Mapping[VirtAddr, Gate]) -> dict[VirtAddr, int]:
    """Where the exceptions of *gates* lead, the most needed first, and how far above RSP RFLAGS is then."""
    of_vector = {gate.vector: (entry, gate) for entry, gate in gates.items()}
    found = (of_vector[vector] for vector in _VECTORS if vector in of_vector)
    return {entry: _FLAGS + 8 * gate.pushes_error_code for entry, gate in found}
