"""How an int3 of the kernel gets to C code: the one call that dispatch inside the guest takes over.

``asm_exc_int3`` (arch/x86/entry/entry_64.S, ``idtentry`` with vector X86_TRAP_BP) saves the registers, calls
``exc_int3`` with a ``struct pt_regs *`` in RDI, and leaves through ``error_return``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.target.protocols import Memory
from gdb_kprobe.x86.decode import DecodeError, Insn, iter_insns

_HANDLER = "exc_int3"
_CALL_REL32_SIZE = 5


@dataclass(frozen=True, slots=True)
class BpPath:
    """*call* is the call of *handler*; all code from the #BP entry to there, and back, lies in *entry_text*."""

    call: Insn
    handler: VirtAddr
    entry_text: AddressRange


def find_bp_path(memory: Memory, kallsyms: Kallsyms, bp_entry: VirtAddr) -> BpPath:
    """Find the call in the live text of the #BP entry.

    :raises GuestStateError: this kernel's entry code is not as described above; nothing can be said of it then.
    """
    hint = "'kprobe attach --dispatch stub' works with any kernel"
    handler = kallsyms.find(_HANDLER)
    entry_text = kallsyms.section("__entry_text_start", "__entry_text_end")
    symbol = kallsyms.symbol_at(bp_entry)
    if handler is None or entry_text is None or symbol is None:
        raise GuestStateError(f"the kernel has no {_HANDLER}, or no .entry.text, in its kallsyms", hint)
    end = kallsyms.end(symbol[0])
    try:
        insns = tuple(iter_insns(memory.read(bp_entry, end - bp_entry), bp_entry))
    except DecodeError as error:
        raise GuestStateError(f"the #BP entry cannot be decoded: {error.message}", hint) from error
    calls = [insn for insn in insns if insn.is_call and insn.branch_target == handler]
    if len(calls) != 1 or calls[0].length != _CALL_REL32_SIZE or bp_entry not in entry_text:
        raise GuestStateError(f"{symbol[0]} calls {_HANDLER} {len(calls)} times, expected one plain call", hint)
    return BpPath(calls[0], handler, entry_text)
