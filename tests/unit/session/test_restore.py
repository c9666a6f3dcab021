"""A session is killed, at any moment, and another one finds what it has left."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from gdb_kprobe.errors import ConnectionLostError, RegionError, TargetError
from gdb_kprobe.model import CpuId, PhysAddr, Rung, VirtAddr
from gdb_kprobe.region.definitions import text_of
from gdb_kprobe.region.records import record_cells
from gdb_kprobe.region.region import adopt
from gdb_kprobe.session.recovery.restore import Restored, restore
from tests.support.cut import is_cut
from tests.support.toy import Toy, ToyMachine, ToyWith

REGION_PHYS = PhysAddr(0x40_0000)
RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)
MOST_CHANGES = 60


def restore_after_kill(toy: Toy) -> Restored:
    """gdb is gone, and with it the stub's breakpoints; a new one attaches."""
    toy.machine.changes_left = None
    toy.machine.breakpoints.clear()
    guest = type(toy.guest)(toy.machine)
    return restore(toy.machine, toy.machine, guest, REGION_PHYS)


def assert_clean(toy: Toy) -> None:
    assert toy.changed_text() == {}
    assert toy.header() is None
    assert toy.machine.walk(toy.region.header.virt) is None


def test_a_region_that_was_never_used_is_nothing_to_restore(machine: ToyMachine) -> None:
    machine.ram[REGION_PHYS : REGION_PHYS + 0x2000] = b"\x5a" * 0x2000
    guest: Any = None
    assert restore(machine, machine, guest, REGION_PHYS) == Restored()
    assert machine.log == []


def test_armed_sites_get_their_text_back_and_the_mapping_goes(toy: Toy) -> None:
    toy.add("f_push")
    toy.add("f_jmp", rung=Rung.SINGLE_STEP)
    done = restore_after_kill(toy)
    assert done.messages == ("an earlier session left 2 site(s) armed; their text is restored",)
    assert (done.kept, done.sites) == (None, 2)
    assert [(left.text, left.strategy) for left in done.definitions] == [
        (text_of(probe.spec), probe.strategy) for probe in toy.session.probes
    ]
    assert_clean(toy)
    assert (toy.call("f_push"), toy.call("f_jmp")) == (13, 13)


def test_a_disabled_probe_is_nothing_to_restore(toy: Toy) -> None:
    toy.session.set_enabled(toy.add("f_push"), False)
    done = restore_after_kill(toy)
    assert (done.messages, done.kept, done.sites) == ((), None, 0)
    assert [left.enabled for left in done.definitions] == [False]
    assert_clean(toy)


def test_a_region_of_an_earlier_boot_is_cleared_and_no_text_is_touched(toy: Toy) -> None:
    """Reserved memory survives a reset; the page-table entry that maps the region does not."""
    toy.add("f_push")
    toy.machine.set_quad(toy.region.links[0].addr, 0)
    done = restore_after_kill(toy)
    assert "earlier boot" in done.messages[0]
    assert (done.kept, done.sites, toy.header()) == (None, 0, None)
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}


@pytest.mark.parametrize("what", ["build_id", "text_base", "bp_entry"])
def test_a_region_of_another_kernel_is_cleared_and_no_text_is_touched(toy: Toy, what: str) -> None:
    toy.add("f_push")
    header = toy.region.header
    others = {
        "build_id": replace(header.identity, build_id=bytes(19) + b"x"),
        "text_base": replace(header.identity, text_base=VirtAddr(0x1000)),
        "bp_entry": replace(header.identity, bp_entry=VirtAddr(0x1000)),
    }
    changed = replace(header, identity=others[what])
    toy.machine.ram[REGION_PHYS : REGION_PHYS + len(changed.pack())] = changed.pack()
    assert restore_after_kill(toy).sites == 0
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}


def test_text_that_somebody_has_changed_since_is_left_alone_and_named(toy: Toy) -> None:
    toy.add("f_nop")
    toy.add("f_push")
    toy.machine.ram[0x10_0000 + toy.addr("f_push") - toy.addr("f_nop")] = 0x90
    done = restore_after_kill(toy)
    assert f"{toy.addr('f_push'):#x} holds 90, neither our cc nor the original 55; left alone" in done.messages[1]
    assert toy.changed_text() == {toy.addr("f_push"): 0x90}


def test_text_that_is_unmapped_by_now_is_left_alone_and_named(toy: Toy) -> None:
    toy.add("f_push")
    toy.machine.set_quad(toy.guest.memory.entries(toy.addr("f_push"))[-1].addr, 0)
    done = restore_after_kill(toy)
    assert done.messages[1] == f"{toy.addr('f_push'):#x} is not mapped any more; left alone"


def test_text_that_cannot_be_written_is_an_error_and_the_record_stays(toy: Toy) -> None:
    toy.add("f_push")
    toy.machine.ignored.add(0x10_0000 + toy.addr("f_push") - toy.addr("f_nop"))
    with pytest.raises(TargetError, match="the guest holds cc"):
        restore_after_kill(toy)
    assert len(toy.records()) == 1


def test_a_task_in_the_region_keeps_the_mapping_and_its_slots(toy: Toy, toy_with: ToyWith) -> None:
    probe = toy.add("f_push")
    slot = toy.session.table.need(probe).plan.slot
    toy.put("f_nop", cpu=2)
    values = toy.machine.registers[2]
    values["rsp"] -= 8
    toy.machine.set_quad(values["rsp"] - 0xFFFF_FFFF_8030_0000 + 0x30_0000, slot.code + 1)  # an interrupted RIP
    done = restore_after_kill(toy)
    assert toy.changed_text() == {}
    assert done.kept is not None
    assert done.kept == toy.header()
    assert toy.machine.load(slot.code, 1) == b"\x55"

    region = adopt(toy.machine, toy.machine, toy.guest, done.kept)
    assert region.links == toy.region.links
    given = [region.slots.allocate(1000) for _ in range(100)]
    assert not any(other is not None and other.range.overlaps(slot.range) for other in given)
    assert region.header.virt == toy.region.header.virt
    assert region.header.owner == toy.region.header.owner + 1


# -- killed at any moment -----------------------------------------------------------------------------------------

FUNCTIONS = ["f_nop", "f_push", "f_lea", "f_jcc+2", "f_back+6", "f_call", "f_call_register+7", "f_jmp", "f_ret", "leaf"]


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("place", FUNCTIONS)
def test_a_kill_at_any_moment_of_a_hit(toy: Toy, place: str, rung: Rung) -> None:
    """After each change that a dispatch makes to the machine; the guest then computes what it would have."""
    function = place.partition("+")[0]
    expected = toy.call(function)
    for count in range(MOST_CHANGES):
        toy.add(f"p:killed{count} {place}", rung=rung)
        toy.put(function)
        toy.run_until(toy.addr("bp_entry"))
        toy.machine.changes_left = count
        killed = is_cut(toy.session.on_breakpoint, CpuId(1))
        done = restore_after_kill(toy)
        assert_clean(toy)
        assert toy.resume() == expected, f"killed after {count} changes"
        assert [left.hits for left in done.definitions] == [min(count, 1)], "counting is the first change"
        if not killed:
            return
        toy = toy.again()
    raise AssertionError("a dispatch has no end")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("place", FUNCTIONS)
def test_a_connection_lost_at_any_moment_of_a_hit_and_made_again(toy: Toy, place: str, rung: Rung) -> None:
    """The same session detaches over a new connection."""
    function = place.partition("+")[0]
    expected = toy.call(function)
    for count in range(MOST_CHANGES):
        toy.add(f"p:lost{count} {place}", rung=rung)
        toy.put(function)
        toy.run_until(toy.addr("bp_entry"))
        toy.machine.changes_left = count
        lost = is_cut(toy.session.on_breakpoint, CpuId(1))
        toy.machine.changes_left = None
        assert toy.session.detach().problems == ()
        assert_clean(toy)
        assert toy.resume() == expected, f"lost after {count} changes"
        if not lost:
            return
        toy = toy.again()
    raise AssertionError("a dispatch has no end")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("place", [*FUNCTIONS, "f_loop+6"])
def test_a_kill_at_any_moment_behind_the_trap_and_nobody_comes(toy: Toy, place: str, rung: Rung) -> None:
    """The guest runs on from there, as if the hit had been handled; the probe's next hit is another matter."""
    function = place.partition("+")[0]
    expected = toy.call(function, rdi=1)
    for count in range(MOST_CHANGES):
        toy.add(f"p:killed{count} {place}", rung=rung)
        toy.reset_count(function)
        toy.put(function, rdi=1)
        toy.run_until(toy.addr("bp_entry"))
        toy.machine.changes_left = count
        killed = is_cut(toy.session.on_breakpoint, CpuId(1))
        if toy.machine.registers[1]["rip"] != toy.addr("bp_entry"):
            toy.machine.breakpoints.clear()
            assert toy.resume() == expected, f"killed after {count} changes"
            assert toy.count(function) == (0 if function in ("f_ret", "leaf") else 1)
        if not killed:
            assert count >= 2
            return
        restore_after_kill(toy)
        toy = toy.again()
    raise AssertionError("a dispatch has no end")


def test_a_kill_at_any_moment_of_a_hit_that_faults(toy: Toy) -> None:
    for count in range(MOST_CHANGES):
        toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
        toy.add(f"p:killed{count} f_load")
        toy.put("f_load", rdi=0x10)
        toy.run_until(toy.addr("bp_entry"))
        toy.machine.changes_left = count
        killed = is_cut(toy.session.on_breakpoint, CpuId(1))
        restore_after_kill(toy)
        assert_clean(toy)
        assert toy.resume() == (1 << 64) - 14, f"killed after {count} changes"
        if not killed:
            return
        toy = toy.again()
    raise AssertionError("a dispatch has no end")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("act", ["add", "disable", "delete", "detach", "post"])
def test_a_kill_at_any_moment_of_an_act(toy: Toy, act: str, rung: Rung) -> None:
    for count in range(MOST_CHANGES):
        probe = None if act == "add" else toy.add(f"p:probe{count} f_push", rung=rung)
        toy.machine.changes_left = count
        try:
            match act:
                case "add":
                    toy.add(f"p:probe{count} f_push", rung=rung)
                case "disable":
                    assert probe is not None
                    toy.session.set_enabled(probe, False)
                case "delete":
                    assert probe is not None
                    toy.session.delete(probe)
                case "detach":
                    toy.session.detach()
                case "post":
                    toy.add(f"p:post{count} f_push", post=lambda hit: None)
        except ConnectionLostError:
            killed = True
        else:
            killed = toy.machine.changes_left == 0  # a detach goes on and names what it could not do
        restore_after_kill(toy)
        assert toy.changed_text() == {}, f"killed after {count} changes"
        assert toy.header() is None
        assert toy.call("f_push") == 13
        if not killed:
            return
        toy = toy.again()
    raise AssertionError("an act has no end")


@pytest.mark.parametrize("count", range(8))
def test_a_kill_in_the_middle_of_restoring_is_restored_by_the_next(toy: Toy, count: int) -> None:
    for name in ("f_nop", "f_push", "f_jmp"):
        toy.add(name)
    toy.put_at_trap("f_push")
    toy.machine.breakpoints.clear()
    toy.machine.changes_left = count
    try:
        restore(toy.machine, toy.machine, toy.guest, REGION_PHYS)
    except ConnectionLostError:
        restore_after_kill(toy)
    assert toy.changed_text() == {}
    assert toy.header() is None
    assert toy.resume() == 13


class TestDamage:
    """The guest has written over what a session has left, or forged it."""

    @staticmethod
    def flip(toy: Toy, at: int, bit: int = 1) -> None:
        toy.machine.ram[at] ^= bit

    def test_a_record_that_was_written_over_writes_nothing_and_is_named(self, toy: Toy) -> None:
        """Its original bytes are another instruction's: they must not get into text."""
        toy.add("f_push")
        toy.add("f_jmp")
        header = toy.region.header
        own = toy.addr("f_push").to_bytes(8, "little")
        [at] = [at for at, data in record_cells(toy.machine, header) if data[8:16] == own]
        self.flip(toy, at + 32)  # old
        done = restore_after_kill(toy)
        assert toy.changed_text() == {toy.addr("f_push"): 0xCC}
        assert any(re.match(r"record \d of the region is damaged: its checksum is wrong", m) for m in done.messages)
        # Its int3 may still lead there.
        assert done.kept == toy.header()

    @pytest.mark.parametrize("at", [12, 16, 24, 32, 90, 146])
    def test_a_header_that_was_written_over_is_refused_while_it_is_mapped(self, toy: Toy, at: int) -> None:
        toy.add("f_push")
        self.flip(toy, REGION_PHYS + at)
        toy.machine.log.clear()
        with pytest.raises(RegionError, match=r"header at physical 0x400000 is damaged \(its checksum is wrong\)"):
            restore_after_kill(toy)
        assert toy.machine.log == []
        assert toy.changed_text() == {toy.addr("f_push"): 0xCC}

    def test_a_directory_that_was_written_over_is_refused(self, toy: Toy) -> None:
        """What is in text is not known without the records."""
        toy.add("f_push")
        self.flip(toy, REGION_PHYS + 0x1000 + 8)
        toy.machine.log.clear()
        with pytest.raises(RegionError, match="checksum of an entry of the region's directory is wrong"):
            restore_after_kill(toy)
        assert toy.machine.log == []
        assert toy.changed_text() == {toy.addr("f_push"): 0xCC}

    def test_a_damaged_header_that_nothing_maps_is_cleared(self, toy: Toy) -> None:
        """Reserved memory survives a reset: what is there is of no use."""
        for link in toy.region.links:
            toy.machine.set_quad(link.addr, 0)
        self.flip(toy, REGION_PHYS + 20)
        done = restore_after_kill(toy)
        assert "damaged header (its checksum is wrong)" in done.messages[0]
        assert toy.header() is None

    def test_a_header_of_another_mapping_than_there_is_clears_no_page_table_entry(self, toy: Toy) -> None:
        header = toy.region.header
        forged = replace(header, virt=VirtAddr(toy.addr("f_nop") & -0x20_0000), gate=VirtAddr(0))
        toy.machine.ram[REGION_PHYS : REGION_PHYS + len(forged.pack())] = forged.pack()
        toy.machine.log.clear()
        with pytest.raises(RegionError, match="where it says that the region is mapped, is not mapped"):
            restore_after_kill(toy)
        assert toy.machine.log == []
