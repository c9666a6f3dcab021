"""Session values to what :mod:`gdb_kprobe.render` shows."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.bpf.insn import text
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.render.check import CheckView, TrialView
from gdb_kprobe.render.stats import RateView, StatsRow, StatsView
from gdb_kprobe.render.views import (
    ArgView,
    DeclinedView,
    HandlerView,
    HitView,
    InsnView,
    PlaceView,
    PlanView,
    ProbeView,
)
from gdb_kprobe.session.check import Examination
from gdb_kprobe.session.inspect import HandlerInfo
from gdb_kprobe.session.probes import Hit, Probe
from gdb_kprobe.session.stats import Change, Reading, changes, fastest, sum_of
from gdb_kprobe.x86.decode import DecodeError, iter_insns


def place_view(place: Place) -> PlaceView:
    if place.symbol is None:
        return PlaceView(place.addr)
    size = place.end - place.start
    return PlaceView(place.addr, place.symbol.name, place.offset, size, place.symbol.module, place.behind)


def probe_view(probe: Probe) -> ProbeView:
    link = the_plugin().attachments.link
    site = link.session.table.of(probe) if link is not None else None
    return ProbeView(
        probe.name,
        None if probe.place is None else place_view(probe.place),
        None if site is None else site.plan.rung,
        probe.hits,
        probe.missed,
        probe.enabled,
        probe.gone,
        str(probe.spec),
        site is not None and site.saved,
        "" if link is None or site is None else link.session.redirected(probe),
        str(probe.spec.location),
    )


def stats_view(probes: Sequence[Probe], before: Reading | None, after: Reading, top: int | None) -> StatsView:
    """What *probes* had counted at *after*, and since *before*, if there is such a reading; the *top* fastest."""
    found = changes(before, after)
    total = sum_of(found.values())
    by_name = {probe.name: probe for probe in probes}
    timed = before is not None
    rows = tuple(_stats_row(by_name[name], found[name], timed) for name in fastest(found, top))
    seconds = None if before is None else after.moment - before.moment
    return StatsView(rows, len(found), total.total.hits, total.total.missed, _rate_view(total, timed), seconds)


def _stats_row(probe: Probe, change: Change, timed: bool) -> StatsRow:
    place = None if probe.place is None else place_view(probe.place)
    count = change.total
    view = ProbeView(probe.name, place, None, count.hits, count.missed, probe.enabled, probe.gone)
    return StatsRow(view, _rate_view(change, timed))


def _rate_view(change: Change, timed: bool) -> RateView | None:
    return RateView(change.hits, change.missed, change.rate) if timed else None


def plan_view(probe: Probe, place: Place, plan: Plan) -> PlanView:
    return PlanView(
        probe.name,
        place_view(place),
        f"{plan.insn} ({plan.family})",
        plan.patch.old,
        plan.patch.new,
        plan.rung,
        plan.slot.code,
        listing(plan.code, plan.slot.code),
        tuple(DeclinedView(rung, refusal.text, refusal.hint) for rung, refusal in plan.declined),
    )


def handler_view(inside: HandlerInfo) -> HandlerView:
    return HandlerView(tuple(text(insn) for insn in inside.program), listing(inside.code, inside.entry))


def listing(code: bytes, at: VirtAddr) -> tuple[InsnView, ...]:
    """The slot's *code*, which is for the address *at*."""
    try:
        return tuple(InsnView(insn.addr, insn.raw, str(insn)) for insn in iter_insns(code, at))
    except DecodeError:
        return (InsnView(at, code, "(data)"),)


def check_view(found: Examination) -> CheckView:
    """An examined place; the guest may run meanwhile."""
    place, refusal = place_view(found.place), found.refusal
    best = next((trial.rung for trial in found.rungs if trial.refusal is None), None)
    answer = f"it can be probed, {best}" if refusal is None else refusal.text
    hint = "" if refusal is None else refusal.hint
    if found.insn is None:
        return CheckView(place, answer, hint)
    kernel = found.kernel
    return CheckView(
        place,
        answer,
        hint,
        f"{found.insn} ({found.family})",
        found.insn.raw,
        f"yes: instruction {found.number} of the function, decoded from its start",
        tuple(
            TrialView(trial.rung, trial.refusal.text)
            if trial.refusal is not None
            else TrialView(trial.rung, str(refusal.reason))
            if refusal is not None
            else TrialView(trial.rung, "", () if trial.at is None else listing(trial.code, trial.at))
            for trial in found.rungs
        ),
        found.tables,
        ()
        if kernel is None
        else (
            f"can_probe ({kernel.rules}): {'yes' if kernel.probe is None else f'no, {kernel.probe}'}",
            f"can_boost ({kernel.rules}): {'yes' if kernel.boost is None else f'no, {kernel.boost}'}",
        ),
    )


def hit_view(hit: Hit, time: float | None) -> HitView:
    assert hit.probe.place is not None
    args = tuple(ArgView(arg.name, value, arg.type) for arg, value in hit.args)
    return HitView(hit.probe.name, place_view(hit.probe.place), hit.cpu - 1, args, time)
