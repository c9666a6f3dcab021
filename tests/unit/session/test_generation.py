"""Memory of another moment is told from this session's: by the mark in the region, and nothing is written then."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from gdb_kprobe.errors import ConnectionLostError, GuestResetError
from gdb_kprobe.model import CpuId, PhysAddr
from gdb_kprobe.region.generation import Generation, MemoryState
from gdb_kprobe.region.layout import MARK_OFFSET, MARK_SIZE
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
def generation(ram: Ram) -> Any:
    made = Generation(ram, START, lambda: disarmed[0])
    disarmed = [False]
    made.disarmed = disarmed  # type: ignore[attr-defined]  # for the tests
    made.change()
    return made


def test_no_two_acts_leave_the_same_mark(ram: Ram, generation: Any) -> None:
    marks = {ram.mark}
    for changes in (True, False) * 10:
        with generation.act(changes=changes):
            marks.add(ram.mark)
        marks.add(ram.mark)
        assert generation.look() is MemoryState.NOW
    assert len(marks) == 41


def test_an_earlier_moment_of_the_same_sites_says_how_the_text_was(ram: Ram, generation: Any) -> None:
    armed = bytes(ram.data)
    with generation.act(changes=False):
        between = bytes(ram.data)
        generation.disarmed[0] = True
    disarmed = bytes(ram.data)
    with generation.act(changes=False):
        generation.disarmed[0] = False
    for data, found in ((armed, MemoryState.ARMED), (disarmed, MemoryState.DISARMED), (between, MemoryState.OTHER)):
        ram.data[:] = data
        assert generation.look() is found


def test_a_moment_of_other_sites_is_none_of_ours(ram: Ram, generation: Any) -> None:
    before = bytes(ram.data)
    generation.change()
    ram.data[:] = before
    assert generation.look() is MemoryState.OTHER
    ram.data[:] = bytes(len(ram.data))
    assert generation.look() is MemoryState.OTHER


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_mark_whose_write_was_cut_off_is_ours(ram: Ram, generation: Any, fails: str) -> None:
    ram.fails = fails
    with pytest.raises(ConnectionLostError), generation.act():
        pass
    ram.fails = ""
    assert generation.look() is MemoryState.NOW


def test_memory_exchanged_in_the_middle_of_an_act_is_lost(ram: Ram, generation: Any) -> None:
    before = bytes(ram.data)
    with generation.act(changes=False):
        ram.data[:] = before
    assert bytes(ram.data) == before
    assert generation.look() is MemoryState.OTHER


@pytest.mark.parametrize("left", [0, 1])
def test_memory_exchanged_right_before_a_mark_is_written_is_lost(
    ram: Ram, generation: Any, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look was at the memory of before: there is nothing between it and the write that could tell."""
    before = bytes(ram.data)
    generation.change()
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
    with pytest.raises(GuestResetError) if opening else contextlib.nullcontext(), generation.act():
        done.append("the act")
    assert done == ([] if opening else ["the act"])
    assert generation.was_lost
    assert generation.look() is MemoryState.OTHER


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
        session.disarm_all,
        session.detach,
        lambda: session.on_breakpoint(CpuId(1)),
        lambda: session.listen(print),
    ):
        with pytest.raises(GuestResetError, match="a snapshot with other probes was loaded"):
            act()
        assert toy.machine.log == []
        assert bytes(toy.machine.ram) == saved


@pytest.mark.parametrize("was_disarmed", [False, True])
@pytest.mark.parametrize("is_disarmed", [False, True])
def test_a_session_goes_on_from_memory_with_the_same_sites(toy: Toy, was_disarmed: bool, is_disarmed: bool) -> None:
    """Saved with all disarmed or armed, and loaded while all is disarmed or armed."""
    session = toy.session
    probe = toy.add("f_push")
    if was_disarmed:
        session.disarm_all()
    saved = bytes(toy.machine.ram)
    session.disarm_all()
    if not is_disarmed:
        assert session.arm_all() == ()
    toy.machine.ram[:] = saved
    session.settle()
    session.disarm_all()
    assert toy.changed_text() == {}
    assert session.arm_all() == ()
    assert len(session.notes) == (0 if was_disarmed and is_disarmed else 1)
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
    toy.session.disarm_all()
    toy.machine.log.clear()
    write = toy.machine.write_physical

    def exchange(addr: PhysAddr, data: bytes) -> None:
        write(addr, data)
        if len(toy.machine.log) == writes:
            toy.machine.ram[:] = saved

    def resume_and_stop() -> None:
        toy.session.arm_all()
        assert writes > 4, "only the last write, the mark, tells nobody until the next stop"
        toy.session.settle()

    monkeypatch.setattr(toy.machine, "write_physical", exchange)
    with pytest.raises(GuestResetError, match="a snapshot with other probes was loaded"):
        resume_and_stop()
    assert toy.changed_text() == text
    assert [record.patch.addr for record in toy.records()] == [toy.addr("f_push")]
