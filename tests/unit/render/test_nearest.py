"""Which word was meant."""

from __future__ import annotations

import pytest

from gdb_kprobe.render.nearest import nearest

COMMANDS = ("add", "adopt", "attach", "check", "delete", "detach", "list", "plan", "stats", "trace", "until")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("attch", "attach"),
        ("atttach", "attach"),
        ("Attahc", "attach"),
        ("detatch", "detach"),
        ("lsit", "list"),
        ("paln", "plan"),
        ("ad", "add"),
        ("traec", "trace"),
        ("lists", "list"),
        ("explain", None),
        ("start", None),
        ("remove", None),
        ("frobnicate", None),
    ],
)
def test_only_a_near_word_is_meant(word: str, meant: str | None) -> None:
    assert nearest(word, COMMANDS) == meant


def test_nothing_is_meant_where_there_is_nothing() -> None:
    assert nearest("attach", ()) is None
