"""Functions whose calls go elsewhere: live patches, and whatever else changes the instruction pointer by ftrace.

A ``struct ftrace_ops`` with FTRACE_OPS_FL_IPMODIFY may have the function's nop lead to another function
(kernel/trace/ftrace.c); ftrace lets a function have one such. A live patch is one whose handler is
``klp_ftrace_handler`` (kernel/livepatch/patch.c): it goes to the ``new_func`` on top of the ``func_stack`` of its
``struct klp_ops``. The guest's own kprobes use the flag where one has a post-handler, and go nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.linux.ftrace import for_each_ops, has_ops, read_hash
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import Struct, read_pointer, read_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.target.protocols import Memory

_LIVE_PATCH: Final = "klp_ftrace_handler"
_HARMLESS: Final = frozenset({"kprobe_ftrace_handler"})


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where the calls of one function go. *by* says what does it; *to* is the other function, if that is known.

    *changing*: some tasks still run the function itself (a live patch in transition).
    """

    by: str
    to: VirtAddr | None = None
    changing: bool = False


def read_redirects(memory: Memory, kallsyms: Kallsyms, types: Types) -> Mapping[VirtAddr, Redirect]:
    """Read which functions are redirected now, by the address of the nop at their entry.

    :raises GuestStateError: the list of tracers cannot be found, or has no end.
    :raises UnmappedError: it leads to unmapped memory.
    """
    found: dict[VirtAddr, Redirect] = {}
    if not has_ops(memory, kallsyms):
        return found
    ip_modify = types.enumerator("FTRACE_OPS_FL_IPMODIFY")
    if ip_modify is None:
        return found
    for ops in for_each_ops(memory, kallsyms, types):
        if not ops.uint("flags") & ip_modify:
            continue
        redirect = _redirect(memory, kallsyms, types, ops)
        if redirect is not None:
            hashes = read_struct(memory, types, "ftrace_ops_hash", ops.pointer("func_hash"))
            for ip in read_hash(memory, types, hashes.pointer("filter_hash")):
                found[VirtAddr(ip)] = redirect
    return found


def _redirect(memory: Memory, kallsyms: Kallsyms, types: Types, ops: Struct) -> Redirect | None:
    symbol = kallsyms.symbol_at(ops.pointer("func"))
    name = "" if symbol is None else symbol[0].name
    if name in _HARMLESS:
        return None
    if name != _LIVE_PATCH or not types.has_member("klp_ops", "fops"):
        return Redirect(f"a handler of the guest's ftrace, {symbol[0] if symbol else hex(ops.pointer('func'))}")
    stack = VirtAddr(ops.addr - types.offset_of("klp_ops", "fops") + types.offset_of("klp_ops", "func_stack"))
    first = read_pointer(memory, stack)
    if first == stack:
        return None
    func = read_struct(memory, types, "klp_func", VirtAddr(first - types.offset_of("klp_func", "stack_node")))
    if func.has("nop") and func.uint("nop") & 1:
        return None
    return Redirect("a live patch", func.pointer("new_func"), bool(func.uint("transition") & 1))
