"""Probes that wait for a guest, and those that a session before has left in one."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import NameTakenError, RefusedError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.region.definitions import Definition
from gdb_kprobe.session.adoption import adopt_left
from gdb_kprobe.session.noted import NotedProbes
from gdb_kprobe.session.probes import Probe, State
from tests.support.toy import Toy


def note(*definitions: str) -> NotedProbes:
    noted = NotedProbes()
    for definition in definitions:
        noted.add(Probe(parse_definition(definition)))
    return noted


def names(noted: NotedProbes) -> list[str]:
    return [probe.name for probe in noted]


def test_a_name_is_noted_once() -> None:
    noted = note("p:a f_push", "p:b f_lea")
    with pytest.raises(NameTakenError, match="there is a probe named a already"):
        noted.add(Probe(parse_definition("p:a f_lea")))
    first, _ = noted
    noted.remove([first, Probe(parse_definition("p:b f_lea"))])
    assert names(noted) == ["b"], "another probe of the same name is another one"


def test_what_cannot_be_armed_stays_noted(toy: Toy) -> None:
    noted = note("p:a f_push", "p:b f_nowhere", "p:c f_lea")
    ((probe, error),) = noted.arm(toy.session.add)
    assert (probe.name, type(error)) == ("b", RefusedError)
    assert names(noted) == ["b"]
    assert [probe.name for probe in toy.session.probes] == ["a", "c"]


def test_what_was_not_tried_when_arming_is_cut_off_stays_noted() -> None:
    noted = note("p:a f_push", "p:b f_lea", "p:c f_lea")
    added: list[str] = []

    def add(probe: Probe) -> None:
        if probe.name == "b":
            raise KeyboardInterrupt
        added.append(probe.name)

    with pytest.raises(KeyboardInterrupt):
        noted.arm(add)
    assert added == ["a"]
    assert names(noted) == ["b", "c"]


def test_probes_of_a_guest_that_is_no_more_are_noted_without_what_was_of_it(toy: Toy) -> None:
    probe = toy.add("f_push")
    noted = note("p:a f_lea")
    noted.keep(toy.session)
    assert names(noted) == ["a", "f_push"]
    assert (probe.place, probe.counter, probe.gone) == (None, None, False)


def left(text: str, hits: int = 0, *, enabled: bool = True) -> Definition:
    return Definition(text, Rung.BOOSTED, False, VirtAddr(0), hits, 1, enabled)


def test_what_was_left_is_added_with_its_counts_and_what_cannot_be_is_told(toy: Toy) -> None:
    toy.add("p:taken f_lea")
    definitions = (
        left("p:a f_push", 7),
        left("p:b f_lea", 5, enabled=False),
        left("p:taken f_push"),
        left("p:c f_nowhere"),
        left("p:d ="),
    )
    done = adopt_left(toy.session, [(definition, None) for definition in definitions])
    assert [(probe.name, probe.hits, probe.missed) for probe in done.probes] == [("a", 7, 1), ("b", 5, 1)]
    assert [toy.session.state_of(probe) for probe in done.probes] == [State.ARMED, State.DISABLED]
    assert [text.split()[0].rpartition("/")[2].removeprefix("p:") for text, _ in done.refused] == ["d", "taken", "c"]
