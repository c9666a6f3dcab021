"""Memory of another moment is told from this session's: by the mark in the region, and nothing is written then."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from gdb_kprobe.errors import ConnectionLostError, GuestResetError
from gdb_kprobe.model import CpuId, PhysAddr
from gdb_kprobe.region.layout import MARK_OFFSET, MARK_SIZE
from gdb_kprobe.region.moment import Memory, Moment
from tests.support.toy import Toy

START = PhysAddr(0x1000)


class Ram:
    """Memory that can be exchanged, and whose writes can fail before or after they are made."""

    def __init__(self) -> None:
        self.data = bytearray(0x3000)
        self.fails = ""

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return bytes(self.data[addr : addr + size])

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        if self.fails != "before":
            self.data[addr : addr + len(data)] = data
        if self.fails:
            raise ConnectionLostError("cut off")

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @property
    def mark(self) -> bytes:
        return self.read_physical(PhysAddr(START + MARK_OFFSET), MARK_SIZE)


@pytest.fixture
def ram() -> Ram:
    return Ram()


@pytest.fixture
def moment(ram: Ram) -> Any:
    made = Moment(ram, START, lambda: lifted[0])
    lifted = [False]
    made.lifted = lifted  # type: ignore[attr-defined]  # for the tests
    made.change()
    return made


def test_no_two_acts_leave_the_same_mark(ram: Ram, moment: Any) -> None:
    marks = {ram.mark}
    for changes in (True, False) * 10:
        with moment.act(changes=changes):
            marks.add(ram.mark)
        marks.add(ram.mark)
        assert moment.look() is Memory.NOW
    assert len(marks) == 41


def test_an_earlier_moment_of_the_same_sites_says_how_the_text_was(ram: Ram, moment: Any) -> None:
    lowered = bytes(ram.data)
    with moment.act(changes=False):
        between = bytes(ram.data)
        moment.lifted[0] = True
    lifted = bytes(ram.data)
    with moment.act(changes=False):
        moment.lifted[0] = False
    for data, found in ((lowered, Memory.LOWERED), (lifted, Memory.LIFTED), (between, Memory.OTHER)):
        ram.data[:] = data
        assert moment.look() is found


def test_a_moment_of_other_sites_is_none_of_ours(ram: Ram, moment: Any) -> None:
    before = bytes(ram.data)
    moment.change()
    ram.data[:] = before
    assert moment.look() is Memory.OTHER
    ram.data[:] = bytes(len(ram.data))
    assert moment.look() is Memory.OTHER


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_mark_whose_write_was_cut_off_is_ours(ram: Ram, moment: Any, fails: str) -> None:
    ram.fails = fails
    with pytest.raises(ConnectionLostError), moment.act():
        pass
    ram.fails = ""
    assert moment.look() is Memory.NOW


def test_memory_exchanged_in_the_middle_of_an_act_is_lost(ram: Ram, moment: Any) -> None:
    before = bytes(ram.data)
    with moment.act(changes=False):
        ram.data[:] = before
    assert bytes(ram.data) == before
    assert moment.look() is Memory.OTHER


@pytest.mark.parametrize("left", [0, 1])
def test_memory_exchanged_right_before_a_mark_is_written_is_lost(
    ram: Ram, moment: Any, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look was at the memory of before: there is nothing between it and the write that could tell."""
    before = bytes(ram.data)
    moment.change()
    writes = ram.write_physical

    def exchange_then_write(addr: PhysAddr, data: bytes) -> None:
        nonlocal left
        if not left:
            ram.data[:] = before
        left -= 1
        writes(addr, data)

    monkeypatch.setattr(ram, "write_physical", exchange_then_write)
    opening = left == 0
    done = []
    with pytest.raises(GuestResetError) if opening else contextlib.nullcontext(), moment.act():
        done.append("the act")
    assert done == ([] if opening else ["the act"])
    assert moment.was_lost
    assert moment.look() is Memory.OTHER


def test_a_session_writes_nothing_to_memory_of_another_moment(toy: Toy) -> None:
    toy.add("f_push")
    saved = bytes(toy.machine.ram)
    second = toy.add("f_nop")
    toy.machine.ram[:] = saved
    toy.machine.log.clear()
    session = toy.session
    for act in (
        lambda: toy.add("f_lea"),
        lambda: session.delete(second),
        lambda: session.set_enabled(second, False),
        session.settle,
        session.lift,
        session.detach,
        lambda: session.on_breakpoint(CpuId(1)),
        lambda: session.listen(print),
    ):
        with pytest.raises(GuestResetError, match="a snapshot with other probes was loaded"):
            act()
        assert toy.machine.log == []
        assert bytes(toy.machine.ram) == saved


@pytest.mark.parametrize("was_lifted", [False, True])
@pytest.mark.parametrize("is_lifted", [False, True])
def test_a_session_goes_on_from_memory_with_the_same_sites(toy: Toy, was_lifted: bool, is_lifted: bool) -> None:
    """Saved with the text lifted or not, and loaded while it is lifted or not."""
    session = toy.session
    probe = toy.add("f_push")
    if was_lifted:
        session.lift()
    saved = bytes(toy.machine.ram)
    session.lift()
    if not is_lifted:
        assert session.lower() == ()
    toy.machine.ram[:] = saved
    session.settle()
    session.lift()
    assert toy.changed_text() == {}
    assert session.lower() == ()
    assert len(session.notes) == (0 if was_lifted and is_lifted else 1)
    before = probe.hits
    toy.call("f_push")
    assert probe.hits == before + 1
    session.detach()
    assert toy.changed_text() == {}


@pytest.mark.parametrize("writes", range(1, 6))
def test_what_is_written_to_memory_that_comes_in_the_middle_of_a_resume_is_taken_back(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The memory is exchanged after so many writes: sites armed there stay so, others do not get there."""
    toy.add("f_push")
    saved = bytes(toy.machine.ram)
    text = toy.changed_text()
    toy.add("f_nop")
    toy.add("f_ret")
    toy.session.lift()
    toy.machine.log.clear()
    write = toy.machine.write_physical

    def exchange(addr: PhysAddr, data: bytes) -> None:
        write(addr, data)
        if len(toy.machine.log) == writes:
            toy.machine.ram[:] = saved

    def resume_and_stop() -> None:
        toy.session.lower()
        assert writes > 4, "only the last write, the mark, tells nobody until the next stop"
        toy.session.settle()

    monkeypatch.setattr(toy.machine, "write_physical", exchange)
    with pytest.raises(GuestResetError, match="a snapshot with other probes was loaded"):
        resume_and_stop()
    assert toy.changed_text() == text
    assert [record.patch.addr for record in toy.records()] == [toy.addr("f_push")]
