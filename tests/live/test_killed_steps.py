"""A debugger is killed in the middle of a hit that is single-stepped, and nobody comes but a plain ``cont`` of QMP."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from gdb_kprobe.config.load import load_profile
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.model import CpuId, Rung
from gdb_kprobe.session.attach import Attached, attach
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.x86.decode import iter_insns
from gdb_kprobe.x86.families import Family, classify
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import BODY
from tests.support.client import StubClient
from tests.support.cut import CutChannel, is_cut
from tests.support.guests import environment
from tests.support.probed import Booted

pytestmark = pytest.mark.live

PROFILE = Path(__file__).resolve().parents[2] / "configs" / "debian.yaml"
WORKLOAD = "workload syscall 140 20"
"""Calls of getpriority, which nothing else makes."""
FUNCTION = BODY
MOST_CHANGES = 30


class Client(StubClient):
    """A debugger without gdb, attached to the stopped guest."""

    def __init__(self, guest: GuestVm) -> None:
        self.channel = CutChannel(guest.gdb_address)
        super().__init__(self.channel)
        self.attached: Attached = attach(self.stub, load_profile(PROFILE, environment(guest)), self)
        self.session = self.attached.session

    def probe(self, family: Family) -> Plan:
        """Add a probe, to be single-stepped, on the first instruction of *family*."""
        kernel = self.attached.guest
        function = kernel.resolve(Location(FUNCTION))
        text = kernel.memory.read(function.start, function.end - function.start)
        addr = next(insn.addr for insn in iter_insns(text, function.start) if classify(insn) is family)
        definition = parse_definition(f"p:stepped {FUNCTION}+{addr - function.start}")
        probe = self.session.add(Probe(definition, strategy=Rung.SINGLE_STEP))
        site = self.session.table.of(probe)
        assert site is not None
        return site.plan

    def run_to_hit(self, start: Callable[[], Future[tuple[int, str]]]) -> tuple[CpuId, Future[tuple[int, str]]]:
        """Let the guest run, with the workload that *start* starts, to the first hit; which vCPU has it."""
        self.channel.resume()
        job = start()
        return self.wait_stop(), job


@pytest.mark.parametrize("family", [Family.PLAIN, Family.JCC, Family.CALL_REL, Family.RET])
def test_killed_at_any_packet_of_a_step_the_guest_goes_on(booted_guest: Booted, family: Family) -> None:
    """Its calls return, its log is clean; and whoever attaches then puts the text back."""
    vm = booted_guest(GuestSpec(vcpus=2))
    left: set[str] = set()
    with ThreadPoolExecutor(1) as background:
        for count in range(MOST_CHANGES):
            client = Client(vm)
            slot = client.probe(family).slot
            cpu, job = client.run_to_hit(lambda: background.submit(vm.run, WORKLOAD, 20))
            client.channel.left = count
            killed = is_cut(client.session.on_breakpoint, cpu)
            client.channel.close()
            with RspSocket(vm.gdb_address) as plain:
                stub = QemuStub(plain)
                stub.drop_breakpoints()
                rip = stub.read_register(cpu, "rip")
                left.add("at the copy" if rip == slot.code else "behind it" if rip in slot.range else "elsewhere")
            vm.cont()
            assert job.result()[0] == 0, f"killed after {count} changes"
            vm.check()
            if not killed:
                break
        else:
            raise AssertionError("a hit has no end")
    assert left == {"elsewhere", "at the copy"} | ({"behind it"} if family in (Family.PLAIN, Family.JCC) else set())
    assert vm.dmesg_problems() == []
    client = Client(vm)
    assert client.attached.messages[0] == "an earlier session left 1 site(s) armed; their text is restored"
    assert client.session.detach().problems == ()
    client.channel.detach()
