"""The part of the Python API that lets the guest run, and tells what is hit meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from gdb_kprobe.errors import GuestStateError, KprobeError
from gdb_kprobe.gdbext import ticker
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.counters import need_live, read_now
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.gdbext.until import Run, Until
from gdb_kprobe.session.probes import Hit, Probe
from gdb_kprobe.session.stats import Reading


def run() -> None:
    """Let the guest run until something stops it for the user: a Ctrl-C, a breakpoint, a handler.

    Under a front end that does not wait for the guest (MI with mi-async) it returns at once.

    :raises KprobeError: not attached, or the guest was reset meanwhile, or is gone.
    """
    ticker.run(the_plugin().attachments.need_link())


def run_until(seconds: float | None = None, probe: Probe | None = None, hits: int = 1) -> bool:
    """Let the guest run, and stop it again after *seconds*, or when *probe* was hit *hits* times more.

    Counters are read a hundred times a second: there may be some hits more. Returns whether the guest ran to that end;
    ``False``: *probe* was not hit so often in *seconds*, or something else has stopped the guest.

    :raises GuestStateError: the guest runs already, or *probe* is not armed, or its counter cannot be read meanwhile.
    :raises KprobeError: not attached, or the front end does not wait for the guest (:func:`resume_until`), or the guest
        is gone.
    """
    ran = resume_until(seconds, probe, hits)
    if not ran.is_over:
        raise KprobeError(
            "the guest runs: this front end does not wait for it", "wait for its stop; or 'set mi-async off' first"
        )
    return ran.is_reached


def resume_until(seconds: float | None = None, probe: Probe | None = None, hits: int = 1) -> Run:
    """The same as :func:`run_until`, but return at once under a front end that does not wait for the guest.

    Errors are those of :func:`run_until`.
    """
    if seconds is None and probe is None:
        raise KprobeError("run_until: neither seconds nor a probe", "without an end it is gdb.execute('continue')")
    if (seconds is not None and not 0 < seconds < float("inf")) or hits < 1:
        raise KprobeError(f"run_until: {seconds} seconds, {hits} hits", "both are to be above 0")
    return Until(the_plugin().attachments.need_link(), seconds, probe, hits).run()


def counts(probes: Sequence[Probe]) -> Reading:
    """What *probes* have counted since they were added; also while the guest runs.

    :raises GuestStateError: the guest runs, and its counters cannot be read meanwhile.
    :raises NotAttachedError: gdb is attached to no guest.
    """
    return read_now(the_plugin().attachments.need_link(), probes)


def watch(probes: Sequence[Probe], interval: float, tell: Callable[[Reading, Reading], bool]) -> None:
    """Let the guest run, and tell every *interval* seconds what is counted, until that is enough; then stop the guest.

    :param tell: called with the reading before and the one now; returns whether that is enough.
    :raises GuestStateError: the guest runs already, or its counters cannot be read while it runs.
    :raises KprobeError: not attached, or the guest is gone.
    """
    link = the_plugin().attachments.need_link()
    need_live(link, probes)
    before = read_now(link, probes)

    def look() -> bool:
        nonlocal before
        after = read_now(link, probes)
        is_enough = tell(before, after)
        before = after
        return is_enough

    ticker.Ticker(link, interval, look).run()


def sample(probes: Sequence[Probe], interval: float, tell: Callable[[Reading, Reading], bool]) -> None:
    """Tell every *interval* seconds what is counted in a guest that runs in the background, until that is enough.

    gdb waits meanwhile.

    :param tell: called with the reading before and the one now; returns whether that is enough.
    :raises GuestStateError: the guest does not run, or there are hits that gdb would have to handle.
    :raises NotAttachedError: gdb is attached to no guest.
    :raises KeyboardInterrupt: by a Ctrl-C; the guest runs on.
    """
    link = the_plugin().attachments.need_link()
    with link.interrupts.lent():
        if not is_running():
            raise GuestStateError(
                "the guest is stopped: nothing is hit meanwhile",
                "'kprobe stats --live' lets it run; or 'continue &' first; without --interval the totals are shown",
            )
        handled = [site for site in link.session.table.armed() if site.stops]
        if handled:
            place = link.session.guest.place_of(handled[0].addr)
            raise GuestStateError(
                f"hits of {place} are handled by gdb, which cannot do so while it waits here",
                "interrupt the guest, then 'kprobe stats --live'; or leave --interval away",
            )
        before = read_now(link, probes)
        due = before.moment
        is_enough = False
        while not is_enough:
            due += interval
            time.sleep(max(0.0, due - time.monotonic()))
            after = read_now(link, probes)
            is_enough = tell(before, after)
            before = after


def on_hit(listener: Callable[[Hit], None], probes: Iterable[Probe] | None = None) -> Callable[[], None]:
    """Have *listener* called at each hit, before the probe's handler; returns the function that ends that.

    :param probes: those at whose hits *listener* is called; ``None``: all probes. Other probes go on as before.
    :raises GuestStateError: the guest runs.
    :raises NotAttachedError: gdb is attached to no guest.
    """
    link = the_plugin().attachments.need_link()
    with link.stopped():
        link.session.listen(listener, probes)
    return lambda: link.session.unlisten(listener)


def stop_after_hit() -> None:
    """From a listener: have the guest stop for the user as soon as the hit is handled.

    :raises NotAttachedError: gdb is attached to no guest.
    """
    the_plugin().attachments.need_link().stop_requested = True
