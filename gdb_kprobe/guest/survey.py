"""Every instruction of the running guest's live text, classified (``kprobe check --all``)."""

from __future__ import annotations

from collections.abc import Callable

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.guest.symbol_text import Snapshot, pieces
from gdb_kprobe.kprobes.survey import Survey, Surveyor
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.model import AddressRange, Boost

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done, about a hundred times."""

_STEPS = 100


def survey(
    guest: LinuxGuest,
    snapshot: Snapshot,
    area: AddressRange,
    boost: Boost,
    progress: Progress = lambda done, of: None,
    references: References | None = None,
) -> Survey:
    """Classify all of *snapshot*; *area* is where the slots are. Pure computation: it takes seconds, and no guest.

    *references*: what goes where in all of the guest's text; without them no instruction is of the optimized rung.
    """
    by_kernel_rules = boost is Boost.KERNEL
    surveyor = Surveyor(area, guest.boost_rules, by_kernel_rules=by_kernel_rules, references=references)
    done, told = 0, 0
    for piece in pieces(snapshot):
        surveyor.count(piece)
        done += len(piece.code)
        if done - told >= snapshot.size // _STEPS:
            progress(done, snapshot.size)
            told = done
    progress(done, snapshot.size)
    return surveyor.survey
