"""All that the rules say of one place (``kprobe check SYM+OFF``): the answer, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.guest import Guest, Place
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.kprobes.kernel_rules import Rules, boost_refusal, probe_refusal
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.plan import Trial, can_handle, try_rungs
from gdb_kprobe.kprobes.slots import SlotAllocator
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import AddressRange, Boost, Reason, Refusal, Rung, VirtAddr
from gdb_kprobe.session.sites.planner import Planner
from gdb_kprobe.x86.decode import Insn


@dataclass(frozen=True, slots=True)
class KernelVerdict:
    """What the guest's own kprobes would say; ``None`` is yes. *rules* are the kernel's by its version."""

    rules: Rules
    probe: str | None
    boost: str | None


@dataclass(frozen=True, slots=True)
class Examination:
    """One place. *insn* is ``None`` where none begins; *number* counts the function's instructions from 1.

    *refusal* is why no rung can have it; *rungs* are tried whether or not it is refused, as long as the instruction can
    be handled. *tables* says which of the guest's tables know the place.
    """

    place: Place
    insn: Insn | None
    number: int
    family: str
    refusal: Refusal | None
    rungs: tuple[Trial, ...]
    tables: tuple[str, ...]
    kernel: KernelVerdict | None


def examine(
    guest: Guest,
    text: TextMap,
    slots: SlotAllocator,
    location: Location,
    rungs: tuple[Rung, ...],
    boost: Boost,
    goes: Place | None = None,
) -> Examination:
    """Ask all rules about *location*. Nothing is written, and no slot is kept.

    *goes* is where a probe that names *location* goes, if not there.

    :raises RefusedError: there is no such place.
    """
    guest.refresh()
    place = guest.resolve(location)
    planner = Planner(guest, text, slots, rungs, boost)
    refusal: Refusal | None = None
    try:
        slots.discard(planner.plan(place).slot)
    except RefusedError as error:
        refusal = error.refusal
    if refusal is not None and refusal.reason in (Reason.NOT_TEXT, Reason.NOT_EXECUTABLE, Reason.INIT_TEXT):
        return Examination(place, None, 0, "", refusal, (), (), None)
    function = FunctionText(guest, text, place)
    insns = function.up_to(place.addr)
    index = next((index for index, insn in enumerate(insns) if insn.addr == place.addr), None)
    if index is None:
        return Examination(place, None, 0, "", refusal, (), (), None)
    insn = insns[index]
    family = can_handle(insn)
    facts = planner.facts(function, insn)
    handled = not isinstance(family, Refusal)
    return Examination(
        place,
        insn,
        index + 1,
        str(family) if handled else "none",
        refusal,
        try_rungs(insn, facts, slots) if handled else (),
        (*_entry(guest, goes), *_tables(guest, insn)),
        _kernel_verdict(guest, insn, refusal, facts.in_extable),
    )


_KERNEL_TOO = frozenset(
    {
        Reason.NOINSTR,
        Reason.ENTRY_TEXT,
        Reason.KPROBES_TEXT,
        Reason.BLACKLISTED,
        Reason.BP_PATH,
        Reason.JUMP_LABEL,
        Reason.STATIC_CALL,
        Reason.BUG_TABLE,
        Reason.ALTERNATIVE,
    }
)
"""Our reasons that are rules of ``check_kprobe_address_safe`` and ``alternatives_text_reserved``."""


def _kernel_verdict(guest: Guest, insn: Insn, refusal: Refusal | None, in_extable: bool) -> KernelVerdict | None:
    if not isinstance(guest, LinuxGuest):
        return None
    rules = guest.boost_rules
    if refusal is not None and refusal.reason in _KERNEL_TOO:
        return KernelVerdict(rules, str(refusal.reason), "it cannot be probed")
    probe = probe_refusal(insn, rules)
    boost = "it cannot be probed" if probe is not None else boost_refusal(insn, rules, in_extable=in_extable)
    return KernelVerdict(rules, probe, boost)


def _entry(guest: Guest, goes: Place | None) -> Iterator[str]:
    if goes is not None and goes.behind:
        yield f"entry: a probe here goes to {guest.place_of(goes.at)}, behind what the entry is for others"


def _tables(guest: Guest, insn: Insn) -> Iterator[str]:
    fixup = guest.fixup_of(insn.addr)
    if fixup is not None:
        yield f"exception table: after a fault it goes on at {guest.place_of(fixup)}"
    if not isinstance(guest, LinuxGuest):
        return
    facts = guest.text_facts()
    window = AddressRange(insn.addr, insn.end)
    for site in facts.sites_in(window):
        yield f"{site.reason}: {site.what} {guest.place_of(VirtAddr(site.addr))}"
    for found in facts.forbidden.overlapping(window):
        yield f"{found.what}, {found.range}"
    for ftrace in guest.ftrace_sites(window):
        use = guest.ftrace_use(ftrace.window)
        yield f"ftrace record: the nop at {guest.place_of(ftrace.ip)}" + ("" if use is None else f"; {use[1]}")
    for kprobe in guest.own_kprobes().within(window):
        yield f"{Reason.GUEST_KPROBE} at {guest.place_of(kprobe.addr)}"
