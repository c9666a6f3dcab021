"""A session on a real QEMU, without gdb: the bare-metal guest over the socket client, its own counters as oracle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.config.load import load_profile
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import CpuId, PhysAddr, Rung, VirtAddr
from gdb_kprobe.session.attach import attach
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from kprobe_guest import GuestSpec, GuestVm
from tests.support.client import StubClient
from tests.support.cut import CutChannel, is_cut
from tests.support.probed import Booted

pytestmark = pytest.mark.live

PROFILE = Path(__file__).resolve().parents[2] / "configs" / "bare.yaml"
RUNGS = (Rung.BOOSTED, Rung.SINGLE_STEP)
ROUNDS = 50

LOCKED = ("f_tail", "f_flags")
"""Functions that begin with a locked instruction, which cannot be probed yet."""

# Hits in one round of the guest's loop, of every place that is not the entry of a function called once.
SITES = {
    "f_tail+8": 1,
    "f_flags+8": 1,
    "leaf": 4,
    "f_jcc_backwards_site": 6,
    "f_jcc_backwards_jump": 6,
    "f_jcc_near_jump": 1,
    "f_loop_site": 6,
    "f_flags_site": 1,
    "f_call_return+8": 1,
}


class BareSession(StubClient):
    """An attachment to the guest, and the loop that gdb would be: resume, stop, dispatch."""

    def __init__(self, guest: GuestVm) -> None:
        image = guest.bare_image()
        environment = {"KPROBE_GUEST": str(guest.directory), "KPROBE_SYMBOLS": str(image.symbols_path)}
        self.symbols = image.symbols
        self.channel = CutChannel(guest.gdb_address, counts=bool)
        super().__init__(self.channel)
        self.attached = attach(self.stub, load_profile(PROFILE, environment), self)
        self.session = self.attached.session

    def add(self, place: str, rung: Rung, **handlers: Any) -> Probe:
        probe = Probe(parse_definition(f"p:{place.replace('+', '_')} {place}"), strategy=rung, **handlers)
        return self.session.add(probe)

    def stop(self) -> CpuId:
        """Resume, and wait for a stop."""
        self.channel.resume()
        return self.wait_stop()

    def run(self, until: Callable[[], bool]) -> None:
        """Run until a dispatch has made *until* true. A breakpoint of the guest's own is let through."""
        entry = self.session.guest.bp_entry
        while not until():
            cpu = self.stop()
            self.session.on_breakpoint(cpu)
            if self.stub.read_register(cpu, "rip") == entry:
                self.remove(entry)
                while self.stub.read_register(cpu, "rip") == entry:
                    self.stub.step(cpu)
                self.insert(entry)

    def run_to_hits(self, probe: Probe, hits: int) -> None:
        """Run until *probe* was hit so often."""
        self.run(lambda: probe.hits == hits)

    def run_to(self, name: str) -> None:
        """Run to a place where there is no probe, with no probe armed."""
        addr = VirtAddr(self.symbols[name])
        self.insert(addr)
        cpu = self.stop()
        self.remove(addr)
        assert self.stub.read_register(cpu, "rip") == addr


@pytest.fixture
def guest(booted_guest: Booted) -> GuestVm:
    return booted_guest(GuestSpec(kernel="bare"))


@pytest.fixture
def bare(guest: GuestVm) -> Iterator[BareSession]:
    """A session at the start of a round; afterwards the guest's text is as it was, and the guest goes on."""
    bare = BareSession(guest)
    text = guest_text(guest)
    bare.run_to("main_loop")
    yield bare
    assert bare.session.detach().problems == ()
    bare.channel.detach()
    assert guest_text(guest) == text
    assert_goes_on(guest)


def guest_text(guest: GuestVm) -> bytes:
    """The guest's text, by the file of its RAM."""
    image = guest.bare_image()
    start = image.physical("image")
    return guest.read_ram(start, image.physical("end_of_text") - start)


def assert_goes_on(guest: GuestVm) -> None:
    rounds = guest.bare_image().physical("rounds")
    enough = guest.read_u64(rounds) + 10
    deadline = time.monotonic() + 10
    while guest.read_u64(rounds) < enough:
        guest.check()
        assert time.monotonic() < deadline, "the guest stands still"
        time.sleep(0.001)


def places(guest: GuestVm) -> dict[str, int]:
    entries = (name for name in guest.bare_image().functions if name not in LOCKED)
    return dict.fromkeys(entries, 1) | SITES


@pytest.mark.parametrize("rung", RUNGS)
def test_every_function_counts_as_often_as_the_guest_itself(bare: BareSession, guest: GuestVm, rung: Rung) -> None:
    names = places(guest)
    assert len(names) >= 25
    for name, hits in names.items():
        before = guest.bare_counters()
        probe = bare.add(name, rung)
        bare.run_to_hits(probe, ROUNDS * hits)
        bare.session.delete(probe)
        bare.run_to("main_loop")
        counted = {function: count - before[function] for function, count in guest.bare_counters().items()}
        assert counted == dict.fromkeys(counted, ROUNDS), name


@pytest.mark.parametrize("rung", RUNGS)
def test_all_probes_at_once(bare: BareSession, guest: GuestVm, rung: Rung) -> None:
    names = places(guest)
    probes = {name: bare.add(name, rung) for name in names}
    last = probes["f_ret"]
    bare.run(lambda: last.hits == ROUNDS)
    for probe in probes.values():
        bare.session.delete(probe)
    assert {name: probe.hits for name, probe in probes.items()} == {name: ROUNDS * hits for name, hits in names.items()}


def test_a_post_handler_sees_every_return_address(bare: BareSession) -> None:
    """The single step of a call, put right before anybody looks."""
    seen: set[tuple[int, int]] = set()
    probe = bare.add("f_call", Rung.SINGLE_STEP, post=lambda hit: seen.add((hit.regs.ip, hit.read_int(hit.regs.sp))))
    bare.run(lambda: probe.hits == 50)
    assert seen == {(bare.symbols["leaf"], bare.symbols["f_call_return"])}


@pytest.mark.parametrize("rung", RUNGS)
def test_the_guests_own_breakpoints_stay_its_own(bare: BareSession, guest: GuestVm, rung: Rung) -> None:
    before = guest.read_u64(guest.bare_image().physical("bp_count"))
    probe = bare.add("f_ret", rung)
    want = guest.bare_image().physical("want_int3")
    guest.ram()[want : want + 8] = (7).to_bytes(8, "little")
    bare.run(lambda: probe.hits == 20)
    assert guest.read_u64(guest.bare_image().physical("bp_count")) == before + 7
    assert guest.read_u64(want) == 0


@pytest.mark.parametrize("rung", RUNGS)
def test_an_interrupt_at_any_moment_shows_no_slot(bare: BareSession, rung: Rung) -> None:
    """Also in the middle of hits: the vCPU is stepped there on purpose, for a random stop never finds it."""
    rng = random.Random(rung)
    probe = bare.add("f_push", rung)
    region = bare.session.region.header.range
    for _ in range(100):
        cpu = bare.stop()
        if rng.random() < 0.5:
            bare.session.on_breakpoint(cpu)
            for _ in range(rng.randrange(3)):
                bare.stub.step(cpu)
        bare.session.settle()
        rip = bare.stub.read_register(cpu, "rip")
        assert rip not in region
        assert rip != bare.session.guest.bp_entry
    assert probe.hits == 100


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("place", ["f_push", "f_call", "f_jcc_backwards_jump"])
def test_a_debugger_killed_between_any_two_packets_of_a_hit(guest: GuestVm, place: str, rung: Rung) -> None:
    """The next one finds the guest, restores it, and the guest computes on."""
    text = guest_text(guest)
    for count in range(200):
        bare = BareSession(guest)
        bare.add(place, rung)
        cpu = bare.stop()
        bare.channel.left = count
        killed = is_cut(bare.session.on_breakpoint, cpu)
        bare.channel.close()

        after = BareSession(guest)
        assert "1 site(s) armed" in after.attached.messages[0]
        assert guest_text(guest) == text, f"cut after {count} packets"
        after.session.detach()
        after.channel.detach()
        assert_goes_on(guest)
        if not killed:
            assert count > 5
            return
    raise AssertionError("a dispatch has no end")


@pytest.mark.parametrize(
    "place",
    ["f_push", "f_call", "f_call_register", "f_jcc_backwards_jump", "f_jcc_near_jump", "f_loop_site", "f_flags_site"],
)
def test_a_debugger_killed_behind_the_trap_and_nobody_comes(guest: GuestVm, place: str) -> None:
    """Wherever the vCPU was left, the guest computes on from there by itself, once no other int3 is in its way."""
    image = guest.bare_image()
    before: dict[str, int] = {}
    for count in range(200):
        bare = BareSession(guest)
        bare.run_to("main_loop")
        counters = guest.bare_counters()
        rounds = {counters[name] - past for name, past in before.items()}
        assert len(rounds) <= 1, f"cut after {count - 1} packets"
        before = counters
        site = bare.session.table.of(bare.add(place, Rung.SINGLE_STEP))
        assert site is not None
        patch = site.plan.patch
        cpu = bare.stop()
        bare.channel.left = count
        killed = is_cut(bare.session.on_breakpoint, cpu)
        bare.channel.close()

        with RspSocket(guest.gdb_address) as plain:
            stub = QemuStub(plain)
            stub.drop_breakpoints()
            if stub.read_register(cpu, "rip") == bare.session.guest.bp_entry:
                continue  # nothing was done to it: the next session undoes the trap
            at = PhysAddr(patch.addr - bare.symbols["image"] + image.physical("image"))
            stub.write_physical(at, patch.old)
            plain.detach()
        assert_goes_on(guest)
        if not killed:
            break
    else:
        raise AssertionError("a dispatch has no end")
    bare = BareSession(guest)
    bare.session.detach()
    bare.channel.detach()
    assert_goes_on(guest)
