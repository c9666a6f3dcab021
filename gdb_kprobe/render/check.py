"""What ``kprobe check`` shows: one place in full, or the table of all text."""

from __future__ import annotations

import textwrap

from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.survey import BY_PLACE, Jumps, Survey
from gdb_kprobe.model import Reason, Rung
from gdb_kprobe.render.place import located
from gdb_kprobe.render.plan import listing
from gdb_kprobe.render.text import WIDTH, hex_bytes, table
from gdb_kprobe.session.check import Examination

_LABEL = 13


def check(found: Examination) -> str:
    """One place in full."""
    refusal = found.refusal
    best = next((trial.rung for trial in found.rungs if trial.refusal is None), None)
    answer = f"it can be probed, {best}" if refusal is None else refusal.text
    lines = [_field("at", located(found.place)), *_wrapped("answer", answer)]
    if refusal is not None and refusal.hint:
        lines += _wrapped("", f"hint: {refusal.hint}")
    if found.insn is None:
        return "\n".join(lines)
    lines += [
        *_wrapped("boundary", f"yes: instruction {found.number} of the function, decoded from its start"),
        _field("bytes", hex_bytes(found.insn.raw)),
        _field("instruction", f"{found.insn} ({found.family})"),
    ]
    for trial in found.rungs:
        why = trial.refusal.text if trial.refusal is not None else "" if refusal is None else str(refusal.reason)
        lines += _wrapped(trial.rung, f"no: {why}" if why else "yes, in the slot:")
        if not why and trial.at is not None and trial.code:
            lines.append(textwrap.indent(listing(trial.code, trial.at), "  "))
    for text in found.tables:
        lines += _wrapped("table", text)
    if found.kernel is not None:
        rules = found.kernel.rules
        for rule, why_not in (("can_probe", found.kernel.probe), ("can_boost", found.kernel.boost)):
            lines += _wrapped("the kernel", f"{rule} ({rules}): {'yes' if why_not is None else f'no, {why_not}'}")
    return "\n".join(lines)


def survey(found: Survey, kernel: str, rules: Rules) -> str:
    """The table of all text of *kernel* (its description), the kernel's own *rules* beside it."""
    padding = found.refused[Reason.PADDING]
    base = found.instructions - padding
    probeable, stepped = found.rungs.total(), found.rungs[Rung.SINGLE_STEP]
    boosted = probeable - stepped

    def row(label: str, count: int) -> tuple[str, str, str]:
        return label, str(count), f"{count / max(base, 1):.3%}"

    rows = []
    for rung in reversed(Rung):
        rows.append(row(rung, found.rungs[rung]))
        if rung is Rung.OPTIMIZED and found.jumps is not None:
            reasons = found.jumps.refused.most_common()
            rows += [row(f"  not optimized: {reason}", count) for reason, count in reasons if count]
        if rung is Rung.SINGLE_STEP:
            rows += [row(f"  not boosted: {reason}", count) for reason, count in found.not_boosted.most_common()]
    by_place = [(reason, count) for reason, count in found.refused.most_common() if count and reason in BY_PLACE]
    otherwise = [(reason, count) for reason, count in found.refused.most_common() if count and reason not in BY_PLACE]
    rows.append(row("refused for what the place is", sum(count for _, count in by_place) - padding))
    rows += [row(f"  {reason}", count) for reason, count in by_place if reason is not Reason.PADDING]
    rows.append(row("refused for another reason", found.refused_otherwise))
    rows += [row(f"  {reason}", count) for reason, count in otherwise]
    return "\n".join(
        (
            f"{kernel}",
            f"{found.instructions} instructions, {padding} of them {Reason.PADDING}; of the other {base}:",
            table(("best rung", "instructions", "share"), rows),
            f"Of the {probeable} that can be probed we boost {boosted} ({boosted / max(probeable, 1):.1%}).",
            f"The kernel's own rules ({rules}) would take {found.kernel_probes} of them, and boost "
            f"{found.kernel_boosts} ({found.kernel_boosts / max(probeable, 1):.1%}).",
            *([] if found.jumps is None else _jumps(found, found.jumps)),
        )
    )


def _jumps(found: Survey, jumps: Jumps) -> list[str]:
    probeable, optimized = max(found.rungs.total(), 1), found.rungs[Rung.OPTIMIZED]
    with_jump = jumps.entries - jumps.entries_refused.total()
    refused = [
        (f"  {reason}", str(count), f"{count / max(jumps.entries, 1):.3%}")
        for reason, count in jumps.entries_refused.most_common()
        if count
    ]
    return [
        f"A jump gets {optimized / probeable:.2%} of them ({jumps.single / probeable:.2%} with an instruction that is "
        f"long enough, {jumps.borrowed} with a nop borrowed from ftrace); the kernel's own rules would optimize "
        f"{jumps.kernel} ({jumps.kernel / probeable:.2%}).",
        f"Of {jumps.entries} function entries outside of forbidden text {with_jump} get one "
        f"({with_jump / max(jumps.entries, 1):.2%}); the others:",
        table(("function entries", "count", "share"), refused),
    ]


def _field(label: str, text: str) -> str:
    return f"{label:{_LABEL}}{text}"


def _wrapped(label: str, text: str) -> list[str]:
    """The field, continued under itself where the line would be too long."""
    parts = textwrap.wrap(text, WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False)
    return [f"{name:{_LABEL}}{part}" for name, part in zip([label, *[""] * len(parts)], parts, strict=False)]
