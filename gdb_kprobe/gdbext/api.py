"""The Python API, for scripts in a gdb session::

    from gdb_kprobe.gdbext import api as kprobe

    kprobe.attach("debian")

    @kprobe.probe("p:open do_sys_openat2 dfd=%di:s32")
    def on_open(hit):
        print(hit.regs.di, hit.read_string(hit.regs.si))

    gdb.execute("continue")
    for site in kprobe.sites():  # what is patched; and guest(), region(), function(), read(), ...
        print(site.place, site.rung, site.patched.hex())

A handler gets a :class:`~gdb_kprobe.session.hit_context.HitContext`. It may read and write registers and memory, skip
the instruction (``hit.regs.ip = ...``, ``hit.skip()``), or stop to the prompt (``hit.stop()``, or return ``True``).
What it raises is shown, its probe is disabled, and the guest goes on.

Every function raises a :class:`~gdb_kprobe.errors.ReportedError`: a ``KprobeError`` for what cannot be done, and a
``SessionOverError`` when the gdbstub does not answer (``ConnectionLostError``), or the guest is another one
(``GuestResetError``).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from gdb_kprobe.errors import GuestStateError, KprobeError, NotAttachedError
from gdb_kprobe.gdbext import settings
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.doctor import doctor
from gdb_kprobe.gdbext.inspect import (
    address,
    attachment,
    check,
    clones,
    function,
    guest,
    handler,
    info,
    is_quiet,
    matching,
    modules,
    original,
    place,
    planned,
    read,
    redirected,
    region,
    site,
    sites,
    state,
    survey,
)
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.gdbext.profiles import profile
from gdb_kprobe.gdbext.runs import (
    counts,
    on_hit,
    resume_until,
    run,
    run_until,
    sample,
    stop_after_hit,
    watch,
)
from gdb_kprobe.gdbext.sessions import adopt, attach, detach, is_attached, need_attached
from gdb_kprobe.gdbext.signals import raise_ctrl_c, uninterrupted
from gdb_kprobe.gdbext.symbols import LoadedSymbols, load_symbols
from gdb_kprobe.gdbext.until import Run
from gdb_kprobe.gdbext.waiting import wait_for_kernel
from gdb_kprobe.guest.doctor import Finding
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.definition import ProbeSpec, parse_definition
from gdb_kprobe.language.spec import Location, default_name
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.session.hit_context import Handler, HitContext
from gdb_kprobe.session.inspect import (
    AdoptResult,
    Attachment,
    AttachResult,
    FunctionInfo,
    GuestInfo,
    HandlerInfo,
    ProbeInfo,
    RegionInfo,
    SiteInfo,
)
from gdb_kprobe.session.probes import Hit, Probe, State
from gdb_kprobe.session.session import Detached
from gdb_kprobe.session.stats import Count, Reading

_NAMED = 5
"""Functions that a message names at most."""
_HEAR_EVERY = 64
"""Functions between two looks for a Ctrl-C."""

__all__ = [
    "AdoptResult",
    "AttachResult",
    "Attachment",
    "Count",
    "Definition",
    "Detached",
    "Finding",
    "FunctionInfo",
    "GuestInfo",
    "Handler",
    "HandlerInfo",
    "Hit",
    "HitContext",
    "LoadedSymbols",
    "Place",
    "Probe",
    "ProbeInfo",
    "Reading",
    "RegionInfo",
    "Run",
    "SiteInfo",
    "State",
    "add",
    "add_many",
    "add_matching",
    "address",
    "adopt",
    "attach",
    "attachment",
    "check",
    "clones",
    "counts",
    "delete",
    "delete_many",
    "detach",
    "doctor",
    "function",
    "get",
    "guest",
    "handler",
    "info",
    "is_attached",
    "is_quiet",
    "is_running",
    "load_symbols",
    "matching",
    "modules",
    "named",
    "need_attached",
    "on_hit",
    "original",
    "place",
    "plan",
    "planned",
    "probe",
    "probes",
    "profile",
    "read",
    "redirected",
    "region",
    "resume_until",
    "run",
    "run_until",
    "sample",
    "set_enabled",
    "site",
    "sites",
    "state",
    "stop_after_hit",
    "survey",
    "uninterrupted",
    "wait_for_kernel",
    "watch",
]

_H = TypeVar("_H", bound=Handler)


def add(
    definition: str,
    pre: Handler | None = None,
    post: Handler | None = None,
    *,
    enabled: bool = True,
    stop: bool = False,
) -> Probe:
    """Add the probe of *definition* (``p:NAME SYMBOL ...``, or just ``SYMBOL``); before an attach it is only noted.

    *pre* is called before the probed instruction, *post* after it. With *stop* a hit
    gives the user the prompt, at the probe; one that the definition's condition rejects stops nothing.

    :raises RefusedError: a rule forbids it; says which.
    :raises NameTakenError: there is a probe of its name.
    :raises GuestStateError: the guest runs.
    :raises KprobeError: *definition* cannot be read.
    """
    link = the_plugin().attachments.link
    new = Probe(_parse(definition), pre, post, enabled, settings.settings().strategy, stop=stop)
    if link is None:
        the_plugin().noted.add(new)
        return new
    with link.stopped():
        return link.session.add(new)


def add_many(
    definitions: Iterable[str], pre: Handler | None = None
) -> tuple[list[Probe], list[tuple[Probe, KprobeError]]]:
    """Add the probes of *definitions*, which takes far less time than one :func:`add` for each.

    Returns those that are armed, and those that cannot be, each with the reason.

    :raises KprobeError: a definition cannot be read; none is added.
    """
    link = the_plugin().attachments.need_link()
    strategy = settings.settings().strategy
    new = [Probe(_parse(definition), pre, strategy=strategy) for definition in definitions]
    with link.stopped():
        refused = link.session.add_many(new)
    return _without(new, refused), refused


def add_matching(
    pattern: str, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[list[Probe], list[tuple[Probe, KprobeError]]]:
    """Add a probe at the entry of every function whose name matches ``[MODULE:]GLOB``; they have default names.

    Returns those that are armed, and those that cannot be, each with the reason. *progress* is told how many of how
    many were tried; what it raises ends it, and none is added.

    :raises KprobeError: no function's name matches.
    :raises KeyboardInterrupt: by a Ctrl-C; none is added.
    """

    def tried(done: int) -> None:
        if done % _HEAR_EVERY == 0:
            raise_ctrl_c()
        progress(done, len(new))

    link = the_plugin().attachments.need_link()
    strategy = settings.settings().strategy
    with link.stopped():
        link.session.guest.refresh()
        places = tuple(link.session.guest.functions(pattern))
        names = Counter(str(place) for place in places)
        new = [Probe(_at_entry(place, by_address=names[str(place)] > 1), strategy=strategy) for place in places]
        if not new:
            freed = [str(place) for place in link.session.guest.init_functions(pattern)]
            if freed:
                raise KprobeError(
                    f"what matches {pattern} is init text, which the guest frees and uses for something else: "
                    f"{', '.join(freed[:_NAMED])}{', ...' * (len(freed) > _NAMED)}",
                    "kallsyms lists init functions for ever; choose functions that stay",
                )
            raise KprobeError(f"no function's name matches {pattern}", "'kprobe add PREFIX<TAB>' completes symbols")
        refused = link.session.add_many(new, tried)
    return _without(new, refused), refused


def _without(probes: Iterable[Probe], refused: Iterable[tuple[Probe, KprobeError]]) -> list[Probe]:
    not_added = {id(probe) for probe, _ in refused}
    return [probe for probe in probes if id(probe) not in not_added]


def probe(definition: str, *, post: bool = False) -> Callable[[_H], _H]:
    """Decorate a function as the handler of a new probe; with *post* it runs after the instruction.

    Errors are those of :func:`add`.
    """

    def decorate(handler: _H) -> _H:
        add(definition, post=handler) if post else add(definition, handler)
        return handler

    return decorate


def plan(definition: str) -> tuple[Probe, Place, Plan]:
    """Plan a probe and change nothing; the probe returned is not added.

    :raises RefusedError: a rule forbids it; says which.
    :raises GuestStateError: the guest runs.
    :raises KprobeError: not attached, or *definition* cannot be read.
    """
    link = the_plugin().attachments.need_link()
    new = Probe(_parse(definition))
    with link.stopped():
        place, made = link.session.plan(new.spec, settings.settings().strategy)
    return new, place, made


def probes() -> tuple[Probe, ...]:
    """All probes, the noted ones last."""
    link = the_plugin().attachments.link
    return (*(() if link is None else link.session.probes), *the_plugin().noted)


def get(name: str) -> Probe:
    """The probe called *name*.

    :raises NotAttachedError: there is none, and no guest that could have it.
    :raises KprobeError: there is none.
    """
    found = next((probe for probe in probes() if probe.name == name), None)
    if found is None and not is_attached():
        raise NotAttachedError(
            f"not attached to a guest, and there is no probe named {name}",
            "'kprobe attach PROFILE' first; 'kprobe list' shows what is noted",
        )
    if found is None:
        raise KprobeError(
            f"there is no probe named {name}", f"probes: {', '.join(p.name for p in probes()) or 'none'}; 'kprobe list'"
        )
    return found


def named(text: str, command: str) -> tuple[Probe, ...]:
    """The probes that the words of *text* name; ``all`` is all of them. *command* is for the message of an error.

    :raises KprobeError: there is no probe of such a name, or there are no words.
    """
    words = text.split()
    if not words:
        raise KprobeError(f"{command}: which probe?", "give names, or 'all'; 'kprobe list' shows them")
    return probes() if words == ["all"] else tuple(get(word) for word in words)


def set_enabled(probe: Probe, enabled: bool) -> None:
    """Enable or disable *probe*, also while the guest runs in the background if its hits are handled there.

    :raises GuestStateError: the guest runs, and that needs more than one store.
    :raises KprobeError: *probe* was deleted.
    """
    if probe in the_plugin().noted:
        probe.enabled = enabled
        return
    link = the_plugin().attachments.need_link()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(link.stopped())
        except GuestStateError:
            link.session.switch(probe, enabled, link.memory)
        else:
            link.session.set_enabled(probe, enabled)


def delete(probe: Probe) -> None:
    """Delete *probe*.

    :raises GuestStateError: the guest runs.
    :raises KprobeError: *probe* was deleted already.
    """
    if probe in the_plugin().noted:
        the_plugin().noted.remove((probe,))
        return
    link = the_plugin().attachments.need_link()
    with link.stopped():
        link.session.delete(probe)


def delete_many(probes: Iterable[Probe]) -> None:
    """Delete *probes*.

    :raises GuestStateError: the guest runs.
    :raises KprobeError: one of *probes* was deleted already; none is deleted then.
    """
    wanted = tuple(probes)
    noted, link = the_plugin().noted, the_plugin().attachments.link
    armed = () if link is None else tuple(link.session.probes)
    there = {id(probe) for probe in (*noted, *armed)}
    for probe in wanted:
        if id(probe) not in there:
            raise KprobeError(f"{probe.name} is not there: it was deleted", "'kprobe list' shows those that are")
    chosen = {id(probe) for probe in wanted}
    if any(id(probe) in chosen for probe in armed):
        assert link is not None
        with link.stopped():
            link.session.delete_many(probe for probe in armed if id(probe) in chosen)
    noted.remove(probe for probe in noted if id(probe) in chosen)


def _at_entry(place: Place, *, by_address: bool) -> ProbeSpec:
    """A definition without arguments; *by_address* where several functions have the name."""
    assert place.symbol is not None
    symbol = place.symbol
    location = Location(address=place.addr) if by_address else Location(symbol.name, symbol.module)
    return ProbeSpec(default_name(location), location, text=f"p {location}")


def _parse(definition: str) -> ProbeSpec:
    """A definition with or without its type in front: ``p:NAME SYMBOL``, ``p SYMBOL`` or just ``SYMBOL``."""
    kind = definition.split(maxsplit=1)[0].partition(":")[0] if definition.strip() else ""
    return parse_definition(definition if kind in ("p", "r", "-") or not kind else f"p {definition}")
