"""Many sites at once: by how much work, and that it comes to the same as one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import StaleTextError, TargetError, UnmappedError
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.model import PAGE_SIZE, VirtAddr
from gdb_kprobe.session.probes import Site
from gdb_kprobe.session.sites.sites import Sites
from gdb_kprobe.session.transaction import apply, apply_by_page
from tests.support.toy import Toy

SIZE = 3 * PAGE_SIZE
UNMAPPED = range(PAGE_SIZE, 2 * PAGE_SIZE)
DISTANCE = 8


class Text:
    """Memory whose second page is not mapped, and that counts; *rejected* are the addresses that take no write."""

    def __init__(self, rejected: frozenset[int] = frozenset()) -> None:
        self.data = bytearray(range(256)) * (SIZE // 256)
        self.rejected = rejected
        self.reads = self.writes = 0

    def read(self, addr: VirtAddr, size: int) -> bytes:
        self._check(addr, size)
        self.reads += 1
        return bytes(self.data[addr : addr + size])

    def write(self, addr: VirtAddr, data: bytes) -> None:
        self._check(addr, len(data))
        if any(at in self.rejected for at in range(addr, addr + len(data)) if self.data[at] != data[at - addr]):
            raise TargetError("read-only")
        self.writes += 1
        self.data[addr : addr + len(data)] = data

    def _check(self, addr: VirtAddr, size: int) -> None:
        if any(at in UNMAPPED for at in (addr, addr + size - 1)):
            raise UnmappedError(addr)


@given(
    st.sets(st.integers(0, SIZE // DISTANCE - 2), max_size=60),
    st.sets(st.integers(0, SIZE // DISTANCE - 2), max_size=9),
    st.sets(st.integers(0, SIZE // DISTANCE - 2), max_size=3),
)
def test_patches_by_page_come_to_the_same_as_one_after_the_other(
    places: set[int], stale: set[int], rejected: set[int]
) -> None:
    """Some are stale, some cannot be written, some are not mapped, some lie in two pages."""
    by_page, one_by_one = (Text(frozenset(place * DISTANCE for place in rejected)) for _ in range(2))
    patches = []
    for place in places:
        addr = VirtAddr(place * DISTANCE + (DISTANCE - 2 if place % 64 == 63 else 0))
        old = bytes(one_by_one.data[addr : addr + 5])
        patches.append(CodePatch(addr, b"stale" if place in stale else old, b"\xe9ours"))
    wrong = []
    for patch in patches:
        try:
            apply(one_by_one, [patch])
        except (StaleTextError, TargetError):
            wrong.append(patch)
    still_wrong = []
    for patch in apply_by_page(by_page, patches):
        try:
            apply(by_page, [patch])
        except (StaleTextError, TargetError):
            still_wrong.append(patch)
    assert by_page.data == one_by_one.data
    assert set(still_wrong) == set(wrong)


def test_many_patches_of_a_page_are_one_write_that_is_read_back() -> None:
    text = Text()
    patches = [CodePatch(VirtAddr(at), bytes(text.data[at : at + 5]), b"\xe9ours") for at in range(0, 4000, 8)]
    assert apply_by_page(text, patches) == []
    assert (text.reads, text.writes) == (2, 1)


def test_a_resume_with_the_same_sites_serves_none_of_them(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[VirtAddr] = []
    serve = Sites.serve

    def noted(self: Sites, site: Site) -> None:
        served.append(site.addr)
        serve(self, site)

    monkeypatch.setattr(Sites, "serve", noted)
    toy.session.unlisten(toy.hits.append)

    def resume() -> list[VirtAddr]:
        toy.session.disarm_all()
        served.clear()
        assert toy.session.arm_all() == ()
        return list(served)

    push, nop = toy.add("f_push"), toy.add("f_nop")
    assert sorted(resume()) == sorted([toy.addr("f_push"), toy.addr("f_nop")])
    assert resume() == []
    toy.session.set_enabled(push, False)
    toy.session.set_enabled(push, True)
    toy.add("p:again f_nop")
    resume()
    assert resume() == []
    toy.session.listen(listener := (lambda hit: None), [nop])
    assert resume() == [toy.addr("f_nop")], "it asks the host now"
    assert resume() == []
    toy.session.unlisten(listener)
    assert resume() == [toy.addr("f_nop")]
    assert resume() == []


@pytest.mark.parametrize("change", [lambda probe: setattr(probe, "enabled", False)])
def test_a_change_that_nobody_was_told_of_is_seen_at_the_resume(toy: Toy, change: Callable[..., None]) -> None:
    probe = toy.add("p:one f_push")
    toy.add("p:two f_push")
    toy.session.disarm_all()
    toy.session.arm_all()
    site = toy.session.table.need(probe)
    before = site.served
    toy.session.disarm_all()
    change(probe)
    toy.session.arm_all()
    assert site.served != before
