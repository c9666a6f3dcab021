"""The plugin in a gdb that is connected to nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdb_kprobe.config.installation import LOADER
from gdb_kprobe.testing import GdbCommandError, GdbMi

pytestmark = pytest.mark.gdb

SHORT_FORMS = ("p", "r")
"""Commands that are explained by another's help."""


def commands(gdb: GdbMi) -> list[str]:
    """The sub-commands that gdb has."""
    found = [line.split()[1] for line in gdb.console("complete kprobe ").splitlines() if line.startswith("kprobe ")]
    assert {"attach", "adopt", "check", "doctor", "restore", *SHORT_FORMS} <= set(found)
    return [command for command in found if command not in SHORT_FORMS]


@pytest.fixture(scope="module")
def shared() -> Iterator[GdbMi]:
    with GdbMi() as gdb:
        yield gdb


@pytest.fixture
def gdb(shared: GdbMi) -> Iterator[GdbMi]:
    yield shared
    if "no probes" not in shared.console("kprobe list"):
        shared.console("kprobe delete all")


def fails(gdb: GdbMi, command: str) -> str:
    with pytest.raises(GdbCommandError) as error:
        gdb.console(command)
    text = str(error.value)
    assert "Error occurred in Python" not in text
    return text


def test_one_source_line_loads_it_and_prints_nothing() -> None:
    command = ["gdb", "-nx", "-q", "-batch", "-ex", f"source {LOADER}", "-ex", "kprobe list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("no probes\n", "")


def test_a_script_of_the_users_can_load_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import gdb\ngdb.execute('source {LOADER}')\ngdb.execute('kprobe list')\n")
    command = ["gdb", "-nx", "-q", "-batch", "-ex", f"source {script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("no probes\n", "")


def test_loading_twice_is_harmless(gdb: GdbMi) -> None:
    gdb.console(f"source {LOADER}")
    assert gdb.console("kprobe list").strip() == "no probes"


def test_help_has_usage_and_an_example(gdb: GdbMi) -> None:
    for command in commands(gdb):
        text = gdb.console(f"help kprobe {command}")
        assert re.search(rf"^kprobe {command}\b", text, re.M), text
        assert re.search(rf"Example:\n\s+kprobe {command}\b", text), text


def test_help_of_the_prefix_lists_every_command(gdb: GdbMi) -> None:
    text = gdb.console("help kprobe")
    for command in commands(gdb):
        assert f"kprobe {command}" in text
    assert "p:open do_sys_openat2" in text


def test_without_arguments_it_shows_its_help(gdb: GdbMi) -> None:
    assert gdb.console("kprobe") == gdb.console("help kprobe")


def test_completion_of_commands_profiles_and_probes(gdb: GdbMi) -> None:
    assert "kprobe attach" in gdb.console("complete kprobe at")
    assert gdb.console("complete kprobe attach deb").split() == ["kprobe", "attach", "debian"]
    gdb.console("kprobe p:opening do_sys_openat2")
    assert gdb.console("complete kprobe delete open").split() == ["kprobe", "delete", "opening"]


def test_settings_are_set_and_shown(gdb: GdbMi) -> None:
    gdb.console("set kprobe strategy single-step")
    assert gdb.console("show kprobe strategy").strip() == "kprobe strategy is single-step."
    gdb.console("set kprobe strategy auto")
    gdb.console("set kprobe verbose-errors on")
    assert gdb.console("show kprobe verbose-errors").strip() == "kprobe verbose-errors is on."
    gdb.console("set kprobe verbose-errors off")
    assert 'Undefined item: "best"' in fails(gdb, "set kprobe strategy best")


def test_a_probe_before_the_attach_is_noted(gdb: GdbMi) -> None:
    assert "opening: noted; it is armed by 'kprobe attach'" in gdb.console("kprobe p:opening do_sys_openat2 dfd=%di")
    assert "PENDING" in gdb.console("kprobe list")
    assert "there is a probe named opening already" in fails(gdb, "kprobe p:opening vfs_read")
    assert "opening: disabled" in gdb.console("kprobe disable opening")
    assert "opening: deleted after 0 hit(s)" in gdb.console("kprobe -:opening")


@pytest.mark.parametrize(
    ("command", "said", "hint"),
    [
        ("kprobe frobnicate", "kprobe has no command 'frobnicate'", "help kprobe"),
        (
            "kprobe info x",
            "kprobe info: not attached to a guest, and there is no probe named x",
            "kprobe attach PROFILE",
        ),
        ("kprobe check zzz", "kprobe check: not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe plan vfs_read", "kprobe plan: not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe detach", "not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe trace", "not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe info", "not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe symbols", "not attached to a guest", "kprobe attach PROFILE"),
        ("kprobe attach", "which guest? no profile was given", "set kprobe profile"),
        ("kprobe attach nosuch", "nosuch", "debian"),
        ("kprobe attach --wat debian", "unrecognized arguments: --wat", "help kprobe attach"),
        ("kprobe attach debian", "KPROBE_GUEST", "export KPROBE_GUEST"),
        ("kprobe add", "where? nothing was given", "help kprobe add"),
        ("kprobe add --fast vfs_read", "unknown option --fast", "--disabled"),
        ("kprobe p:x vfs_read a=%rdi", "Invalid register name", "%di"),
        ("kprobe p:x vfs_read if di = 3", "di = 3", "=="),
        ("kprobe p:9x vfs_read", "p:9x", ""),
        ("kprobe r:x vfs_read", "not implemented yet", ""),
        ("kprobe p:x vfs_read s=+0(%si):string", "not implemented yet", ""),
        ("kprobe delete", "which probe?", "kprobe list"),
        ("kprobe delete nobody", "there is no probe named nobody", "kprobe list"),
        ("kprobe enable", "which probe?", "kprobe list"),
        ("kprobe trace -n x", "argument -n", "help kprobe trace"),
    ],
)
def test_a_mistake_says_what_and_what_to_do(gdb: GdbMi, command: str, said: str, hint: str) -> None:
    text = fails(gdb, command)
    assert said in text
    assert hint in text


def test_a_wrong_profile_names_file_and_line(gdb: GdbMi, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("gdbstub: localhost:1\nregion:\n  source: reserved\n  physical: 0x10000000\n  sise: 16M\n")
    text = fails(gdb, f"kprobe attach {profile}")
    assert f"{profile}:5:" in text
    assert "size" in text


def test_nobody_at_the_address(gdb: GdbMi, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        f"gdbstub: {tmp_path}/nobody\nregion:\n  source: reserved\n  physical: 0x10000000\n  size: 16M\n"
    )
    text = fails(gdb, f"kprobe attach {profile}")
    assert f"cannot connect to the gdbstub at {tmp_path}/nobody" in text
    assert "is QEMU running with -gdb" in text


def test_nobody_at_the_port_is_told_at_once(gdb: GdbMi, tmp_path: Path) -> None:
    """gdb itself asks a port that refuses for 15 seconds."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"gdbstub: localhost:{port}\nregion: {{source: borrowed}}\n")
    started = time.monotonic()
    assert f"cannot connect to the gdbstub at localhost:{port}" in fails(gdb, f"kprobe attach {profile}")
    assert time.monotonic() - started < 12
    assert gdb.console("show tcp auto-retry").strip().endswith("is on.")


@pytest.mark.skipif(os.cpu_count() == 1, reason="it starts as many threads as there are CPUs")
def test_numpys_threads_take_no_signals() -> None:
    """A Ctrl-C that one of them took would be lost."""
    masks = (
        "python import pathlib, re; print(*(re.search(r'SigBlk:\\s*(\\w+)', (task / 'status').read_text())[1]"
        " for task in pathlib.Path('/proc/self/task').iterdir()))"
    )
    with GdbMi() as gdb:
        before = len(gdb.console(masks).split())
        gdb.console("python import gdb_kprobe.linux.reference_search")
        blocked = [int(mask, 16) for mask in gdb.console(masks).split()]
    assert len(blocked) > before
    sigint = 1 << (signal.SIGINT - 1)
    assert sum(not mask & sigint for mask in blocked) == 1


def test_show_kprobe_prints_all_settings(gdb: GdbMi) -> None:
    assert gdb.console("show kprobe").splitlines() == [
        'kprobe profile is "".',
        "kprobe strategy is auto.",
        "kprobe verbose-errors is off.",
        "kprobe watchdog is on.",
    ]


def test_help_of_the_settings_says_what_they_are(gdb: GdbMi) -> None:
    for verb, first in (("set", "Change a setting of kprobe commands."), ("show", "Show the settings of kprobe")):
        text = gdb.console(f"help {verb} kprobe")
        assert text.startswith(first), text
        assert "Example:" in text
        names = set(re.findall(rf"^{verb} kprobe ([a-z-]+) -- ", text, re.MULTILINE))
        assert names == {"profile", "strategy", "verbose-errors", "watchdog"}


def test_apropos_finds_every_command_and_setting(gdb: GdbMi) -> None:
    found = gdb.console("apropos kprobe")
    for name in commands(gdb):
        assert re.search(rf"^kprobe {name}\b", found, re.MULTILINE), name
    for name in ("profile", "strategy", "verbose-errors", "watchdog"):
        assert re.search(rf"^set kprobe {name}\b", found, re.MULTILINE), name


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (
            "kprobe attch debian",
            "kprobe has no command 'attch'\n  hint: did you mean 'kprobe attach'? 'help kprobe' says what each does; a "
            "definition begins with p: or p",
        ),
        (
            "kprobe explain vfs_read",
            "kprobe has no command 'explain'\n  hint: there are add, adopt, attach, check, delete, detach, disable, "
            "doctor, enable, info, list, plan, restore, stats, symbols, trace, until; 'help kprobe' says what each "
            "does; a definition begins with p: or p",
        ),
        (
            "kprobe r100:many vfs_read",
            "not implemented yet: return probes\n  hint: probe the function's entry: kprobe p:NAME SYMBOL",
        ),
        (
            "set kprobe stratgy boosted",
            "kprobe has no setting 'stratgy'\n  hint: did you mean 'strategy'? There are profile, strategy, "
            "verbose-errors, watchdog",
        ),
        (
            "show kprobe Profile",
            "kprobe has no setting 'Profile'\n  hint: did you mean 'profile'? There are profile, strategy, "
            "verbose-errors, watchdog",
        ),
    ],
)
def test_a_misspelled_word_is_answered_with_the_right_one(gdb: GdbMi, command: str, answer: str) -> None:
    assert fails(gdb, command) == answer


def test_help_of_attach_says_where_conditions_are_evaluated(gdb: GdbMi) -> None:
    text = " ".join(gdb.console("help kprobe attach").split())
    assert "conditions are compiled into the guest" in text
    assert "with a condition" not in text


def test_a_script_that_fails_can_end_gdb_with_a_status(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """\
import traceback
from gdb_kprobe.gdbext import api as kprobe

def main():
    kprobe.detach()

try:
    main()
except Exception:
    traceback.print_exc()
    gdb.execute("quit 1")
"""
    )
    command = ["gdb", "-nx", "-q", "-batch", "-ex", f"source {LOADER}", "-x", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "NotAttachedError: not attached to a guest" in done.stderr
