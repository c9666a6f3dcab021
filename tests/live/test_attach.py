"""Attaching to a guest in every state that it can be in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec, GuestVm

pytestmark = pytest.mark.live

GETPRIORITY = 140
CALLS = 23
REGION = "region:\n  source: {source}\n  size: {size}\n{more}"


@pytest.fixture
def own_guest() -> Iterator[Callable[..., GuestVm]]:
    """A function that starts a guest of the test's own, without waiting for it."""
    guests: list[GuestVm] = []

    def start(spec: GuestSpec, *, paused: bool = False) -> GuestVm:
        guest = GuestVm(spec)
        guests.append(guest)
        guest.start(paused=paused)
        return guest

    yield start
    for guest in guests:
        guest.close()


def environment(guest: GuestVm) -> dict[str, str]:
    return {"KPROBE_GUEST": str(guest.directory)}


def refused(gdb: GdbMi, command: str = "kprobe attach debian") -> str:
    with pytest.raises(GdbCommandError) as error:
        gdb.console(command, timeout=60)
    text = str(error.value)
    assert "Error occurred in Python" not in text
    return text


def attach_or_refusal(gdb: GdbMi) -> str:
    """Empty when it has attached."""
    try:
        gdb.console("kprobe attach debian", timeout=60)
    except GdbCommandError as error:
        return str(error)
    return ""


def test_at_reset(own_guest: Callable[..., GuestVm]) -> None:
    guest = own_guest(GuestSpec(), paused=True)
    with GdbMi(environment(guest)) as gdb:
        text = refused(gdb)
    assert "not in 64-bit mode: the guest is in its firmware or has just been reset" in text


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_at_any_moment_of_the_boot(own_guest: Callable[..., GuestVm], kernel: Any) -> None:
    """Each refusal says what it is; none changes anything: the guest comes up, and then the attach works."""
    guest = own_guest(GuestSpec(kernel=kernel))
    said: list[str] = []
    with GdbMi(environment(guest)) as gdb:
        for _ in range(40):
            text = attach_or_refusal(gdb)
            if not text:
                break
            assert "Error occurred in Python" not in text
            said.append(text.splitlines()[0])
            gdb.cont()
            time.sleep(0.12)
            gdb.command("-exec-interrupt --all")
            gdb.wait_stop()
        else:
            pytest.fail(f"never attached: {said}")
        assert said, "the first attach is in the firmware"
        gdb.console("kprobe detach")
    guest.wait_ready()
    assert guest.dmesg_problems() == []


def test_wait_arms_what_was_asked_for_before(own_guest: Callable[..., GuestVm]) -> None:
    guest = own_guest(GuestSpec(vcpus=2), paused=True)
    with GdbMi(environment(guest)) as gdb:
        gdb.console("set kprobe strategy single-step")
        gdb.console("kprobe p:early __x64_sys_getpriority")
        output = gdb.console("kprobe attach --wait debian", timeout=120)
        assert "early: __x64_sys_getpriority+0x0 armed" in output
        assert "waiting: " in output
        gdb.cont()
        guest.wait_ready()
        guest.run(f"workload syscall {GETPRIORITY} {CALLS}")
        gdb.interrupt()
        (probe,) = gdb.command("-kprobe-list")["probes"]
        assert (probe["hits"], probe["missed"], probe["rung"]) == (str(CALLS), "0", "single-step")
        gdb.console("kprobe detach")
    assert guest.dmesg_problems() == []


def test_wait_is_ended_by_ctrl_c(own_guest: Callable[..., GuestVm]) -> None:
    guest = own_guest(GuestSpec(kernel="bare"), paused=True)  # never becomes a Linux
    with GdbMi(environment(guest)) as gdb:
        token = gdb.start("kprobe attach --wait debian")
        time.sleep(1.5)
        gdb.signal(signal.SIGINT)
        with pytest.raises(GdbCommandError):
            gdb.finish(token, timeout=30)
        assert gdb.console("kprobe list").strip() == "no probes"


def test_in_user_mode_with_page_table_isolation(probed: Callable[[GuestSpec], Any]) -> None:
    guest = probed(GuestSpec(extra_cmdline=("pti=on",)))
    job = guest.guest.spawn("workload spin 0")
    in_user_mode = 0
    for _ in range(6):
        with guest.gdb(attach=False) as gdb:
            gdb.console(f"target remote {guest.guest.gdb_address}")
            in_user_mode += gdb.pc < 1 << 63
            gdb.console(f"kprobe attach {guest.profile}")
            guest.add(gdb, "p:mine __x64_sys_getpriority")
            gdb.cont()
            guest.guest.run(f"workload syscall {GETPRIORITY} {CALLS}")
            gdb.interrupt()
            assert guest.hits(gdb) == {"mine": CALLS}
            gdb.console("kprobe detach")
    guest.guest.finish(job, kill=True)
    assert in_user_mode > 0


def test_after_a_panic(own_guest: Callable[..., GuestVm]) -> None:
    guest = own_guest(GuestSpec(extra_cmdline=("panic=0",)))
    guest.wait_ready()
    with pytest.raises(Exception, match="panic"):
        guest.run("echo c > /proc/sysrq-trigger", timeout=20)
    with GdbMi(environment(guest)) as gdb:
        assert "the guest's kernel has panicked" in refused(gdb)


def test_twice(probed: Callable[[GuestSpec], Any]) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        assert "attached already" in refused(gdb)
        gdb.console("kprobe detach")
        gdb.console(f"kprobe attach {guest.profile}")
        gdb.console("kprobe detach")


@pytest.mark.parametrize("gdb_transport", ["unix", "tcp"])
def test_another_gdb_holds_the_stub(probed: Callable[[GuestSpec], Any], tmp_path: Path, gdb_transport: Any) -> None:
    guest = probed(GuestSpec(gdb=gdb_transport))
    profile = tmp_path / "mine.yaml"
    region = REGION.format(source="reserved", size="16M", more="  physical: 0x10000000\n")
    profile.write_text(f"gdbstub: {guest.guest.gdb_address}\n{region}")
    with guest.gdb(attach=False) as first:
        first.console(f"kprobe attach {profile}")
        started = time.monotonic()
        with guest.gdb(attach=False) as second:
            assert "has a client already, and serves only one" in refused(second, f"kprobe attach {profile}")
        assert time.monotonic() - started < 5
        first.console("kprobe detach")


@pytest.mark.parametrize(
    ("source", "size", "more", "said"),
    [
        ("reserved", "16M", "  physical: 0x4000000\n", "does not leave physical 0x4000000 (+16 MiB) alone"),
        ("reserved", "64M", "  physical: 0x10000000\n", "does not leave physical 0x10000000 (+64 MiB) alone"),
        ("ivshmem", "16M", "", "the machine has no ivshmem device"),
        ("reserved", "2M", "  physical: 0x10000000\n  virtual: {taken:#x}\n", "is taken in the guest"),
        ("premapped", "2M", "  virtual: 0xffffffffd0000000\n", "is not mapped in the guest"),
    ],
)
def test_a_region_that_cannot_be_had(
    probed: Callable[[GuestSpec], Any], tmp_path: Path, source: str, size: str, more: str, said: str
) -> None:
    guest = probed(GuestSpec())
    kernel = guest.snapshot.guest
    taken = min(window.start for window in kernel.text_ranges() if window.start > kernel.image.end) & -(2 << 20)
    profile = tmp_path / "mine.yaml"
    region = REGION.format(source=source, size=size, more=more.format(taken=taken))
    profile.write_text(f"gdbstub: {guest.guest.gdb_address}\n{region}")
    with guest.gdb(attach=False) as gdb:
        text = refused(gdb, f"kprobe attach {profile}")
        assert said in text
        gdb.console("detach")


# What a newcomer types, and the words that tell him what is wrong and what to do.
WRONG = (
    ("kprobe p:x vfs_raed", "vfs_raed is not in kallsyms", "did you mean"),
    ("kprobe p:x __x64_sys_getpriority+0x4000", "offset is outside the symbol", "offsets 0 to"),
    ("kprobe p:x __x64_sys_getpriority+1", "not an instruction boundary", "nearest boundaries"),
    ("kprobe p:x asm_exc_int3", "entry text", "choose another"),
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


def test_ten_wrong_inputs_and_more(probed: Callable[[GuestSpec], Any]) -> None:
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


def test_an_ambiguous_symbol_names_all_addresses(probed: Callable[[GuestSpec], Any]) -> None:
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


def test_the_launcher_attaches(probed: Callable[[GuestSpec], Any]) -> None:
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
