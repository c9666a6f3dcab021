"""The sites of a session by address, which of them are armed, and what of the guest's text is ours therefore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.session.probes import Probe, Site


class SiteTable(Mapping[VirtAddr, Site]):
    """All sites, those that are disabled, or that only watch a fixup, included.

    What handles a hit finds its site here. Only :mod:`gdb_kprobe.session.sites` changes it.
    """

    def __init__(self) -> None:
        self.text = TextMap()
        """Which bytes of the guest's text are those of armed sites, and what they were."""
        self._sites: dict[VirtAddr, Site] = {}
        self._hidden: dict[VirtAddr, VirtAddr] = {}
        """An address that an armed jump hides, and the site of that."""

    def __getitem__(self, addr: VirtAddr) -> Site:
        return self._sites[addr]

    def __iter__(self) -> Iterator[VirtAddr]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def all(self) -> tuple[Site, ...]:
        """In the order in which they came."""
        return tuple(self._sites.values())

    def armed(self) -> tuple[Site, ...]:
        """Those whose text is ours while the machine runs."""
        return tuple(site for site in self._sites.values() if site.armed)

    def of(self, probe: Probe) -> Site | None:
        """The site of *probe*; ``None`` when it has none (yet, any more, or for now)."""
        site = None if probe.place is None or probe.gone else self._sites.get(probe.place.at)
        return site if site is not None and any(other is probe for other in site.probes) else None

    def need(self, probe: Probe) -> Site:
        """The site of *probe*, which must have one.

        :raises KprobeError: the module that it was in is gone, or the probe was deleted.
        """
        site = self.of(probe)
        if site is None:
            if not probe.gone:
                raise KprobeError(f"{probe.name} is not there: it was deleted", "'kprobe list' shows those that are")
            raise KprobeError(
                f"{probe.name} is gone: the module of {probe.place} was unloaded",
                f"the probe is armed again when the module is back; 'kprobe delete {probe.name}' forgets the probe",
            )
        return site

    def hiding(self, addr: VirtAddr) -> Site | None:
        """The site whose armed jump hides the instruction at *addr*."""
        found = self._hidden.get(addr)
        return None if found is None else self._sites[found]

    @property
    def hides(self) -> bool:
        """Whether any jump hides an instruction."""
        return bool(self._hidden)

    def copy_of(self, addr: VirtAddr) -> VirtAddr | None:
        """Where the instruction at *addr*, which a jump hides, is executed instead; ``None``: no jump hides it."""
        site = self.hiding(addr)
        if site is None or site.plan.detour is None:
            return None
        copy = site.plan.detour.code(site.plan.slot.code).displaced.way(addr)
        # Behind the call that is the last to be executed there is nothing but nops.
        return site.plan.detour.window.end if copy is None else copy

    # -- for who changes sites ------------------------------------------------------------------------------------

    def add(self, site: Site) -> Site:
        """Have *site*, and return it."""
        self._sites[site.addr] = site
        if site.armed:
            self._note_text(site)
        return site

    def drop(self, site: Site) -> None:
        """Have *site* no more."""
        del self._sites[site.addr]

    def mark_armed(self, site: Site) -> None:
        """The text of *site* is ours, or about to be."""
        self._note_text(site)
        site.armed = True

    def mark_disarmed(self, site: Site) -> None:
        """The text of *site*, which is armed, is the guest's own, or gone."""
        self.text.remove(site.plan.patch)
        for addr in site.interior:
            self._hidden.pop(addr, None)
        site.armed = False

    def _note_text(self, site: Site) -> None:
        self.text.add(site.plan.patch)
        self._hidden.update((addr, site.addr) for addr in site.interior)
