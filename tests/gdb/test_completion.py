"""TAB, as gdb's ``complete`` shows it: each command, each of its options, and each position of what it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdb_kprobe.model import PT_REGS_NAMES
from gdb_kprobe.testing import GdbMi

pytestmark = pytest.mark.gdb

WITHOUT = ("doctor", "list")
"""Commands that take nothing."""


@pytest.fixture(scope="module")
def gdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GdbMi]:
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "inner").mkdir()
    for name in ("mine.yaml", "mine.txt", "inner/other.yml"):
        (folder / name).write_text("gdbstub: localhost:1\n")
    with GdbMi() as gdb:
        gdb.console(f"cd {folder}")
        gdb.console("kprobe p:opening do_sys_openat2")
        yield gdb


def offered(gdb: GdbMi, line: str) -> list[str]:
    """What the last word of *line* may become."""
    answer = gdb.console(f"complete {line}")
    assert "Python" not in answer
    front = line[: len(line) - len(re.split(r"\s", line)[-1])]
    assert all(one.startswith(front) for one in answer.splitlines()), answer
    return [one.removeprefix(front) for one in answer.splitlines() if one]


def commands(gdb: GdbMi) -> list[str]:
    found = offered(gdb, "kprobe ")
    assert {"add", "attach", "p", "r"} <= set(found)
    return found


def options(gdb: GdbMi, command: str) -> set[str]:
    """The options that the help names."""
    usage = "\n".join(
        line for line in gdb.console(f"help kprobe {command}").splitlines() if line.startswith(f"kprobe {command}")
    )
    return set(re.findall(r"--?[a-z][a-z-]*", usage))


def test_of_every_command_its_options_and_nothing_else(gdb: GdbMi) -> None:
    for command in commands(gdb):
        named = options(gdb, command)
        assert set(offered(gdb, f"kprobe {command} -")) == named, command
        for option in named:
            assert option in offered(gdb, f"kprobe {command} {option[:-1]}"), (command, option)


@pytest.mark.parametrize("command", WITHOUT)
def test_what_takes_nothing_offers_nothing(gdb: GdbMi, command: str) -> None:
    assert offered(gdb, f"kprobe {command} ") == []


@pytest.mark.parametrize("command", ["delete", "disable", "enable", "info", "trace", "stats", "trace -n 3"])
def test_names_of_probes(gdb: GdbMi, command: str) -> None:
    assert offered(gdb, f"kprobe {command} o") == ["opening"]
    assert offered(gdb, f"kprobe {command} opening ") == ["all", "opening"]


def test_a_probe_that_is_to_go_by_its_short_form(gdb: GdbMi) -> None:
    assert offered(gdb, "kprobe -:op") in (["-:opening"], [])  # gdb asks no prefix command


@pytest.mark.parametrize("command", ["attach", "attach --wait", "attach --dispatch stub", "adopt", "restore"])
def test_profiles_and_their_paths(gdb: GdbMi, command: str) -> None:
    assert offered(gdb, f"kprobe {command} deb") == ["debian"]
    assert offered(gdb, f"kprobe {command} mi") == ["mine", "mine.yaml"]
    assert offered(gdb, f"kprobe {command} in") == ["inner/"]
    assert offered(gdb, f"kprobe {command} inner/") == ["inner/other.yml"]
    assert offered(gdb, f"kprobe {command} ./m") == ["./mine.yaml"]
    here = gdb.console("pwd").split()[-1].rstrip(".")
    assert offered(gdb, f"kprobe {command} {here}/inner/o") == [f"{here}/inner/other.yml"]
    assert offered(gdb, f"kprobe {command} /no/such/folder/") == []


@pytest.mark.parametrize("command", ["attach", "adopt"])
def test_the_values_of_an_option(gdb: GdbMi, command: str) -> None:
    assert offered(gdb, f"kprobe {command} --dispatch ") == ["auto", "guest", "stub"]
    assert offered(gdb, f"kprobe {command} --dispatch g") == ["guest"]


@pytest.mark.parametrize("command", ["symbols", "check --all --json"])
def test_files(gdb: GdbMi, command: str) -> None:
    assert offered(gdb, f"kprobe {command} mine.t") == ["mine.txt"]
    assert offered(gdb, f"kprobe {command} inner/o") == ["inner/other.yml"]


@pytest.mark.parametrize(
    "begun", ["add", "add --disabled", "add p:x", "plan", "plan p", "p", "p:x", "p:group/x", "r", "add --disabled p:x"]
)
def test_definitions(gdb: GdbMi, begun: str) -> None:
    assert offered(gdb, f"kprobe {begun} vfs") == []  # there is no guest
    assert offered(gdb, f"kprobe {begun} vfs_read %d") == ["%di", "%dx"]
    assert offered(gdb, f"kprobe {begun} vfs_read fd=%d") == ["fd=%di", "fd=%dx"]
    assert offered(gdb, f"kprobe {begun} vfs_read fd=%di:s3") == ["fd=%di:s32"]
    assert offered(gdb, f"kprobe {begun} vfs_read fd=%di i") == ["if"]
    assert offered(gdb, f"kprobe {begun} vfs_read fd=%di if f") == ["fd", "flags"]
    assert offered(gdb, f"kprobe {begun} vfs_read if fd == 3 && d") == ["di", "dx"]
    assert set(offered(gdb, f"kprobe {begun} vfs_read ")) == {*(f"%{name}" for name in PT_REGS_NAMES), "if"}


def test_the_users_own_paths(gdb: GdbMi) -> None:
    assert offered(gdb, "kprobe attach ~/nothing-of-that-name") == []
    assert Path("~").expanduser().is_dir()


@pytest.mark.parametrize("setting", ["profile", "strategy", "verbose-errors", "watchdog"])
def test_settings(gdb: GdbMi, setting: str) -> None:
    assert offered(gdb, f"set kprobe {setting[:3]}") == [setting]
    values = {
        "profile": ["inner/", "mine.txt", "mine.yaml"],
        "strategy": ["auto", "boosted", "optimized", "single-step"],
    }
    found = [
        one if one != "inner" else "inner/" for one in offered(gdb, f"set kprobe {setting} ")
    ]  # gdb's own, of files
    assert found == values.get(setting, ["off", "on"])
