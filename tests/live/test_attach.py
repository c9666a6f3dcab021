"""Attaching at any moment of a guest's life, and with a region that cannot be: each a clear answer, nothing changed."""

from __future__ import annotations

import random
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi, GdbTerminal
from kprobe_guest import GuestFailedError, GuestSpec, GuestVm
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def refused(gdb: GdbMi, command: str) -> str:
    """The error that *command* is answered with; never a Python one."""
    with pytest.raises(GdbCommandError) as caught:
        gdb.console(command)
    assert "Error occurred in Python" not in str(caught.value)
    return str(caught.value)


@contextmanager
def gdb_for(vm: GuestVm, **environment: str) -> Iterator[GdbMi]:
    with GdbMi({"KPROBE_GUEST": str(vm.directory), **environment}) as gdb:
        try:
            yield gdb
        except BaseException:
            print("\n".join(gdb.transcript[-60:]))
            raise


@contextmanager
def starting(spec: GuestSpec) -> Iterator[GuestVm]:
    """A guest whose machine is at its reset vector."""
    vm = GuestVm(spec)
    vm.start(paused=True)
    try:
        yield vm
    finally:
        vm.close()


def checksum(vm: GuestVm) -> int:
    """All of the guest's RAM in a number."""
    return zlib.adler32(vm.ram())


def try_to_attach(gdb: GdbMi) -> str:
    try:
        gdb.console("kprobe attach debian")
    except GdbCommandError as error:
        message, _, hint = str(error).partition("\n")
        if "hint: " not in hint or "Python" in message:
            raise
        return message
    return "attached"


# -- moments ----------------------------------------------------------------------------------------------------------


def test_at_reset_and_at_random_moments_of_a_boot() -> None:
    answers: list[str] = []
    deadline = time.monotonic() + 240
    with starting(GuestSpec(vcpus=2)) as vm, gdb_for(vm) as gdb:
        while "attached" not in answers:
            assert time.monotonic() < deadline, answers
            gdb.console(f"target remote {vm.gdb_address}")
            # All of RAM takes a while to look at.
            before = checksum(vm) if len(answers) % 4 == 0 else None
            answers.append(try_to_attach(gdb))
            if answers[-1] != "attached" and before is not None:
                assert checksum(vm) == before, f"nothing was written: {answers[-1]}"
            gdb.console("kprobe detach" if answers[-1] == "attached" else "detach")
            # The firmware takes some ten milliseconds, the kernel a second.
            time.sleep(random.uniform(0.001, 0.02 if len(answers) < 8 else 0.5))
        vm.wait_ready()
        assert vm.dmesg_clean()
    kinds = {" ".join(word for word in answer.split() if "0x" not in word) for answer in answers}
    print(f"{len(answers)} moments:", *sorted(kinds), sep="\n  ")
    assert any("not in 64-bit mode" in kind for kind in kinds)
    assert any("the guest's kernel is not up: its system_state is" in kind for kind in kinds)
    assert len(kinds) >= 4, kinds


@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=pytest.mark.full), 2])
def test_in_user_mode_with_page_table_isolation(probed: Boot, vcpus: int) -> None:
    guest = probed(GuestSpec(vcpus=vcpus, extra_cmdline=("pti=on",)))
    vm = guest.guest
    spinners = [vm.spawn("workload spin 0") for _ in range(vcpus)]
    in_user_mode = 0
    for _ in range(3):
        with guest.gdb(attach=False) as gdb:
            gdb.console(f"target remote {vm.gdb_address}")
            in_user_mode += vm.hmp("info registers -a").count("CPL=3")
            gdb.console("kprobe attach debian")
            guest.add(gdb, "p:mine __x64_sys_getpriority")
            gdb.cont()
            assert vm.run(f"workload syscall {GETPRIORITY} 7")[0] == 0
            gdb.interrupt()
            assert guest.hits(gdb) == {"mine": 7}
            gdb.console("kprobe detach")
    for spinner in spinners:
        vm.finish(spinner, kill=True)
    assert in_user_mode > 0


def test_after_a_panic() -> None:
    # panic=-1 would reboot at once: the guest is to stay where it is.
    with GuestVm(GuestSpec(extra_cmdline=("panic=0",))) as vm:
        vm.spawn("sleep 0.2; echo c > /proc/sysrq-trigger")
        with suppress(GuestFailedError):
            for _ in range(100):
                vm.check()
                time.sleep(0.1)
        with gdb_for(vm) as gdb:
            error = refused(gdb, "kprobe attach debian")
            assert "the guest's kernel has panicked (on its CPU 0)" in error
            assert "probes can be armed after a reset" in error
            assert "gdb is connected, and the guest is stopped" in error
            # There is nothing to wait for.
            assert "has panicked" in refused(gdb, "kprobe attach --wait debian")
            # gdb itself is connected and can look at it.
            assert gdb.pc


def test_wait_from_reset_arms_what_was_asked_for_before() -> None:
    with starting(GuestSpec(vcpus=2)) as vm, gdb_for(vm) as gdb:
        gdb.console("kprobe p:first __x64_sys_getpriority")
        gdb.console("kprobe p:second __do_sys_getpriority")
        gdb.console("kprobe p:wrong no_such_function_at_all")
        told = gdb.console("kprobe attach --wait debian", timeout=300)
        assert "waiting: " in told
        assert "first: __x64_sys_getpriority+0x0" in told
        assert "wrong: not armed, still noted: cannot probe no_such_function_at_all" in told
        gdb.cont()
        vm.wait_ready()
        jobs = [vm.spawn(f"workload syscall {GETPRIORITY} 23") for _ in range(2)]
        for job in jobs:
            assert vm.finish(job)[0] == 0
        gdb.interrupt()
        probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list")["probes"]}
        assert (probes["first"]["hits"], probes["second"]["hits"]) == ("46", "46")
        assert probes["wrong"]["state"] == "pending"
        gdb.console("kprobe detach")
        assert vm.dmesg_clean()


def test_ctrl_c_ends_the_waiting_with_the_guest_stopped() -> None:
    with starting(GuestSpec()) as vm, GdbTerminal({"KPROBE_GUEST": str(vm.directory)}) as gdb:
        gdb.type("kprobe attach --wait debian")
        gdb.wait_text("waiting: ")
        time.sleep(random.uniform(0.0, 0.4))
        gdb.press_ctrl_c()
        answer = gdb.wait_prompt()
        assert "interrupted by Ctrl-C; gdb is connected, and the guest is stopped: 'continue' lets it run" in answer
        assert not vm.is_running()
        # It can be taken up again.
        assert "Attached to Linux" in gdb.command("kprobe attach --wait debian", timeout=300)
        gdb.command("kprobe detach")
        vm.wait_ready()
        assert vm.dmesg_clean()


# -- connections ------------------------------------------------------------------------------------------------------


def test_attaching_twice(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        assert "attached already" in refused(gdb, "kprobe attach debian")
        gdb.console("kprobe detach --stay")
        assert "Attached to Linux" in gdb.console("kprobe attach debian")
        gdb.console("kprobe detach")
        # gdb is disconnected now, and connects again by itself.
        assert "Attached to Linux" in gdb.console("kprobe attach debian")
        gdb.console("kprobe detach")


RELAY = """
import os, socket, sys, threading
stub = socket.socket(socket.AF_UNIX)
stub.connect(sys.argv[1])
def send():
    while data := os.read(0, 65536):
        stub.sendall(data)
    stub.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := stub.recv(65536):
    os.write(1, data)
"""


def test_by_a_command_that_leads_to_the_stub(probed: Boot, tmp_path: Path) -> None:
    """As of ``ssh HOST ...``. gdb's end of it is one unnamed socket of several."""
    guest = probed(GuestSpec(vcpus=2))
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    with guest.gdb(attach=False) as gdb:
        gdb.console("python import socket; kept = [socket.socketpair() for _ in range(3)]")
        gdb.console(f"target remote | {sys.executable} {relay} {guest.guest.gdb_address}")
        assert "Attached to Linux" in gdb.console("kprobe attach debian")
        guest.add(gdb, "p:mine __x64_sys_getpriority")
        gdb.cont()
        assert guest.guest.run(f"workload syscall {GETPRIORITY} 5")[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"mine": 5}
        gdb.console("kprobe detach")


def test_another_gdb_has_the_stub(probed: Boot) -> None:
    guest = probed(GuestSpec())
    with guest.gdb() as first, guest.gdb(attach=False) as second:
        started = time.monotonic()
        error = refused(second, "kprobe attach debian")
        assert time.monotonic() - started < 20
        assert "has a client already, and serves only one" in error
        assert "detach the other gdb first" in error
        # The first one is not disturbed.
        guest.add(first, "p:mine __x64_sys_getpriority")
        first.cont()
        assert guest.guest.run(f"workload syscall {GETPRIORITY} 5")[0] == 0
        first.interrupt()
        assert guest.hits(first) == {"mine": 5}
        first.console("kprobe detach")


def test_qemu_is_gone() -> None:
    vm = GuestVm(GuestSpec(kernel="bare"))
    vm.start(paused=True)
    vm.kill()
    with gdb_for(vm) as gdb:
        error = refused(gdb, "kprobe attach debian")
        assert "cannot connect to the gdbstub" in error
        assert "is QEMU running" in error
    vm.close()


# -- the region -------------------------------------------------------------------------------------------------------


def profile(directory: Path, region: str) -> Path:
    path = directory / "mine.yaml"
    path.write_text(f"gdbstub: ${{KPROBE_GUEST}}/gdb\nkernel:\n  kind: linux\nregion:\n{region}")
    return path


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("  source: reserved\n  physical: 0x8000000\n  size: 16M\n", "does not leave physical 0x8000000"),
        ("  source: reserved\n  physical: 0x10000000\n  size: 32M\n", "does not leave physical 0x10000000"),
        (
            "  source: reserved\n  physical: 0x10000000\n  size: 16M\n  virtual: 0xffffffffc0000000\n",
            "is taken in the guest",
        ),
        ("  source: ivshmem\n  size: 16M\n", "the machine has no ivshmem device"),
    ],
    ids=["wrong address", "too large", "virtual place taken", "no ivshmem"],
)
def test_a_region_that_cannot_be(probed: Boot, tmp_path: Path, region: str, expected: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        before = checksum(guest.guest)
        error = refused(gdb, f"kprobe attach {profile(tmp_path, region)}")
        assert expected in error
        assert "hint: " in error
        assert checksum(guest.guest) == before, "nothing was written"
        gdb.console("detach")


def test_a_guest_that_reserves_nothing(probed: Boot) -> None:
    guest = probed(GuestSpec(region="none"))
    with guest.gdb(attach=False) as gdb:
        error = refused(gdb, f"kprobe attach {CONFIGS / 'debian.yaml'}")
        assert "does not leave physical 0x10000000 (+16 MiB) alone" in error
        assert "memmap=16M$0x10000000" in error
        gdb.console("detach")


def test_an_ivshmem_device_that_is_too_small(probed: Boot, tmp_path: Path) -> None:
    guest = probed(GuestSpec(region="ivshmem"))
    with guest.gdb(attach=False) as gdb:
        error = refused(
            gdb, f"kprobe attach {profile(tmp_path, '  source: ivshmem' + chr(10) + '  size: 64M' + chr(10))}"
        )
        assert "the ivshmem device has 16 MiB, the profile asks for 64" in error
        gdb.console("kprobe attach ivshmem")
        gdb.console("kprobe detach")
