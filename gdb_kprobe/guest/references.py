"""What goes where in live text, as far as it is asked. It takes numpy to load: not before the first question."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from gdb_kprobe.guest.symbol_text import Snapshot, thunks_of
from gdb_kprobe.linux.reference_search import OpaqueRun, ReferenceSearch, Run
from gdb_kprobe.linux.text import TextFacts
from gdb_kprobe.model import AddressRange, VirtAddr


def runs(snapshot: Snapshot) -> list[Run]:
    """The text, of which what is asked for can be decoded."""
    symbols, thunks = snapshot.symbols, thunks_of(snapshot.facts.kallsyms)
    return [Run(start, code, symbols, thunks) for start, code in snapshot.windows]


def core_runs(snapshot: Snapshot) -> list[Run]:
    """The text of the core kernel: what was found out of it is kept for the next attach, should it be the same then."""
    symbols, thunks = tuple(snapshot.symbols), thunks_of(snapshot.facts.kallsyms)
    return [_kept(start, code, symbols, thunks) for start, code in snapshot.windows]


@functools.lru_cache(maxsize=4)
def _kept(start: VirtAddr, code: bytes, symbols: tuple[int, ...], thunks: AddressRange | None) -> Run:
    return Run(start, code, symbols, thunks)


def search_references(
    facts: TextFacts, text: Iterable[Run], opaque: Iterable[tuple[VirtAddr, bytes]] = ()
) -> ReferenceSearch:
    """What goes where in *text*, of which *facts* tells, and may go where in *opaque*: all live text of a guest."""
    return ReferenceSearch(
        text,
        facts.tables,
        jump_tables=thunks_of(facts.kallsyms) is None,
        opaque=[OpaqueRun(start, code) for start, code in opaque],
    )
