"""A plan, and listings of instructions: what ``kprobe plan`` shows."""

from __future__ import annotations

import textwrap

from gdb_kprobe.bpf.insn import text as bpf_text
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.model import Refusal, Rung, VirtAddr
from gdb_kprobe.render.place import located
from gdb_kprobe.render.text import WIDTH, address, hex_bytes
from gdb_kprobe.session.inspect import HandlerInfo
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.x86.decode import DecodeError, iter_insns

_LABEL = 13


def listing(code: bytes, at: VirtAddr) -> str:
    """*code*, which is for the address *at*, one instruction a line: address, bytes, text."""
    try:
        insns = [(insn.addr, hex_bytes(insn.raw), str(insn)) for insn in iter_insns(code, at)]
    except DecodeError:
        insns = [(at, hex_bytes(code), "(data)")]
    width = max((len(raw) for _, raw, _ in insns), default=0)
    return "\n".join(f"{addr:#018x}:  {raw:{width}}  {text}" for addr, raw, text in insns)


def plan(probe: Probe, place: Place, made: Plan) -> str:
    """The dry run of *probe*: what is there, what it becomes, where it goes, and why not a better rung."""
    return "\n".join([_field("probe", probe.name), _field("at", located(place)), plan_body(made)])


def plan_body(made: Plan) -> str:
    """The same without saying again which probe it is, and where."""
    lines = [
        _field("instruction", f"{made.insn} ({made.family})"),
        _field("bytes", f"{hex_bytes(made.patch.old)}  ->  {hex_bytes(made.patch.new)}"),
        _field("rung", made.rung),
        _field("slot", address(made.slot.code)),
    ]
    if made.code:
        lines.append(textwrap.indent(listing(made.code, made.slot.code), "  "))
    lines += [line for rung, refusal in made.declined for line in _declined(rung, refusal)]
    return "\n".join(lines)


def handler(inside: HandlerInfo) -> str:
    """The eBPF program of a probe, and the code that it has become where that is not in the slot."""
    width = len(str(len(inside.program)))
    program = "\n".join(f"{index:{width}}: {bpf_text(insn)}" for index, insn in enumerate(inside.program))
    lines = [_field("eBPF", ""), textwrap.indent(program, "  ")]
    if inside.code:
        code = textwrap.indent(listing(inside.code, inside.entry), "  ")
        lines += [_field("handler", address(inside.entry)), code]
    return "\n".join(lines)


def _declined(rung: Rung, refusal: Refusal) -> list[str]:
    lines = _wrapped(f"not {rung}", refusal.text)
    return lines + _wrapped("", f"hint: {refusal.hint}") if refusal.hint else lines


def _field(label: str, text: str) -> str:
    return f"{label:{_LABEL}}{text}"


def _wrapped(label: str, text: str) -> list[str]:
    """The field, continued under itself where the line would be too long."""
    parts = textwrap.wrap(text, WIDTH - _LABEL - 3, break_long_words=False, break_on_hyphens=False)
    return [f"{name:{_LABEL + 3}}{part}" for name, part in zip([label, *[""] * len(parts)], parts, strict=False)]
