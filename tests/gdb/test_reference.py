"""What the reference is made of is what gdb shows: help, settings and MI commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdb_kprobe.testing import GdbMi
from tests.reference import sources

pytestmark = pytest.mark.gdb


@pytest.fixture(scope="module")
def gdb() -> Iterator[GdbMi]:
    with GdbMi() as gdb:
        yield gdb


def test_commands_are_those_that_gdb_has_with_their_help(gdb: GdbMi) -> None:
    docs = sources.commands()
    there = {line.split()[1] for line in gdb.console("complete kprobe ").splitlines() if line.startswith("kprobe ")}
    assert set(docs) == there
    for name, doc in docs.items():
        assert gdb.console(f"help kprobe {name}").strip() == doc, name


def test_settings_are_those_that_gdb_has_with_their_defaults(gdb: GdbMi) -> None:
    settings = sources.settings()
    shown = gdb.console("show kprobe").splitlines()
    assert [line.split()[1] for line in shown] == [setting.name for setting in settings]
    for setting, line in zip(settings, shown, strict=True):
        assert setting.doc in gdb.console(f"help set kprobe {setting.name}")
        if setting.values != ("NAME",):
            assert line == f"kprobe {setting.name} is {setting.values[0]}."
            offered = gdb.console(f"complete set kprobe {setting.name} ").split()
            assert set(setting.values) <= set(offered)


def test_commands_of_mi_are_those_that_gdb_has(gdb: GdbMi) -> None:
    for name in sources.mi_commands():
        answer = gdb.command(f"-info-gdb-mi-command {name.removeprefix('-')}")
        assert answer["command"]["exists"] == "true", name
    there = {name for name in dir_of_mi(gdb) if name.startswith("-kprobe-")}
    assert there == set(sources.mi_commands())


def dir_of_mi(gdb: GdbMi) -> list[str]:
    """The MI commands that were made by Python in this gdb."""
    made = "[c.name for c in __import__('gc').get_objects() if isinstance(c, gdb.MICommand)]"
    return gdb.console(f"python print(*{made})").split()
