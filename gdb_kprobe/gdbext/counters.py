"""Reading what probes have counted, at stops and while the guest runs."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.link import Link
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import Reading, read_counts

_TOTALS = "interrupt the guest, then 'kprobe stats' shows the totals"
_BACKING = "start QEMU with its RAM in a file (docs/guide/your-own-qemu.md)"


def read_now(link: Link, probes: Sequence[Probe]) -> Reading:
    """What *probes* have counted, now.

    :raises GuestStateError: the guest runs, and its counters cannot be read meanwhile.
    """
    session = link.session
    if not is_running():
        with link.stopped():
            return read_counts(session.region.memory, probes)
    need_live(link, probes)
    try:
        session.check_live(link.memory)
        return read_counts(session.region.memory, probes)
    except TargetError as error:
        need_live(link, probes)  # it may have been lost just now: this says why
        raise GuestStateError(f"the counters cannot be read: {error.message}", "interrupt the guest first") from error


def need_live(link: Link, probes: Sequence[Probe], instead: str = _TOTALS) -> None:
    """Have the counters of *probes* readable while the guest runs; *instead* is what the user can do if they are not.

    :raises GuestStateError: they are not; says why.
    """
    region = link.session.region.header
    counted = any(probe.counter is not None for probe in probes)
    if counted and link.memory.live(region.phys, region.size) is None:
        raise GuestStateError(
            f"the counters cannot be read while the guest runs: {link.memory.not_live}",
            f"{instead}; or {_BACKING}",
        )
