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

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext import plugin, settings
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.inspect import (
    address,
    attachment,
    check,
    function,
    guest,
    is_quiet,
    original,
    place,
    read,
    redirected,
    region,
    site,
    sites,
    state,
)
from gdb_kprobe.gdbext.signals import uninterrupted
from gdb_kprobe.gdbext.until import Until
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.definition import ProbeSpec, parse_definition
from gdb_kprobe.language.spec import Location, default_name
from gdb_kprobe.model import Dispatch
from gdb_kprobe.session.attach import Attached
from gdb_kprobe.session.hit_context import Handler, HitContext
from gdb_kprobe.session.inspect import Attachment, FunctionInfo, GuestInfo, RegionInfo, SiteInfo
from gdb_kprobe.session.probes import Hit, Probe, State
from gdb_kprobe.session.session import Detached

_NAMED = 5
"""Functions that a message names at most."""

__all__ = [
    "Attachment",
    "FunctionInfo",
    "GuestInfo",
    "Handler",
    "Hit",
    "HitContext",
    "Place",
    "Probe",
    "RegionInfo",
    "SiteInfo",
    "State",
    "add",
    "add_many",
    "add_matching",
    "address",
    "attach",
    "attachment",
    "check",
    "delete",
    "delete_many",
    "detach",
    "function",
    "get",
    "guest",
    "is_quiet",
    "named",
    "on_hit",
    "original",
    "place",
    "plan",
    "probe",
    "probes",
    "read",
    "redirected",
    "region",
    "run_until",
    "set_enabled",
    "site",
    "sites",
    "state",
    "uninterrupted",
]

_H = TypeVar("_H", bound=Handler)


def attach(profile: str | None = None, dispatch: Dispatch = Dispatch.AUTO) -> Attached:
    """Attach to the guest of *profile* (a name in configs/, or a file) and arm what was added before."""
    the_plugin = plugin.the_plugin()
    attached, _ = the_plugin.attach(the_plugin.profile(profile), dispatch)
    return attached


def detach() -> Detached:
    """Undo everything in the guest. gdb stays connected, the guest stopped."""
    return plugin.the_plugin().detach()


def add(
    definition: str,
    pre: Handler | None = None,
    post: Handler | None = None,
    *,
    enabled: bool = True,
    stop: bool = False,
) -> Probe:
    """Add the probe of *definition* (``p:NAME SYMBOL ...``, or just ``SYMBOL``); before an attach it is only noted.

    *pre* is called before the probed instruction, *post* after it (which needs the single-step rung). With *stop* a hit
    gives the user the prompt, at the probe; one that the definition's condition rejects stops nothing.
    """
    the_plugin = plugin.the_plugin()
    new = Probe(_parse(definition), pre, post, enabled, settings.settings().strategy, stop=stop)
    if the_plugin.link is None:
        if any(other.name == new.name for other in the_plugin.pending):
            raise KprobeError(f"there is a probe named {new.name} already", f"'kprobe delete {new.name}' first")
        the_plugin.pending.append(new)
        return new
    with the_plugin.link.stopped():
        return the_plugin.link.session.add(new)


def add_many(
    definitions: Iterable[str], pre: Handler | None = None
) -> tuple[list[Probe], list[tuple[Probe, KprobeError]]]:
    """Add the probes of *definitions*, which takes far less time than one :func:`add` for each.

    Returns those that are armed, and those that cannot be, each with the reason.

    :raises KprobeError: a definition cannot be read; none is added.
    """
    link = plugin.the_plugin().need_link()
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
    """
    link = plugin.the_plugin().need_link()
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
        refused = link.session.add_many(new, lambda done: progress(done, len(new)))
    return _without(new, refused), refused


def _without(probes: Iterable[Probe], refused: Iterable[tuple[Probe, KprobeError]]) -> list[Probe]:
    not_added = {id(probe) for probe, _ in refused}
    return [probe for probe in probes if id(probe) not in not_added]


def probe(definition: str, *, post: bool = False) -> Callable[[_H], _H]:
    """Decorate a function as the handler of a new probe; with *post* it runs after the instruction."""

    def decorate(handler: _H) -> _H:
        add(definition, post=handler) if post else add(definition, handler)
        return handler

    return decorate


def plan(definition: str) -> tuple[Probe, Place, Plan]:
    """Plan a probe and change nothing; the probe returned is not added."""
    link = plugin.the_plugin().need_link()
    new = Probe(_parse(definition))
    with link.stopped():
        place, made = link.session.plan(new.spec, settings.settings().strategy)
    return new, place, made


def probes() -> tuple[Probe, ...]:
    """All probes, the noted ones last."""
    the_plugin = plugin.the_plugin()
    return (*(the_plugin.link.session.probes if the_plugin.link else ()), *the_plugin.pending)


def get(name: str) -> Probe:
    """The probe called *name*."""
    found = next((probe for probe in probes() if probe.name == name), None)
    if found is None:
        raise KprobeError(
            f"there is no probe named {name}", f"probes: {', '.join(p.name for p in probes()) or 'none'}; 'kprobe list'"
        )
    return found


def named(text: str, command: str) -> tuple[Probe, ...]:
    """The probes that the words of *text* name; ``all`` is all of them."""
    words = text.split()
    if not words:
        raise KprobeError(f"{command}: which probe?", "give names, or 'all'; 'kprobe list' shows them")
    return probes() if words == ["all"] else tuple(get(word) for word in words)


def set_enabled(probe: Probe, enabled: bool) -> None:
    """Enable or disable *probe*, also while the guest runs in the background if its hits are handled there."""
    the_plugin = plugin.the_plugin()
    if probe in the_plugin.pending:
        probe.enabled = enabled
        return
    link = the_plugin.need_link()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(link.stopped())
        except GuestStateError:
            link.session.switch(probe, enabled, link.memory)
        else:
            link.session.set_enabled(probe, enabled)


def delete(probe: Probe) -> None:
    """Delete *probe*."""
    the_plugin = plugin.the_plugin()
    if probe in the_plugin.pending:
        the_plugin.pending.remove(probe)
        return
    link = the_plugin.need_link()
    with link.stopped():
        link.session.delete(probe)


def delete_many(probes: Iterable[Probe]) -> None:
    """Delete *probes*."""
    the_plugin = plugin.the_plugin()
    names = {probe.name for probe in probes}
    the_plugin.pending = [probe for probe in the_plugin.pending if probe.name not in names]
    if the_plugin.link is not None:
        with the_plugin.link.stopped():
            session = the_plugin.link.session
            session.delete_many(probe for probe in session.probes if probe.name in names)


def run_until(seconds: float | None = None, probe: Probe | None = None, hits: int = 1) -> bool:
    """Let the guest run, and stop it again after *seconds*, or when *probe* was hit *hits* times more.

    Counters are read a hundred times a second: there may be some hits more. Returns whether the guest ran to that end;
    ``False``: *probe* was not hit so often in *seconds*, or something else has stopped the guest.
    """
    if seconds is None and probe is None:
        raise KprobeError("run_until: neither seconds nor a probe", "without an end it is gdb.execute('continue')")
    if (seconds is not None and not 0 < seconds < float("inf")) or hits < 1:
        raise KprobeError(f"run_until: {seconds} seconds, {hits} hits", "both are to be above 0")
    until = Until(plugin.the_plugin().need_link(), seconds, probe, hits)
    until.run()
    if is_running():
        raise KprobeError(
            "the guest runs: this front end does not wait for it", "wait for its stop; or 'set mi-async off' first"
        )
    return until.is_reached


def on_hit(listener: Callable[[Hit], None], probes: Iterable[Probe] | None = None) -> Callable[[], None]:
    """Have *listener* called at each hit, before the probe's handler; returns the function that ends that.

    :param probes: those at whose hits *listener* is called; ``None``: all probes. Other probes go on as before.
    """
    link = plugin.the_plugin().need_link()
    with link.stopped():
        link.session.listen(listener, probes)
    return lambda: link.session.unlisten(listener)


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
