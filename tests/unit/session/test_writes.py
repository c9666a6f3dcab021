"""What is written to the guest, in which order, and what is left when a write fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from gdb_kprobe.errors import GuestResetError, KprobeError, RegionError, StaleTextError, TargetError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.region.layout import FIRST_PAGE
from gdb_kprobe.region.records import Record, Records
from gdb_kprobe.session.session import Session
from tests.support.toy import Toy

TEXT, TEXT_PHYS = 0xFFFF_FFFF_8010_0000, 0x10_0000
FIRST_CODE = 4 * 0x1000
"""Bytes of the first piece of code, which is at the end."""


def physical(addr: int) -> int:
    return addr - TEXT + TEXT_PHYS


def make_region_full(toy: Toy) -> None:
    """There is no room for another record."""
    toy.region.allocate(Kind.TABLE, toy.region.free)
    with contextlib.suppress(RegionError):
        for addr in range(1 << 16):
            toy.region.records.add(Record(CodePatch(VirtAddr(addr), b"\0", b"\0"), Slot(VirtAddr(0), 64), Rung.BOOSTED))
    toy.machine.log.clear()


def snapshot(toy: Toy) -> tuple[Any, ...]:
    """All that a session and its guest show."""
    session: Session = toy.session
    return (
        toy.changed_text(),
        toy.records(),
        set(toy.machine.breakpoints),
        {
            site.addr: (site.armed, site.plan.rung, [probe.name for probe in site.probes])
            for site in session.table.all()
        },
        [(probe.name, probe.enabled) for probe in session.probes],
        toy.region.slots.used - sum(slot.size for slot in toy.region.slots.quarantined),
    )


# -- order --------------------------------------------------------------------------------------------------------


def test_the_record_comes_before_the_slot_and_the_text_last(toy: Toy) -> None:
    toy.add("f_push")
    assert toy.writes() == ["record", "slot", "text"]
    assert toy.machine.breakpoints


def test_the_text_is_restored_before_the_record_goes(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.writes()
    toy.session.delete(probe)
    assert toy.writes() == ["text", "clear record"]


def test_a_watched_fixup_is_armed_before_its_instruction_and_outlives_it(toy: Toy) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    probe = toy.add("f_load")
    text = [addr for addr, _ in toy.machine.log if TEXT_PHYS <= addr < TEXT_PHYS + 0x1000]
    assert text == [physical(toy.addr("fixup")), physical(toy.addr("f_load"))]
    toy.machine.log.clear()
    toy.session.delete(probe)
    text = [addr for addr, _ in toy.machine.log if TEXT_PHYS <= addr < TEXT_PHYS + 0x1000]
    assert text == [physical(toy.addr("f_load")), physical(toy.addr("fixup"))]


def test_only_one_instruction_of_text_is_written(toy: Toy) -> None:
    probe = toy.add("f_call")
    toy.session.delete(probe)
    site = physical(toy.addr("f_call"))
    assert [entry for entry in toy.machine.log if entry[0] < TEXT_PHYS + 0x1000] == [
        (site, b"\xcc" * 5),
        (site, toy.machine.load(toy.addr("f_call"), 5)),
    ]


def test_the_region_tells_what_is_armed_after_every_act(toy: Toy) -> None:
    """From memory alone: what another gdb would find."""

    def told() -> list[tuple[int, bytes, bytes, Rung]]:
        return [(r.patch.addr, r.patch.old, r.patch.new, r.rung) for r in toy.records()]

    at_push = (toy.addr("f_push"), b"\x55", b"\xcc", Rung.BOOSTED)
    at_jmp = (toy.addr("f_jmp"), toy.machine.load(toy.addr("f_jmp"), 2), b"\xcc\xcc", Rung.SINGLE_STEP)
    push = toy.add("f_push")
    assert told() == [at_push]
    jmp = toy.add("f_jmp", rung=Rung.SINGLE_STEP)
    assert told() == [at_push, at_jmp]
    toy.session.set_enabled(push, False)
    assert told() == [at_jmp]
    toy.session.set_enabled(push, True)
    assert told() == [at_push, at_jmp]
    toy.session.delete(jmp)
    assert told() == [at_push]
    slot = toy.records()[0].slot
    assert toy.machine.load(slot.start, 8) == toy.addr("f_push").to_bytes(8, "little")
    header = toy.header()
    assert header is not None
    assert slot.start in header.code
    toy.session.detach()
    assert toy.header() is None


# -- failures -----------------------------------------------------------------------------------------------------


def at_site(toy: Toy) -> int:
    return physical(toy.addr("f_push"))


def at_slot(toy: Toy) -> int:
    start: int = toy.region.header.phys + toy.region.header.layout.end - FIRST_CODE
    return start


def at_record(toy: Toy) -> int:
    phys: int = toy.region.header.phys
    return phys + (FIRST_PAGE + 2) * 0x1000  # behind the first counters, and definitions


@pytest.mark.parametrize(
    ("how", "where"),
    [("ignored", at_site), ("ignored", at_slot), ("rejected", at_site), ("rejected", at_slot), ("rejected", at_record)],
)
def test_an_add_whose_write_fails_leaves_nothing(toy: Toy, how: str, where: Callable[[Any], int]) -> None:
    addresses = getattr(toy.machine, how)
    addresses.add(where(toy))
    with pytest.raises(TargetError, match="holds" if how == "ignored" else "cannot write"):
        toy.add("f_push")
    addresses.clear()
    assert len(toy.session.probes) == 0
    toy.assert_idle()
    assert toy.call("f_push") == 13
    toy.add("f_push")
    assert toy.call("f_push") == 13
    assert len(toy.hits) == 1


def test_text_that_changes_under_the_plan_is_not_written(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the instruction and writing the int3 the bytes are read again."""
    add_record = Records.add

    def change(*args: Any) -> None:
        add_record(*args)
        toy.machine.ram[at_site(toy)] = 0x90

    monkeypatch.setattr(Records, "add", change)
    with pytest.raises(StaleTextError, match="holds 90, expected 55; nothing was written"):
        toy.add("f_push")
    assert toy.changed_text() == {toy.addr("f_push"): 0x90}
    assert (toy.records(), toy.machine.breakpoints) == ([], set())


def test_text_that_somebody_else_has_changed_is_left_alone(toy: Toy) -> None:
    probe = toy.add("f_push")
    toy.machine.ram[at_site(toy)] = 0x90
    before = snapshot(toy)
    acts: tuple[Callable[[], object], ...] = (
        lambda: toy.session.delete(probe),
        lambda: toy.session.set_enabled(probe, False),
    )
    for act in acts:
        with pytest.raises(StaleTextError):
            act()
        assert snapshot(toy) == before
    done = toy.session.detach()
    assert (done.restored, done.unmapped) == (0, False)
    assert len(done.problems) == 1
    assert done.problems[0].startswith("f_push+0x0: guest text at")
    assert toy.changed_text() == {toy.addr("f_push"): 0x90}
    assert len(toy.records()) == 1, "whoever comes next can find out"


def test_enabling_that_fails_leaves_the_probe_disabled(toy: Toy) -> None:
    probe = toy.add("f_push", enabled=False)
    toy.machine.ignored.add(at_site(toy))
    before = snapshot(toy)
    with pytest.raises(TargetError):
        toy.session.set_enabled(probe, True)
    assert snapshot(toy) == before


def test_a_post_handler_that_cannot_be_armed_leaves_the_boosted_probe_armed(toy: Toy) -> None:
    first = toy.add("p:first f_pushf")
    before = snapshot(toy)
    toy.machine.rejected.add(at_slot(toy) + 64)
    with pytest.raises(TargetError, match="cannot write"):
        toy.add("p:second f_pushf", post=lambda hit: None)
    assert snapshot(toy) == before
    assert toy.call("f_pushf") == 13
    assert first.hits == 1


@pytest.mark.parametrize("where", ["f_load", "fixup"])
def test_a_watched_fixup_goes_when_its_instruction_cannot_be_armed(toy: Toy, where: str) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    toy.machine.ignored.add(physical(toy.addr(where)))
    with pytest.raises(TargetError):
        toy.add("f_load")
    toy.machine.ignored.clear()
    toy.assert_idle()


@pytest.mark.parametrize("place", ["f_push", "f_load"])
def test_when_all_records_are_in_use_nothing_is_written(toy: Toy, place: str) -> None:
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    make_region_full(toy)
    with pytest.raises(RegionError, match="in a piece for records"):
        toy.add(place)
    assert (toy.changed_text(), toy.machine.breakpoints, toy.session.table.all()) == ({}, set(), ())


def test_nothing_is_armed_when_the_mapping_was_tampered_with(toy: Toy) -> None:
    link = toy.region.links[0]
    toy.machine.set_quad(link.addr, 0)
    with pytest.raises(GuestResetError, match="was reset"):
        toy.add("f_push")
    assert toy.writes() == []


def test_a_detach_restores_the_other_sites_when_one_cannot_be(toy: Toy) -> None:
    for name in ("f_nop", "f_push", "f_jmp"):
        toy.add(name)
    toy.machine.rejected.add(at_site(toy))
    done = toy.session.detach()
    assert (done.restored, len(done.problems), done.unmapped) == (2, 1, False)
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}


def test_errors_are_all_of_one_kind_for_the_prompt(toy: Toy) -> None:
    assert issubclass(StaleTextError, KprobeError)
    assert issubclass(RegionError, KprobeError)
