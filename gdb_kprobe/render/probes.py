"""The list of probes, and one of them in full."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.model import Rung
from gdb_kprobe.render.place import located, patched_at
from gdb_kprobe.render.text import symbolic, table
from gdb_kprobe.session.inspect import ProbeInfo


def probe_list(probes: Sequence[ProbeInfo]) -> str:
    """The columns of the kernel's ``/sys/kernel/debug/kprobes/list`` (address, type, place, module, flags), then ours.

    Columns in which no probe has anything are left out.
    """
    if not probes:
        return "no probes"
    headers = ("address", "", "symbol", "module", "flags", "hits", "missed", "rung", "name")
    rows = [_row(info) for info in probes]
    kept = [index for index in range(len(headers)) if any(row[index] for row in rows)]
    return table([headers[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _row(info: ProbeInfo) -> tuple[str, ...]:
    place = info.probe.place
    symbol = None if place is None else place.symbol
    return (
        "-" if place is None else f"{place.at:016x}",
        "k",
        str(info.probe.spec.location)
        if place is None
        else ""
        if symbol is None
        else symbolic(symbol.name, place.offset) + patched_at(place),
        "" if symbol is None or not symbol.module else f"[{symbol.module}]",
        flags(info),
        str(info.hits),
        str(info.missed),
        info.rung or "",
        info.probe.name,
    )


def flags(info: ProbeInfo) -> str:
    """``[GONE]``, ``[DISABLED]``, ``[OPTIMIZED]`` as the kernel has them, and ours.

    ``[PENDING]``: the place is not known yet. ``[GUEST_KPROBE]``: a kprobe of the guest's own is on the jump.
    ``[REDIRECTED]``: calls of the function go elsewhere.
    """
    probe = info.probe
    marks = (
        ("GONE", probe.gone),
        ("DISABLED", not probe.enabled),
        ("PENDING", probe.place is None),
        ("GUEST_KPROBE", info.is_saved),
        ("REDIRECTED", bool(info.redirected)),
        ("OPTIMIZED", info.rung is Rung.OPTIMIZED and probe.enabled and not info.is_saved),
    )
    return "".join(f"[{name}]" for name, is_set in marks if is_set)


def probe_info(info: ProbeInfo) -> str:
    """Everything about one probe but for its plan, a line each."""
    probe = info.probe
    lines = [
        ("probe", probe.name),
        ("definition", str(probe.spec)),
        ("at", f"{probe.spec.location}, not found yet" if probe.place is None else located(probe.place)),
        ("state", flags(info) or "enabled"),
        ("hits", str(info.hits)),
        ("missed", str(info.missed)),
        (
            "note",
            "a kprobe of the guest's own is, or may be, on the jump, which stays until that is removed" * info.is_saved,
        ),
        ("note", info.redirected),
    ]
    return "\n".join(f"{label:13}{text}" for label, text in lines if text)
