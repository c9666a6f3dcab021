"""The part of the Python API that asks: each function answers with a value, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.gdbext.signals import interruptible
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.guest.survey import survey as classify
from gdb_kprobe.guest.symbol_text import read_references
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.kprobes.survey import Survey
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.session import inspect
from gdb_kprobe.session.check import Examination, examine
from gdb_kprobe.session.data_plane import data_plane_of
from gdb_kprobe.session.inspect import Attachment, FunctionInfo, GuestInfo, HandlerInfo, ProbeInfo, RegionInfo, SiteInfo
from gdb_kprobe.session.probes import Probe, State


def attachment() -> Attachment:
    """How the guest is reached; also while it runs."""
    link = the_plugin().attachments.need_link()
    session = link.session
    return Attachment(
        link.address,
        link.profile.path,
        session.dispatches_in_guest,
        data_plane_of(link.memory, session.region),
        "" if link.attached is None else link.attached.types,
        session.stops,
        link.watchdog.pid,
    )


def guest() -> GuestInfo:
    """The software in the guest; also while it runs."""
    link = the_plugin().attachments.need_link()
    if is_running():  # then the stub answers nothing
        return inspect.guest_of(link.session, len(link.stub.last_cpus))
    with link.stopped():
        return inspect.guest_of(link.session, len(link.session.machine.cpus()))


def region() -> RegionInfo:
    """The guest memory that is the session's; also while the guest runs."""
    return inspect.region_of(the_plugin().attachments.need_link().session)


def sites() -> tuple[SiteInfo, ...]:
    """What is patched in the guest's text, by address; also while the guest runs."""
    return inspect.sites_of(the_plugin().attachments.need_link().session)


def site(probe: Probe) -> SiteInfo | None:
    """The site of *probe*; ``None`` while it has none: it is only noted, or its module is not there."""
    link = the_plugin().attachments.link
    return None if link is None else inspect.site_of(link.session, probe)


def state(probe: Probe) -> State:
    """Where *probe* is in its life."""
    link = the_plugin().attachments.link
    return State.PENDING if link is None else link.session.state_of(probe)


def redirected(probe: Probe) -> str:
    """Why the hits of *probe* are not the calls of its function, as of the last stop; empty: they are."""
    link = the_plugin().attachments.link
    return "" if link is None else link.session.redirected(probe)


def info(probe: Probe) -> ProbeInfo:
    """What there is to say of *probe*; also while the guest runs, where its counters can be read then.

    :raises GuestStateError: the guest runs, and they cannot.
    """
    link = the_plugin().attachments.link
    return inspect.probe_of(None if link is None else link.session, probe)


def planned(probe: Probe) -> Plan | None:
    """The plan that *probe* is armed by, or is to be when it is enabled; ``None`` while it has no site."""
    link = the_plugin().attachments.link
    found = None if link is None else link.session.table.of(probe)
    return None if found is None else found.plan


def handler(probe: Probe) -> HandlerInfo | None:
    """What a hit of *probe* runs inside the guest; ``None``: it has no site, or the host handles every hit there."""
    link = the_plugin().attachments.link
    return None if link is None else inspect.handler_of(link.session, probe)


def matching(prefix: str) -> tuple[str, ...]:
    """The guest's functions whose names begin with *prefix*, as a definition names them: ``SYMBOL``, ``MODULE:SYMBOL``.

    Nothing is read from the guest for it. None while not attached.
    """
    link = the_plugin().attachments.link
    return () if link is None else tuple(link.session.guest.match(prefix))


def modules() -> tuple[str, ...]:
    """The names of the guest's modules whose text may be probed: not of those that are coming, or going.

    :raises NotAttachedError: gdb is attached to no guest.
    """
    return tuple(the_plugin().attachments.need_link().session.guest.loaded_modules())


def clones(place: Place) -> tuple[str, ...]:
    """The names of other functions that the compiler has made of the source of the one at *place*: ``elf_map.isra.0``.

    A call of the function in the source may be a call of any of them.

    :raises NotAttachedError: gdb is attached to no guest.
    """
    return the_plugin().attachments.need_link().session.guest.clones_of(place)


def is_quiet() -> bool:
    """Whether no task of the stopped guest is on its way through a probe: each hit so far is counted."""
    link = the_plugin().attachments.need_link()
    with link.stopped():
        return link.session.is_quiet


def place(where: str | int) -> Place:
    """The place of *where*: an address, or ``SYMBOL[+OFFSET]``, ``MODULE:SYMBOL[+OFFSET]``, ``0xADDRESS``.

    :raises KprobeError: there is no such function, or there are several.
    """
    return inspect.place_of(the_plugin().attachments.need_link().session, where)


def original(addr: int) -> Place | None:
    """The place that *addr*, in the code of probes, stands for; ``None``: there is no code of ours.

    For a fault in displaced code: the guest's oops names the region. The guest must be stopped.
    """
    link = the_plugin().attachments.need_link()
    with link.stopped():
        found = link.session.instruction_at(addr)
        return None if found is None else link.session.guest.place_of(found)


def function(where: str | int) -> FunctionInfo:
    """The function around *where* (:func:`place`): its instructions, and the guest's own patches of it.

    :raises KprobeError: there is no such function, or there are several.
    """
    link = the_plugin().attachments.need_link()
    with link.stopped():
        link.session.guest.refresh()
        return inspect.function_of(link.session, where)


def address(symbol: str) -> VirtAddr:
    """The address of the kernel's *symbol*, code or data; of several the first.

    :raises KprobeError: there is none.
    """
    found = the_plugin().attachments.need_link().session.guest
    if isinstance(found, LinuxGuest):
        return found.kallsyms.address(symbol)
    return found.resolve(Location(symbol)).addr


def read(addr: int, size: int) -> bytes:
    """*size* bytes of the kernel's memory at *addr*, by its own page table, whatever the vCPUs are at.

    :raises KprobeError: the guest runs, or has not mapped all of them.
    """
    link = the_plugin().attachments.need_link()
    with link.stopped():
        link.session.guest.memory.invalidate()
        return link.session.guest.memory.read(VirtAddr(addr), size)


def check(where: str) -> Examination:
    """All that the rules and the guest's tables say of one place (:func:`place`).

    :raises KprobeError: there is no such place.
    """
    link = the_plugin().attachments.need_link()
    session, policy = link.session, link.profile.policy
    location = parse_definition(f"p {where}").location
    with link.stopped():
        goes = session.plans.place_of(location)
        return examine(
            session.guest, session.table.text, session.region.slots, location, policy.rungs, policy.boost, goes
        )


def survey(progress: Callable[[int, int], None] = lambda done, of: None) -> Survey:
    """Classify every instruction of the guest's text by the best rung, or the reason why it has none.

    It takes half a minute; the guest must be stopped only for the begin of it.

    :param progress: called with how many bytes of how many are done, about a hundred times.
    :raises GuestStateError: the guest runs.
    :raises KprobeError: not attached, or the guest is no Linux, which says where its text is.
    :raises KeyboardInterrupt: by a Ctrl-C.
    """
    link = the_plugin().attachments.need_link()
    session, policy = link.session, link.profile.policy
    found = session.guest
    if not isinstance(found, LinuxGuest):
        raise KprobeError(
            "'kprobe check --all' is for Linux guests, which say where their text is",
            "'kprobe check SYMBOL' checks one place",
        )
    with link.stopped():
        found.refresh()
        snapshot = found.snapshot(session.table.text)
    with interruptible():
        references = read_references(snapshot) if Rung.OPTIMIZED in policy.rungs else None
        return classify(found, snapshot, session.region.slots.area, policy.boost, progress, references)
