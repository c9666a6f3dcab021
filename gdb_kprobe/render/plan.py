"""A plan, and listings of instructions: what ``kprobe plan`` shows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from gdb_kprobe.render.text import WIDTH, address, hex_bytes
from gdb_kprobe.render.views import DeclinedView, HandlerView, InsnView, PlaceView, PlanView

_LABEL = 13


def listing(insns: Sequence[InsnView]) -> str:
    """One instruction a line: address, bytes, text, and the notes in a column of their own."""
    raw = max((len(hex_bytes(insn.raw)) for insn in insns), default=0)
    text = max((len(insn.text) for insn in insns), default=0)
    lines = (
        f"{insn.addr:#018x}:  {hex_bytes(insn.raw):{raw}}  {insn.text:{text}}"
        + (f"  ; {insn.note}" if insn.note else "")
        for insn in insns
    )
    return "\n".join(line.rstrip() for line in lines)


def located(view: PlaceView) -> str:
    """``0xffffffff81234567 (vfs_read+0x17)``, or ``0xffffffff81234555 (vfs_read+0x0 at +0x5)``: what is patched."""
    text = address(view.addr + view.behind, view.symbol, view.offset, view.module)
    return text[:-1] + f"{patched_at(view)})" if view.behind else text


def patched_at(view: PlaceView) -> str:
    """``" at +0x5"``: which bytes of the function are patched, where those are not the ones at *view*'s own address."""
    return f" at +{view.offset + view.behind:#x}" if view.behind else ""


def plan(view: PlanView) -> str:
    """The dry run of one probe: what is there, what it becomes, where it goes, and why not a better rung."""
    return "\n".join([_field("probe", view.name), _field("at", located(view.place)), plan_body(view)])


def plan_body(view: PlanView) -> str:
    """The same without saying again which probe it is, and where."""
    lines = [
        _field("instruction", view.insn),
        _field("bytes", f"{hex_bytes(view.old)}  ->  {hex_bytes(view.new)}"),
        _field("rung", view.rung),
        _field("slot", address(view.slot)),
    ]
    if view.listing:
        lines.append(textwrap.indent(listing(view.listing), "  "))
    lines += [line for declined in view.declined for line in _declined(declined)]
    return "\n".join(lines)


def handler(view: HandlerView) -> str:
    """The eBPF program of a probe, and the code that it has become where that is not in the slot."""
    width = len(str(len(view.program)))
    program = "\n".join(f"{index:{width}}: {line}" for index, line in enumerate(view.program))
    lines = [_field("eBPF", ""), textwrap.indent(program, "  ")]
    if view.listing:
        lines += [_field("handler", address(view.listing[0].addr)), textwrap.indent(listing(view.listing), "  ")]
    return "\n".join(lines)


def _declined(view: DeclinedView) -> list[str]:
    lines = _wrapped(f"not {view.rung}", view.reason)
    return lines + _wrapped("", f"hint: {view.hint}") if view.hint else lines


def _field(label: str, text: str) -> str:
    return f"{label:{_LABEL}}{text}"


def _wrapped(label: str, text: str) -> list[str]:
    """The field, continued under itself where the line would be too long."""
    parts = textwrap.wrap(text, WIDTH - _LABEL - 3, break_long_words=False, break_on_hyphens=False)
    return [f"{name:{_LABEL + 3}}{part}" for name, part in zip([label, *[""] * len(parts)], parts, strict=False)]
