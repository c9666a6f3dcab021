"""What a newcomer does: types the wrong thing, attaches to a stub that is taken, uses the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec
from tests.support.probed import Boot

pytestmark = pytest.mark.live

CALLS = 23
REGION = "region:\n  source: {source}\n  size: {size}\n{more}"


def refused(gdb: GdbMi, command: str = "kprobe attach debian") -> str:
    with pytest.raises(GdbCommandError) as error:
        gdb.console(command, timeout=60)
    text = str(error.value)
    assert "Error occurred in Python" not in text
    return text


@pytest.mark.parametrize("gdb_transport", ["unix", "tcp"])
def test_another_gdb_holds_the_stub(probed: Boot, tmp_path: Path, gdb_transport: Any) -> None:
    guest = probed(GuestSpec(gdb=gdb_transport))
    profile = tmp_path / "mine.yaml"
    region = REGION.format(source="reserved", size="16M", more="  physical: 0x10000000\n")
    profile.write_text(f"gdbstub: {guest.guest.gdb_address}\n{region}")
    with guest.gdb(attach=False) as first:
        first.console(f"kprobe attach {profile}")
        with guest.gdb(attach=False) as second:
            started = time.monotonic()
            assert "has a client already, and serves only one" in refused(second, f"kprobe attach {profile}")
            assert time.monotonic() - started < 5  # it waits for half a second
        first.console("kprobe detach")


# What a newcomer types, and the words that tell him what is wrong and what to do.
WRONG = (
    ("kprobe p:x vfs_raed", "vfs_raed is not in kallsyms", "did you mean"),
    ("kprobe p:x __x64_sys_getpriority+0x4000", "offset is outside the symbol", "offsets 0 to"),
    ("kprobe p:x __x64_sys_getpriority+1", "not an instruction boundary", "nearest boundaries"),
    ("kprobe p:x asm_exc_int3", "on the #BP path", "choose another"),
    ("kprobe p:x exc_page_fault", "noinstr text", "choose another"),
    ("kprobe p:x linux_banner", "is data (type", ""),
    ("kprobe p:x 0x400000", "not kernel text", ""),
    ("kprobe p:x start_kernel", "init text", ""),
    ("kprobe p:x vfs_read a=%rdi", "Invalid register name", "%di"),
    ("kprobe p:x vfs_read if di = 3", "Invalid operator", "equality is '=='"),
    ("kprobe p:mine vfs_read", "there is a probe named mine already", "another name"),
    ("kprobe trace nobody", "there is no probe named nobody", "kprobe list"),
    ("kprobe symbols /bin/ls", "build id", ""),
)


def test_ten_wrong_inputs_and_more(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        guest.add(gdb, "p:mine __x64_sys_getpriority")
        for command, said, hint in WRONG:
            text = refused(gdb, command)
            print(f"(gdb) {command}\n{text}\n")
            assert said in text, command
            assert hint in text, command
        assert [probe["name"] for probe in gdb.command("-kprobe-list")["probes"]] == ["mine"]
        gdb.console("kprobe detach")


def test_an_ambiguous_symbol_names_all_addresses(probed: Boot) -> None:
    guest = probed(GuestSpec())
    names: dict[str, int] = {}
    for line in guest.guest.kallsyms().splitlines():
        _, kind, name = line.split()[:3]
        if kind in "tT" and "[" not in line:
            names[name] = names.get(name, 0) + 1
    ambiguous = next(name for name, count in names.items() if count == 2)
    with guest.gdb() as gdb:
        text = refused(gdb, f"kprobe p:x {ambiguous}")
        assert f"2 functions are called {ambiguous}" in text
        assert text.count("0xffffffff") >= 2
        gdb.console("kprobe detach")


def test_the_launcher_attaches(probed: Boot) -> None:
    guest = probed(GuestSpec())
    command = [
        "gdb-kprobe",
        "attach",
        guest.profile,
        "--",
        "-nx",
        "-batch",
        "-ex",
        "kprobe info",
        "-ex",
        "kprobe detach",
    ]

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **guest.environment, "PATH": path},
    )  # fmt: skip
    assert "Attached to Linux" in done.stdout, done.stderr
    assert "Detached; the guest runs." in done.stdout
