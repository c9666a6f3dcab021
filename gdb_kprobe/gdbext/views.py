"""Session values to what :mod:`gdb_kprobe.render` shows."""

from __future__ import annotations

from gdb_kprobe.gdbext import plugin
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.render.views import ArgView, DeclinedView, HitView, InsnView, PlaceView, PlanView, ProbeView
from gdb_kprobe.session.guest import Place
from gdb_kprobe.session.probes import Hit, Probe
from gdb_kprobe.x86.decode import DecodeError, iter_insns


def place_view(place: Place) -> PlaceView:
    if place.symbol is None:
        return PlaceView(place.addr)
    return PlaceView(place.addr, place.symbol.name, place.offset, place.end - place.start, place.symbol.module)


def probe_view(probe: Probe) -> ProbeView:
    link = plugin.the_plugin().link
    site = link.session.site_of(probe) if link is not None else None
    return ProbeView(
        probe.name,
        None if probe.place is None else place_view(probe.place),
        None if site is None else site.plan.rung,
        probe.hits,
        probe.missed,
        probe.enabled,
        probe.gone,
        str(probe.spec),
    )


def plan_view(probe: Probe, place: Place, plan: Plan) -> PlanView:
    return PlanView(
        probe.name,
        place_view(place),
        f"{plan.insn} ({plan.family})",
        plan.patch.old,
        plan.patch.new,
        plan.rung,
        plan.slot.code,
        listing(plan),
        tuple(
            DeclinedView(rung, f"{refusal.reason}" + (f": {refusal.detail}" if refusal.detail else ""), refusal.hint)
            for rung, refusal in plan.declined
        ),
    )


def listing(plan: Plan) -> tuple[InsnView, ...]:
    """The slot's code."""
    try:
        return tuple(InsnView(insn.addr, insn.raw, str(insn)) for insn in iter_insns(plan.code, plan.slot.code))
    except DecodeError:
        return (InsnView(plan.slot.code, plan.code, "(data)"),)


def hit_view(hit: Hit, time: float | None) -> HitView:
    assert hit.probe.place is not None
    args = tuple(ArgView(arg.name, value, arg.type) for arg, value in hit.args)
    return HitView(hit.probe.name, place_view(hit.probe.place), hit.cpu - 1, args, time)
