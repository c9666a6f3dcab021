"""What a session says of itself, against the memory of the machine."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import KprobeError, RefusedError
from gdb_kprobe.model import Reason, Rung
from gdb_kprobe.session.inspect import (
    ProbeInfo,
    function_of,
    guest_of,
    place_of,
    probe_of,
    region_of,
    site_of,
    sites_of,
)
from tests.support.toy import Toy

REGION_SIZE = 2 << 20


def test_each_site_is_told_with_what_the_memory_holds(toy: Toy) -> None:
    toy.add("f_push")
    toy.add("p:again f_push")
    toy.add("f_lea", rung=Rung.SINGLE_STEP)
    before = {toy.addr(name): name for name in ("f_push", "f_lea")}
    found = sites_of(toy.session)
    assert [site.addr for site in found] == sorted(before)
    text = {site.addr: toy.machine.load(site.addr, len(site.patched)) for site in found}
    for site in found:
        at = site.addr - toy.addr("f_nop")
        assert site.original == toy.machine.text[at : at + len(site.original)] == site.insn.raw
        assert site.patched == text[site.addr]
        assert site.range.size == len(site.original)
        assert int.from_bytes(toy.machine.load(site.slot.start, 8), "little") == site.addr
        assert (site.is_armed, site.is_saved, site.stops, site.owner) == (True, False, True, "")
        assert str(site.place) == f"{before[site.addr]}+0x0"
    names = {site.addr: (site.probes, site.rung) for site in found}
    assert names == {
        toy.addr("f_push"): (("f_push", "again"), Rung.BOOSTED),
        toy.addr("f_lea"): (("f_lea",), Rung.SINGLE_STEP),
    }


def test_a_probe_is_told_with_the_rung_of_its_site_and_a_noted_one_without(toy: Toy) -> None:
    probe = toy.add("f_push")
    assert probe_of(toy.session, probe) == ProbeInfo(probe, 0, 0, Rung.BOOSTED)
    toy.session.delete(probe)
    assert probe_of(toy.session, probe) == probe_of(None, probe) == ProbeInfo(probe, 0, 0)


def test_a_disabled_site_is_told_and_is_not_in_the_text(toy: Toy) -> None:
    probe = toy.add("f_push", enabled=False)
    (site,) = sites_of(toy.session)
    assert site == site_of(toy.session, probe)
    assert not site.is_armed
    assert toy.machine.load(site.addr, len(site.original)) == site.original
    toy.session.set_enabled(probe, True)
    (site,) = sites_of(toy.session)
    assert site.is_armed
    assert toy.machine.load(site.addr, len(site.patched)) == site.patched
    toy.session.delete(probe)
    assert sites_of(toy.session) == ()
    assert site_of(toy.session, probe) is None
    with pytest.raises(KprobeError, match="f_push is not there: it was deleted"):
        toy.session.delete(probe)
    toy.add("f_push")
    assert site_of(toy.session, probe) is None, "another one is there now"


def test_why_not_a_better_rung_is_told(toy: Toy) -> None:
    site = site_of(toy.session, toy.add("f_pushf", post=lambda hit: None))
    assert site is not None
    assert {rung: refusal.reason for rung, refusal in site.declined} == {
        Rung.OPTIMIZED: Reason.POLICY,
        Rung.BOOSTED: Reason.NEEDS_SINGLE_STEP,
    }


def test_a_site_of_the_plugins_own_is_told_without_a_name(toy: Toy) -> None:
    """Where a fault of the probed instruction goes on there is a patch, too."""
    toy.machine.fixups[toy.addr("f_load")] = toy.addr("fixup")
    toy.add("f_load")
    assert {site.addr: site.probes for site in sites_of(toy.session)} == {
        toy.addr("f_load"): ("f_load",),
        toy.addr("fixup"): (),
    }
    assert {addr for site in sites_of(toy.session) for addr in range(site.range.start, site.range.end)} >= set(
        toy.changed_text()
    )


def test_the_region_is_told_and_what_fills_it(toy: Toy) -> None:
    empty = region_of(toy.session)
    assert (empty.range.size, empty.slots_used, empty.quarantined) == (REGION_SIZE, 0, 0)
    found = toy.machine.walk(empty.range.start)
    assert found is not None
    assert empty.phys == found[0]
    assert empty.header.start == empty.range.start
    assert empty.header.end < empty.code.start < empty.code.end
    assert empty.free + sum(found.size for found in empty.objects) == empty.code.end - empty.header.end
    assert empty.code.end <= empty.range.end
    probe = toy.add("f_push")
    site = site_of(toy.session, probe)
    assert site is not None
    assert empty.code.start <= site.slot.start < site.slot.end <= empty.code.end
    assert region_of(toy.session).slots_used == site.slot.size
    assert probe.counter is not None
    counters = [found.range(empty.range.start) for found in empty.objects if found.name == "counters"]
    assert sum(probe.counter.addr in area for area in counters) == 1
    assert len(toy.records()) == 1


def test_hits_that_stop_the_machine_are_counted(toy: Toy) -> None:
    toy.add("f_push")
    for calls in range(1, 4):
        toy.call("f_push")
        toy.call("f_nop")
        assert toy.session.stops == calls


def test_a_guest_without_linux_has_no_release(toy: Toy) -> None:
    guest = guest_of(toy.session, 2)
    assert (guest.release, guest.slide, guest.vcpus) == ("", 0, 2)
    assert guest.bp_entry == toy.addr("bp_entry")


def test_a_place_is_named_by_text_or_address(toy: Toy) -> None:
    assert place_of(toy.session, "f_jcc+2") == place_of(toy.session, toy.addr("f_jcc", 2))
    assert place_of(toy.session, f"{toy.addr('f_jcc', 2):#x}").addr == toy.addr("f_jcc", 2)
    with pytest.raises(RefusedError, match="nosuch is not in the symbol file"):
        place_of(toy.session, "nosuch")


def test_a_function_is_what_it_is_without_probes(toy: Toy) -> None:
    before = function_of(toy.session, "f_jcc+2")
    code = b"".join(insn.raw for insn in before.insns)
    assert code == toy.machine.load(toy.addr("f_jcc"), len(code))
    toy.add("f_jcc+2")
    assert toy.machine.load(toy.addr("f_jcc"), len(code)) != code
    after = function_of(toy.session, "f_jcc+2")
    assert [insn.raw for insn in after.insns] == [insn.raw for insn in before.insns]
    assert after.ftrace == ()
