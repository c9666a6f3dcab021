"""The region: put in place by stores to the guest's page tables, checked, taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from gdb_kprobe.errors import GuestStateError, RegionError
from gdb_kprobe.model import AddressRange, PhysAddr, VirtAddr
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.region.header import read_header
from gdb_kprobe.region.region import create_mapped, create_premapped, links_of
from tests.support.toy import Toy, ToyMachine, ToyWith

MIB = 1 << 20
PHYS, SIZE = PhysAddr(0x40_0000), 2 * MIB
WINDOW = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
READ, WRITE, EXEC = 1, 2, 4
P, W, NX = 1, 2, 1 << 63
PREMAPPED = VirtAddr(0xFFFF_FFFF_9000_0000)


def test_code_is_executable_data_is_writable_and_nothing_is_both(toy: Toy) -> None:
    toy.add("f_push")
    toy.region.allocate(Kind.TABLE, 0x7000)
    toy.region.slots.allocate(0x7000)
    toy.region.commit()
    header = toy.region.header
    mapped = {READ | WRITE: 0, READ | EXEC: 0}
    for at in range(0, SIZE, 0x1000):
        found = toy.machine.walk(header.virt + at)
        if at < header.data_end * 0x1000:
            assert found == (PHYS + at, READ | WRITE)
        elif header.code_start * 0x1000 <= at < header.layout.end:
            assert found == (PHYS + at, READ | EXEC)
        else:
            assert found is None, "what is not in use, and the page tables, are not mapped"
            continue
        mapped[found[1]] += 1
    assert mapped == {READ | WRITE: 2 + 3 + 7, READ | EXEC: 4 + 7 + 1}
    assert toy.machine.walk(header.virt - 1) is None
    assert toy.machine.walk(header.virt + SIZE) is None


def test_it_is_put_at_the_top_of_the_window_by_one_store_to_the_guests_tables(
    machine: ToyMachine, toy_with: ToyWith
) -> None:
    before = bytes(machine.ram[:PHYS]) + bytes(machine.ram[PHYS + SIZE :])
    toy = toy_with(machine)
    after = bytes(machine.ram[:PHYS]) + bytes(machine.ram[PHYS + SIZE :])
    changed = {at & -8 for at in range(len(before)) if before[at] != after[at]}
    assert toy.region.header.virt == WINDOW.end - SIZE
    assert changed == {link.addr - SIZE for link in toy.region.links}
    assert len(changed) == 1


def test_the_links_are_found_again_from_the_guests_tables(toy: Toy) -> None:
    header = toy.region.header
    assert links_of(toy.guest.memory, header.virt, header.phys, header.size) == toy.region.links
    assert links_of(toy.guest.memory, VirtAddr(0xFFFF_FFFF_8000_0000), header.phys, header.size) == ()
    assert header.identity.entry_addr == toy.region.links[0].addr
    assert header.identity.entry_value == toy.machine.quad(toy.region.links[0].addr)


def test_a_wish_is_granted(machine: ToyMachine, toy: Toy) -> None:
    toy.session.detach()
    virt = VirtAddr(0xFFFF_FFFF_C040_0000)
    region = create_mapped(machine, machine, toy.guest, PHYS, SIZE, virt, WINDOW)
    assert region.header.virt == virt
    found = machine.walk(virt)
    assert found is not None
    assert found[0] == PHYS


def test_a_place_that_is_taken_is_refused_and_nothing_is_written(machine: ToyMachine, toy: Toy) -> None:
    toy.session.detach()
    virt = VirtAddr(0xFFFF_FFFF_C040_0000)
    machine.map(virt + MIB, 0x20_0000, P)
    machine.log.clear()
    toy.guest.refresh()
    with pytest.raises(RegionError, match=f"{virt:#x} is taken in the guest"):
        create_mapped(machine, machine, toy.guest, PHYS, SIZE, virt, WINDOW)
    assert machine.log == []


def test_a_window_without_room_is_refused_and_nothing_is_written(machine: ToyMachine, toy: Toy) -> None:
    toy.session.detach()
    window = AddressRange(WINDOW.start, VirtAddr(WINDOW.start + 2 * MIB))
    machine.map(window.start, 0x20_0000, P)
    machine.log.clear()
    toy.guest.refresh()
    with pytest.raises(RegionError, match="no 2 MiB of empty 2 MiB slots"):
        create_mapped(machine, machine, toy.guest, PHYS, SIZE, None, window)
    assert machine.log == []


def test_after_unmapping_no_vcpu_can_reach_it_any_more(toy: Toy) -> None:
    """Also not by what its TLB holds."""
    probe = toy.add("f_push")
    code = toy.session.table.need(probe).plan.slot.code
    assert toy.call("f_push") == 13  # the vCPU has executed in the slot
    link = toy.region.links[0]
    assert toy.session.detach().unmapped
    assert (toy.machine.quad(link.addr), read_header(toy.machine, PHYS)) == (0, None)
    toy.put("f_nop", rip=code)
    toy.machine.execute(1)
    assert toy.machine.registers[1]["rip"] == toy.addr("pf_entry")


def test_a_detach_with_a_task_in_the_region_keeps_the_mapping(toy: Toy) -> None:
    probe = toy.add("f_push")
    code = toy.session.table.need(probe).plan.slot.code
    toy.put("f_nop")
    toy.machine.registers[1]["rsp"] -= 8
    toy.machine.set_quad(toy.machine.registers[1]["rsp"] - 0xFFFF_FFFF_8030_0000 + 0x30_0000, code)
    done = toy.session.detach()
    assert (done.restored, done.unmapped, done.problems) == (1, False, ())
    [note] = done.notes
    assert note.startswith("the region stays mapped, for 1 word(s) on kernel stacks")
    assert toy.changed_text() == {}
    assert toy.machine.load(code, 1) == b"\x55"


def test_a_changed_entry_means_that_it_is_not_mapped(toy: Toy) -> None:
    assert toy.region.is_mapped(toy.machine)
    link = toy.region.links[0]
    toy.machine.set_quad(link.addr, link.value | 1 << 9)
    assert not toy.region.is_mapped(toy.machine)


def test_an_entry_that_is_somebody_elses_now_is_not_cleared(toy: Toy) -> None:
    link = toy.region.links[0]
    toy.machine.set_quad(link.addr, 0x1234_5003)
    toy.region.unmap(toy.machine)
    assert int.from_bytes(toy.machine.read_physical(link.addr, 8), "little") == 0x1234_5003


@contextlib.contextmanager
def lender(toy: Toy, given: list[int]) -> Iterator[Callable[[], None]]:
    """What has lent the region's memory; it notes how many writes there were when it got it back."""
    link = toy.region.links[0]
    assert toy.region.is_mapped(toy.machine), "it is not taken away before it is known that it can be given back"

    def give_back() -> None:
        assert int.from_bytes(toy.machine.read_physical(link.addr, 8), "little") == 0
        assert read_header(toy.machine, toy.region.header.phys) is None
        given.append(len(toy.machine.log))

    yield give_back


def test_lent_memory_is_given_back_when_nothing_tells_of_it_any_more(toy: Toy) -> None:
    given: list[int] = []
    toy.region.giving_back = lambda: lender(toy, given)
    toy.put("f_nop")
    done = toy.session.detach()
    assert (done.unmapped, done.problems, done.notes) == (True, (), ())
    assert given == [len(toy.machine.log)], "not a byte is written to it afterwards"


def test_lent_memory_that_cannot_be_given_back_stays_for_the_next_attach(toy: Toy) -> None:
    def nobody_came() -> NoReturn:
        raise GuestStateError("nobody came")

    toy.region.giving_back = nobody_came
    toy.add("f_nop")
    done = toy.session.detach()
    assert (done.restored, done.unmapped, done.problems) == (1, False, ("the region is not taken away: nobody came",))
    assert toy.region.is_mapped(toy.machine)
    assert read_header(toy.machine, toy.region.header.phys) is not None


def test_memory_that_was_exchanged_meanwhile_is_not_given_back(toy: Toy) -> None:
    given: list[int] = []

    @contextlib.contextmanager
    def with_a_reset() -> Iterator[Callable[[], None]]:
        with lender(toy, given) as give_back:
            toy.machine.set_quad(toy.region.links[0].addr, 0)
            yield give_back

    toy.region.giving_back = with_a_reset
    written = len(toy.machine.log)
    assert "the guest was reset, or a snapshot loaded" in toy.session.detach().problems[0]
    assert not given
    # Only what was written before the reset: the marks of the act.
    header = toy.region.header.phys
    assert not [at for at, _ in toy.machine.log[written:] if at == header], "the header is not touched"


# -- memory that the guest has mapped itself ----------------------------------------------------------------------


@pytest.fixture
def premap(machine: ToyMachine, toy: Toy) -> Any:
    """A function that maps 2 MiB for writing and executing, with one page as the test wants it, and starts a region."""
    toy.session.detach()

    def make(odd: int | None = None, phys: int | None = None, flags: int = P | W) -> Any:
        for at in range(0, SIZE, 0x1000):
            if at != odd:
                machine.map(PREMAPPED + at, PHYS + at, P | W)
            elif phys is not None:
                machine.map(PREMAPPED + at, phys, flags)
        toy.guest.refresh()
        machine.log.clear()
        return create_premapped(machine, machine, toy.guest, PREMAPPED, SIZE)

    return make


def test_memory_that_is_mapped_for_everything_is_taken_as_it_is(premap: Any, machine: ToyMachine) -> None:
    region = premap()
    assert (region.links, region.header.phys, region.header.identity.entry_addr) == ((), PHYS, 0)
    assert read_header(machine, PHYS) == region.header
    assert [at for at, _ in machine.log] == [PHYS + 0x1000, PHYS], "directory, header"


@pytest.mark.parametrize(
    ("phys", "flags", "message"),
    [
        (None, 0, "not mapped"),
        (0x20_0000, P | W, "not contiguous"),
        (PHYS + 0x7000, P, "not writable"),
        (PHYS + 0x7000, P | W | NX, "executable"),
    ],
)
def test_one_page_that_is_different_is_named(
    premap: Any, machine: ToyMachine, phys: Any, flags: int, message: str
) -> None:
    with pytest.raises(RegionError, match=f"{message}.* at {PREMAPPED + 0x7000:#x}"):
        premap(0x7000, phys, flags)
    assert machine.log == []


def test_a_place_where_nothing_is_mapped_is_refused(premap: Any) -> None:
    with pytest.raises(RegionError, match=f"region.virtual {PREMAPPED:#x} is not mapped in the guest"):
        premap(0)
