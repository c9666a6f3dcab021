"""The list of probes, and one of them in full."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.model import Rung
from gdb_kprobe.render.plan import located, patched_at
from gdb_kprobe.render.text import symbolic, table
from gdb_kprobe.render.views import ProbeView


def probe_list(probes: Sequence[ProbeView]) -> str:
    """The columns of the kernel's ``/sys/kernel/debug/kprobes/list`` (address, type, place, module, flags), then ours.

    Columns in which no probe has anything are left out.
    """
    if not probes:
        return "no probes"
    headers = ("address", "", "symbol", "module", "flags", "hits", "missed", "rung", "name")
    rows = [_row(view) for view in probes]
    kept = [index for index in range(len(headers)) if any(row[index] for row in rows)]
    return table([headers[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _row(view: ProbeView) -> tuple[str, ...]:
    place = view.place
    return (
        "-" if place is None else f"{place.addr + place.behind:016x}",
        "k",
        view.where
        if place is None
        else symbolic(place.symbol, place.offset) + patched_at(place)
        if place.symbol
        else "",
        f"[{place.module}]" if place is not None and place.module else "",
        flags(view),
        str(view.hits),
        str(view.missed),
        view.rung or "",
        view.name,
    )


def flags(view: ProbeView) -> str:
    """``[GONE]``, ``[DISABLED]``, ``[OPTIMIZED]`` as the kernel has them, and ours.

    ``[PENDING]``: the place is not known yet. ``[GUEST_KPROBE]``: a kprobe of the guest's own is on the jump.
    ``[REDIRECTED]``: calls of the function go elsewhere.
    """
    marks = (
        ("GONE", view.is_gone),
        ("DISABLED", not view.is_enabled),
        ("PENDING", view.place is None),
        ("GUEST_KPROBE", view.is_saved),
        ("REDIRECTED", bool(view.redirected)),
        ("OPTIMIZED", view.rung is Rung.OPTIMIZED and view.is_enabled and not view.is_saved),
    )
    return "".join(f"[{name}]" for name, is_set in marks if is_set)


def probe_info(view: ProbeView) -> str:
    """Everything about one probe but for its plan, a line each."""
    lines = [
        ("probe", view.name),
        ("definition", view.definition),
        ("at", located(view.place) if view.place is not None else f"{view.where or 'a place'}, not found yet"),
        ("state", flags(view) or "enabled"),
        ("hits", str(view.hits)),
        ("missed", str(view.missed)),
        (
            "note",
            "a kprobe of the guest's own is, or may be, on the jump, which stays until that is removed" * view.is_saved,
        ),
        ("note", view.redirected),
    ]
    return "\n".join(f"{label:13}{text}" for label, text in lines if text)
