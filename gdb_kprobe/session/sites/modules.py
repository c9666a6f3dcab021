"""Modules come and go: probes wait for theirs, are armed before its init runs, and are dropped before its memory goes.

As long as a probe is in a module, or waits for one, the guest stops for us where it has formed a module and is about to
run its init (``do_init_module`` in kernel/module/main.c: the text is executable, its ftrace records and jump labels are
known), and where it is about to free one (``free_module``, also after an init that has failed). Without these two
functions, modules are looked at whenever the machine stops for the user.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from gdb_kprobe.errors import KprobeError, SessionOverError
from gdb_kprobe.guest.guest import Guest
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import ModuleLoad, VirtAddr
from gdb_kprobe.session.hit_context import Registers
from gdb_kprobe.session.probes import Probe, Site
from gdb_kprobe.session.site_table import SiteTable

COMES, GOES = "do_init_module", "free_module"
"""Both get the ``struct module *`` as their first argument."""


@dataclass(frozen=True, slots=True)
class Acts:
    """What the session does for us.

    *arm* a probe at a place, *drop* one from its site, *forget* a site whose text is gone; *act* is around
    changes of its sites.
    """

    arm: Callable[[Probe, Location], None]
    drop: Callable[[Probe], None]
    forget: Callable[[Site], None]
    act: Callable[[], AbstractContextManager[None]]


class ModuleWatch:
    """The probes of one session that wait for a module, and the two that see modules come and go."""

    def __init__(self, guest: Guest, sites: SiteTable, acts: Acts, notes: list[str]) -> None:
        """*sites* are the session's, *notes* where it says what happened while the guest ran."""
        self.waiting: list[Probe] = []
        self._notes = notes
        self._guest = guest
        self._sites = sites
        self._acts = acts
        self._watchers: list[Probe] = []
        self._impossible = False
        self._refused: dict[str, ModuleLoad] = {}
        """By name of the probe, the load of its module that it could not be armed in."""

    def may_come(self, probe: Probe) -> bool:
        """Whether *probe* is for a module that is not loaded, or is coming or going right now."""
        module = probe.spec.location.module
        return bool(module) and self._guest.takes_modules and module not in self._guest.loaded_modules()

    def wait(self, probe: Probe) -> None:
        """Arm *probe* when its module comes."""
        self.waiting.append(probe)

    def look(self) -> None:
        """Arm those whose module has come. (The session drops the sites of those that have gone.)"""
        loaded = self._guest.loaded_modules() if self.waiting else {}
        for probe in tuple(self.waiting):
            load = loaded.get(module_of(probe))
            if load is not None and self._refused.get(probe.name) != load:
                self._arm(probe, load)

    def update(self) -> None:
        """Watch modules exactly as long as that is needed. Before the machine runs."""
        wanted = bool(self.waiting) or any(site.owner is not None for site in self._sites.values())
        if wanted and not self._watchers and not self._impossible:
            for symbol, look in ((COMES, self._on_come), (GOES, self._on_go)):
                watch = partial(self._watch, symbol, look)
                probe = Probe(parse_definition(f"p:watch_{symbol} {symbol}"), watch=watch)
                try:
                    self._acts.arm(probe, probe.spec.location)
                except KprobeError as error:
                    # Then the other one is of no use either.
                    self._impossible = True
                    self._notes.append(f"modules are only looked at when the guest stops for you: {error.message}")
                    self._unwatch()
                    break
                self._watchers.append(probe)
        elif not wanted:
            self._unwatch()

    def _unwatch(self) -> None:
        while self._watchers:
            self._acts.drop(self._watchers.pop())

    def _watch(self, symbol: str, look: Callable[[VirtAddr], None], regs: Registers) -> None:
        """The guest is at *symbol*. What goes wrong is told, and the next module is looked at as this one was."""
        try:
            self._guest.refresh()
            look(VirtAddr(regs.di))
        except SessionOverError:
            raise
        except KprobeError as error:
            self._notes.append(f"the module at {regs.di:#x} was not looked at in {symbol}: {error.message}")
        except Exception:
            # A fault of ours: it must neither keep the guest here nor be taken for that of a user's handler.
            self._notes.append(f"watching modules failed in {symbol}\n{traceback.format_exc().rstrip()}")

    def _on_come(self, module: VirtAddr) -> None:
        self._guest.admit_module(module)
        self.look()

    def _on_go(self, module: VirtAddr) -> None:
        gone = [site for site in self._sites.values() if site.owner is not None and site.owner.addr == module]
        if gone:
            with self._acts.act():
                for site in gone:
                    self._acts.forget(site)

    def _arm(self, probe: Probe, load: ModuleLoad) -> None:
        module = module_of(probe)
        self.waiting.remove(probe)
        try:
            with self._acts.act():
                self._acts.arm(probe, replace(probe.spec.location, module=module))
        except BaseException as error:
            self.waiting.append(probe)
            if not isinstance(error, KprobeError):
                raise
            # It waits for the next one: another build of the module, perhaps.
            self._refused[probe.name] = load
            self._notes.append(f"{probe.name} is not armed in {module}: {error.message}")
        else:
            probe.gone = False
            self._notes.append(f"{probe.name}: {module} has come; {probe.place} armed")


def module_of(probe: Probe) -> str:
    """The name of the module that *probe* is for; empty when it cannot be told once that is gone."""
    if probe.spec.location.module or probe.spec.location.address is not None:
        return probe.spec.location.module
    return probe.place.symbol.module if probe.place is not None and probe.place.symbol is not None else ""
