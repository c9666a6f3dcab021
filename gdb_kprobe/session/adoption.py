"""Take over the probes of a session before, from what that has left in the guest."""

from __future__ import annotations

from collections.abc import Iterable

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.region.counters import Counter
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.session.inspect import AdoptResult
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.session import Session
from gdb_kprobe.session.sites.probe_store import adopt


def adopt_left(session: Session, left: Iterable[tuple[Definition, Counter | None]]) -> AdoptResult:
    """Add the probes *left* (:attr:`Attached.left`) to *session*, with their counts. The machine must be stopped.

    :raises SessionOverError: the guest is another one, or does not answer.
    """
    probes: list[Probe] = []
    refused: list[tuple[str, KprobeError]] = []
    for definition, counter in left:
        try:
            probes.append(adopt(definition, parse_definition(definition.text), counter))
        except KprobeError as error:
            refused.append((definition.text, error))
    session.guest.refresh()
    not_added = {id(probe): error for probe, error in session.add_many(probes)}
    refused += [(str(probe.spec), not_added[id(probe)]) for probe in probes if id(probe) in not_added]
    return AdoptResult(tuple(probe for probe in probes if id(probe) not in not_added), tuple(refused))
