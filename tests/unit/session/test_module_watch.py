"""What the session itself looks for is no user's handler: on the toy machine, whose guest has modules here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from gdb_kprobe.errors import ConnectionLostError, GuestStateError, UnmappedError
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import ModuleLoad, VirtAddr
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.sites import modules as module_watch
from tests.support.toy import Toy

MODULE, SI = 0x1230, 7
"""The arguments: ``f_push`` returns their sum."""


@pytest.fixture
def admitted(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> list[VirtAddr]:
    """The modules that came; a probe waits for one that does not."""
    found: list[VirtAddr] = []
    monkeypatch.setattr(module_watch, "COMES", "f_push")
    monkeypatch.setattr(module_watch, "GOES", "f_load")
    monkeypatch.setattr(type(toy.guest), "takes_modules", True)
    monkeypatch.setattr(toy.guest, "loaded_modules", dict)
    monkeypatch.setattr(toy.guest, "admit_module", found.append)
    toy.session.add(Probe(parse_definition("p:waits other:some")))
    toy.session.disarm_all()
    assert toy.session.arm_all() == ()
    return found


def test_a_watch_is_asked_at_each_hit_and_nobody_is_told(toy: Toy, admitted: list[VirtAddr]) -> None:
    assert [toy.call("f_push", rdi=MODULE + at) for at in range(3)] == [MODULE + at + SI for at in range(3)]
    assert admitted == [MODULE, MODULE + 1, MODULE + 2]
    assert (toy.hits, toy.session.notes, toy.session.failed) == ([], [], [])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnmappedError(VirtAddr(0x10)), f"the module at {MODULE:#x} was not looked at in f_push: "),
        (ZeroDivisionError(), "watching modules failed in f_push\nTraceback"),
    ],
)
def test_a_failure_is_told_and_the_watch_is_there_again(
    toy: Toy, admitted: list[VirtAddr], monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(module: VirtAddr) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(toy.guest, "admit_module", fail)
        assert toy.call("f_push", rdi=MODULE) == MODULE + SI
    assert [note.startswith(told) for note in toy.session.notes] == [True]
    assert toy.session.failed == []
    assert toy.call("f_push", rdi=MODULE) == MODULE + SI
    assert admitted == [MODULE]


def test_a_list_of_modules_that_cannot_be_read_is_told_and_the_guest_goes_on(
    toy: Toy, admitted: list[VirtAddr], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh() -> None:
        raise GuestStateError("the list of modules has no end")

    with monkeypatch.context() as patch:
        patch.setattr(toy.guest, "refresh", refresh)
        assert toy.call("f_push", rdi=MODULE) == MODULE + SI
    assert [note.endswith("in f_push: the list of modules has no end") for note in toy.session.notes] == [True]
    assert toy.call("f_push", rdi=MODULE) == MODULE + SI
    assert admitted == [MODULE]


def test_a_probe_that_waits_waits_on_when_arming_it_fails(
    toy: Toy, admitted: list[VirtAddr], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    (waiting,) = toy.session.modules.waiting
    monkeypatch.setattr(toy.guest, "loaded_modules", lambda: {"other": ModuleLoad("other", VirtAddr(1), 1)})
    monkeypatch.setattr(toy.session.sites, "put", fail)
    assert toy.call("f_push", rdi=MODULE) == MODULE + SI
    assert toy.session.modules.waiting == [waiting]
    toy.session.delete(waiting)
    assert toy.session.modules.waiting == []


def test_a_lost_connection_is_no_failure_of_the_watch(
    toy: Toy, admitted: list[VirtAddr], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(module: VirtAddr) -> None:
        raise ConnectionLostError("gone")

    monkeypatch.setattr(toy.guest, "admit_module", lose)
    with pytest.raises(ConnectionLostError):
        toy.call("f_push", rdi=MODULE)
    assert toy.session.notes == []


def test_no_ctrl_c_gets_into_a_watch(toy: Toy, admitted: list[VirtAddr], monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        entered.append("a handler")
        yield

    monkeypatch.setattr(toy.session._calls, "_interruptible", interruptible)
    toy.call("f_push", rdi=MODULE)
    assert (admitted, entered) == ([MODULE], [])
    toy.add("f_push", pre=lambda hit: None)
    toy.call("f_push", rdi=MODULE)
    assert (admitted, entered) == ([MODULE] * 2, ["a handler"])
