"""Copies of a guest that has booted: each goes on by itself from where that one was, and leaves the original alone."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestError, GuestSpec, GuestVm, Snapshots, Template, template_of
from tests.support.calls import GETPRIORITY
from tests.support.guests import environment, profile

pytestmark = pytest.mark.live

CALLS = 23


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(GuestSpec(vcpus=2), id="debian-2cpu"),
        pytest.param(GuestSpec(kernel="newest"), id="newest-1cpu"),
    ],
)
def template(request: Any) -> Iterator[Template]:
    with template_of(request.param) as made:
        yield made


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def where(guest: GuestVm) -> str:
    return guest.check_output("grep -w _text /proc/kallsyms")


def test_copies_go_on_by_themselves(template: Template) -> None:
    before = [digest(path) for path in (template.saved.ram, template.saved.devices)]
    with template.fork() as one, template.fork() as other, template.fork(shared_ram=False) as private:
        guests = (one, other, private)
        for number, guest in enumerate(guests):
            guest.check_output(f"[ ! -e /tmp/number ] && echo {number} > /tmp/number")
        assert [guest.check_output("cat /tmp/number") for guest in guests] == ["0\n", "1\n", "2\n"]
        assert len({where(guest) for guest in guests}) == 1, "they are of one boot"
        assert {guest.check_output("nproc").strip() for guest in guests} == {str(one.spec.vcpus)}
        for guest in guests:
            guest.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
            assert guest.dmesg_problems() == []
        assert [guest.ram_path is None for guest in guests] == [False, False, True]
    assert [digest(path) for path in (template.saved.ram, template.saved.devices)] == before


def test_a_snapshot_of_a_copy_has_its_memory(template: Template) -> None:
    with template.fork() as guest:
        snapshots = Snapshots(guest)
        snapshots.save("before")
        guest.check_output("echo later > /tmp/when")
        snapshots.load("before")
        assert guest.run("cat /tmp/when")[0] != 0


def test_a_copy_can_be_reset(template: Template) -> None:
    with template.fork() as guest:
        guest.check_output("touch /tmp/here")
        guest.reset()
        assert guest.run("ls /tmp/here")[0] != 0


@pytest.mark.parametrize("shared_ram", [True, False])
def test_a_copy_is_probed(template: Template, shared_ram: bool) -> None:
    with template.fork(shared_ram=shared_ram) as guest, GdbMi(environment(guest)) as gdb:
        gdb.console(f"kprobe attach {profile(guest)}")
        gdb.console("kprobe p:prio __x64_sys_getpriority")
        gdb.cont()
        guest.check_output(f"workload syscall {GETPRIORITY} {CALLS}")
        gdb.interrupt()
        (probe,) = gdb.command("-kprobe-list")["probes"]
        assert (probe["hits"], probe["missed"]) == (str(CALLS), "0")
        gdb.console("kprobe detach")


def test_nobody_else_reads_its_memory_and_nothing_is_left() -> None:
    with template_of(GuestSpec()) as template, template.fork() as guest:
        assert guest.ram_path is not None
        files = [template.saved.ram, template.saved.devices.parent, guest.ram_path]
        assert [stat.S_IMODE(file.stat().st_mode) & 0o077 for file in files] == [0, 0, 0]
    assert [file for file in files if file.exists()] == []


def test_a_guest_whose_devices_cannot_be_saved_is_an_error() -> None:
    with GuestVm(GuestSpec(region="ivshmem")) as guest, pytest.raises(GuestError, match="ivshmem"):
        Template(guest)
