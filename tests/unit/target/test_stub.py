"""QEMU's stub above the carrier: registers by name, memory by physical address, and no mode left behind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.model import CpuId, PhysAddr, VirtAddr
from gdb_kprobe.target.packets import RUN
from gdb_kprobe.target.stub import QemuStub
from tests.support.kvm_stub import LAYOUT, KvmStub, RanAwayError

CPU = CpuId(1)

# As QEMU sends it, shortened: an undeclared prefix for the includes, a DOCTYPE, registers wider than 64 bits.
TARGET_XML = b"""<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target><architecture>i386:x86-64\
</architecture><xi:include href="core.xml"/><xi:include href="more.xml"/></target>"""
CORE_XML = b"""<?xml version="1.0"?><!DOCTYPE feature SYSTEM "gdb-target.dtd"><feature name="org.gnu.gdb.i386.core">
<flags id="x64_eflags" size="4"><field name="" start="22" end="31"/></flags>
<reg name="rax" bitsize="64" type="int64" regnum="0"/><reg name="rip" bitsize="64" type="code_ptr"/>
<reg name="eflags" bitsize="32" type="x64_eflags"/><reg name="cs" bitsize="32" type="int32"/>
<reg name="st0" bitsize="80" type="i387_ext"/><reg name="xmm0" bitsize="128" type="vec128"/>
<reg name="cr3" bitsize="64" type="int64"/></feature>"""
MORE_XML = b"""<feature name="more"><reg name="k_gs_base" bitsize="64" type="int"/></feature>"""
G_PACKET = bytes.fromhex("11" * 8 + "22" * 8 + "46020000" + "10000000" + "99" * 26 + "0010000000000000" + "33" * 8)


@pytest.fixture
def described(fake: Any) -> Any:
    """The channel of a machine that has described its registers, the last document in two pieces."""
    read = b"qXfer:features:read:%b:%x,ffb"
    fake.answers |= {
        read % (b"target.xml", 0): b"l" + TARGET_XML,
        read % (b"core.xml", 0): b"m" + CORE_XML[:100],
        read % (b"core.xml", 100): b"l" + CORE_XML[100:],
        read % (b"more.xml", 0): b"l" + MORE_XML,
        b"g": G_PACKET.hex().encode(),
    }
    return fake


@pytest.fixture
def stub(described: Any) -> QemuStub:
    return QemuStub(described)


# -- registers ----------------------------------------------------------------------------------------------------


def test_registers_are_found_by_name_wherever_the_description_puts_them(stub: QemuStub) -> None:
    assert stub.read_registers(CPU) == {
        "rax": 0x1111_1111_1111_1111,
        "rip": 0x2222_2222_2222_2222,
        "eflags": 0x246,
        "cs": 0x10,
        "cr3": 0x1000,
        "k_gs_base": 0x3333_3333_3333_3333,
    }


def test_registers_that_the_stub_does_not_send_are_left_out(stub: QemuStub, described: Any) -> None:
    described.answers[b"g"] = G_PACKET[:20].hex().encode()
    assert stub.read_registers(CPU).keys() == {"rax", "rip", "eflags"}


def test_the_description_is_read_once(stub: QemuStub, described: Any) -> None:
    stub.read_registers(CPU)
    described.packets.clear()
    stub.forget()
    stub.read_registers(CPU)
    assert described.packets == [b"Hgp1.1", b"g"]


def test_all_registers_of_a_vcpu_are_read_once_a_stop(stub: QemuStub, described: Any) -> None:
    stub.read_registers(CPU)
    described.packets.clear()
    assert stub.read_register(CPU, "rip") == stub.read_registers(CPU)["rip"] == 0x2222_2222_2222_2222
    assert described.packets == []
    assert stub.read_register(CpuId(2), "cr3") == 0x1000
    assert described.packets == [b"Hgp1.2", b"g"]


def test_a_register_that_g_leaves_out_is_read_by_its_number_after_it(stub: QemuStub, described: Any) -> None:
    described.answers |= {b"g": G_PACKET[:-8].hex().encode(), b"p7": b"00500100000000ff"}
    assert stub.read_register(CPU, "k_gs_base") == 0xFF00_0000_0001_5000
    assert described.packets[-2:] == [b"g", b"p7"]


@pytest.mark.parametrize("answer", [b"", b"E22"])
def test_a_register_that_is_not_told_is_an_error_and_never_zero(stub: QemuStub, described: Any, answer: bytes) -> None:
    described.answers |= {b"g": answer, b"p7": answer}
    for _ in range(2):
        with pytest.raises(TargetError, match="does not tell the registers of vCPU 1"):
            stub.read_register(CPU, "rip")
        with pytest.raises(TargetError, match="does not tell the registers of vCPU 1"):
            stub.read_registers(CPU)
    described.answers[b"g"] = G_PACKET[:-8].hex().encode()
    with pytest.raises(TargetError, match="does not tell k_gs_base of vCPU 1"):
        stub.read_register(CPU, "k_gs_base")


@pytest.mark.parametrize("answer", [b"", b"E22"])
def test_a_register_that_is_not_written_is_an_error(stub: QemuStub, described: Any, answer: bytes) -> None:
    """QEMU 7.2 answers P with nothing, and writes nothing, until the description was read."""
    described.answers[b"P1=0010000000000000"] = answer
    with pytest.raises(TargetError, match="would not write rip of vCPU 1: it answered"):
        stub.write_registers(CPU, {"rip": 0x1000})


def test_a_stub_that_describes_nothing_is_an_error(fake: Any) -> None:
    with pytest.raises(ConnectionLostError, match="does not describe its registers"):
        QemuStub(fake).read_registers(CPU)


# -- vCPUs --------------------------------------------------------------------------------------------------------


def test_the_vcpus_come_in_several_packets(stub: QemuStub, described: Any) -> None:
    described.answers |= {b"qfThreadInfo": b"mp01.01,p01.0a", b"qsThreadInfo": b"l"}
    assert stub.cpus() == (1, 10)
    described.answers[b"qfThreadInfo"] = b"mp01.01"
    assert stub.cpus() == (1, 10), "asked once"
    stub.forget()
    assert stub.cpus() == (1,)


def test_a_vcpu_is_selected_only_when_another_one_was(stub: QemuStub, described: Any) -> None:
    for cpu in (1, 1, 2, 2):
        stub.read_current(CpuId(cpu), VirtAddr(0), 1)
    assert [packet for packet in described.packets if packet[:1] == b"H"] == [b"Hgp1.1", b"Hgp1.2"]
    stub.forget()
    stub.read_current(CpuId(2), VirtAddr(0), 1)
    assert described.packets[-2:] == [b"Hgp1.2", b"m0,1"]


def test_a_step_steps_one_vcpu_and_unselects_it(stub: QemuStub, described: Any) -> None:
    described.answers[b"vCont;s:p1.2"] = b"T05thread:p01.02;"
    stub.select(CpuId(2))
    stub.step(CpuId(2))
    stub.read_current(CpuId(2), VirtAddr(0), 1)
    assert described.packets == [b"Hgp1.2", b"vCont;s:p1.2", b"Qqemu.PhyMemMode:0", b"Hgp1.2", b"m0,1"]


def test_a_step_that_is_refused_is_an_error(stub: QemuStub, described: Any) -> None:
    with pytest.raises(TargetError, match="vCPU 2 did not step"):
        stub.step(CpuId(2))


# -- memory -------------------------------------------------------------------------------------------------------


def test_physical_memory_is_reached_in_physical_mode_and_the_mode_is_left(stub: QemuStub, described: Any) -> None:
    described.memory["physical"][0x10:0x14] = b"phys"
    described.memory["virtual"][0x10:0x14] = b"virt"
    assert stub.read_physical(PhysAddr(0x10), 4) == b"phys"
    assert stub.read_current(CPU, VirtAddr(0x10), 4) == b"virt"
    stub.write_physical(PhysAddr(0x10), b"PHYS")
    assert stub.write_current(CPU, VirtAddr(0x10), b"VIRT")
    assert (described.memory["physical"][0x10:0x14], described.memory["virtual"][0x10:0x14]) == (b"PHYS", b"VIRT")


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2048, 2049, 0x2345])
def test_any_size_is_cut_to_packets_that_fit(stub: QemuStub, described: Any, size: int) -> None:
    data = bytes(index * 7 & 0xFF for index in range(size))
    stub.write_physical(PhysAddr(0x123), data)
    assert described.memory["physical"][0x123 : 0x123 + size] == data
    assert stub.read_physical(PhysAddr(0x123), size) == data
    assert stub.write_current(CPU, VirtAddr(0x321), data)
    assert stub.read_current(CPU, VirtAddr(0x321), size) == data


def test_no_ram_is_an_error_that_says_where(stub: QemuStub, described: Any) -> None:
    with pytest.raises(TargetError, match="no guest memory at physical 0x4000"):
        stub.read_physical(PhysAddr(0x3F00 - 0x700), 0x1000)
    with pytest.raises(TargetError, match="would not write 4 bytes at physical 0x3ffe: it answered E14"):
        stub.write_physical(PhysAddr(0x3FFE), b"1234")
    assert described.mode == "virtual"


def test_what_is_not_mapped_is_not_an_error_for_a_vcpus_own_memory(stub: QemuStub) -> None:
    assert stub.read_current(CPU, VirtAddr(0x3FFE), 4) is None
    assert stub.write_current(CPU, VirtAddr(0x3FFE), b"1234") is False


def test_physical_mode_nests_and_is_switched_twice_only(stub: QemuStub, described: Any) -> None:
    with stub.physical_mode():
        stub.read_physical(PhysAddr(0), 1)
        stub.write_physical(PhysAddr(0), b"x")
        assert described.mode == "physical"
    assert [packet for packet in described.packets if packet[:1] == b"Q"] == [
        b"Qqemu.PhyMemMode:1",
        b"Qqemu.PhyMemMode:0",
    ]


@pytest.mark.parametrize("error", [TargetError("x"), KeyboardInterrupt()])
def test_physical_mode_is_left_whatever_happens_in_it(stub: QemuStub, described: Any, error: BaseException) -> None:
    with pytest.raises(type(error)), stub.physical_mode():
        raise error
    assert described.mode == "virtual"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_physical_mode_is_left_when_a_packet_breaks_off(stub: QemuStub, described: Any, at: int) -> None:
    """Also when it is the one that switches it on: the stub may have heard it."""
    described.broken_at = at
    with pytest.raises(ConnectionLostError):
        stub.read_physical(PhysAddr(0), 0x1000)
    assert described.packets[-1] == b"Qqemu.PhyMemMode:0"
    assert stub.read_physical(PhysAddr(0), 1) == b"\0"
    assert described.mode == "virtual"


def test_a_stub_without_physical_mode_is_an_error(stub: QemuStub, described: Any) -> None:
    described.answers |= {b"Qqemu.PhyMemMode:1": b"", b"Qqemu.PhyMemMode:0": b""}
    with pytest.raises(TargetError, match="would not switch to physical addresses: it answered nothing"):
        stub.read_physical(PhysAddr(0), 1)


def test_another_connection_starts_from_nothing(stub: QemuStub, described: Any) -> None:
    other = type(described)()
    other.answers = dict(described.answers) | {b"qfThreadInfo": b"mp01.03", b"qsThreadInfo": b"l"}
    stub.select(CPU)
    stub.use_channel(other)
    assert stub.cpus() == (3,)
    stub.read_current(CPU, VirtAddr(0), 1)
    assert other.packets[-2:] == [b"Hgp1.1", b"m0,1"]


def test_several_registers_are_written_by_one_packet_that_ends_with_the_last_of_them(described: Any) -> None:
    packet = b"G" + (b"\x77".ljust(8, b"\0") + (0x1234).to_bytes(8, "little")).hex().encode()
    described.answers[packet] = b"OK"
    QemuStub(described).write_registers(CPU, {"rip": 0x1234, "rax": 0x77})
    assert described.packets[-2:] == [b"g", packet]


def test_one_register_is_written_after_all_were_fetched_and_read_again_after_it(described: Any) -> None:
    packet = b"P1=" + (0x1234).to_bytes(8, "little").hex().encode()
    described.answers[packet] = b"OK"
    stub = QemuStub(described)
    stub.write_registers(CPU, {})
    assert described.packets == []
    stub.write_registers(CPU, {"rip": 0x1234})
    assert described.packets[-2:] == [b"g", packet]
    stub.read_register(CPU, "rip")
    assert described.packets[-1] == b"g"
    stub.write_registers(CPU, {"rip": 0x1234})
    assert described.packets[-2:] == [b"g", packet]


def run_to(channel: Any, stops: list[int], addrs: list[int], seconds: float) -> CpuId | None:
    """The machine has one vCPU, which stops at *stops*, one after another."""

    def run_for(seconds: float, *, heed: bool = True, how: bytes = b"") -> None:
        channel.packets.append(b"run")
        channel.answers[b"g"] = (bytes(8) + stops.pop(0).to_bytes(8, "little")).hex().encode()

    channel.run_for = run_for
    channel.answers |= {b"qfThreadInfo": b"mp01.01", b"qsThreadInfo": b"l"}
    channel.answers |= {b"%c1,%x,1" % (kind, addr): b"OK" for kind in b"Zz" for addr in addrs}
    return QemuStub(channel).run_to([VirtAddr(addr) for addr in addrs], seconds)


def test_run_to_an_address_leaves_no_breakpoint(described: Any) -> None:
    assert run_to(described, [0x5000, 0x2000], [0x1000, 0x2000], 60) == CPU
    packets = [packet for packet in described.packets if packet[:1] in b"Zzr"]
    assert packets == [b"Z1,1000,1", b"Z1,2000,1", b"run", b"run", b"z1,2000,1", b"z1,1000,1"]


def test_run_to_an_address_that_nobody_comes_to_ends(described: Any) -> None:
    assert run_to(described, [0x5000] * 100_000, [0x1000], 0.01) is None
    assert described.packets[-1] == b"z1,1000,1"


# -- who holds the registers --------------------------------------------------------------------------------------


class Vcpus:
    """Two vCPUs whose registers are what a test says."""

    def __init__(self) -> None:
        self.runs = 0
        self.exception_entries: Collection[int] = (0x9000,)
        self.registers = {cpu: dict.fromkeys((name for name, _ in LAYOUT), 0x100 * cpu) for cpu in (CPU, CpuId(2))}
        self.breakpoints: list[str] = []

    def run(self) -> None:
        """Execute something on each vCPU."""
        self.runs += 1
        for registers in self.registers.values():
            registers["rip"] += 1

    def cpus(self) -> tuple[CpuId, ...]:
        return CPU, CpuId(2)

    def read_registers(self, cpu: CpuId) -> dict[str, int]:
        return dict(self.registers[cpu])

    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None:
        self.registers[cpu] |= values

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        return None

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        return False

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return bytes(size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        pass

    def step(self, cpu: CpuId) -> None:
        self.runs += 1
        self.registers[cpu]["rip"] += 1

    def monitor(self, command: str) -> str:
        return "kvm support: enabled\r\n"

    def drop_breakpoints(self) -> None:
        pass


class RunningStub(KvmStub):
    """A stub whose machine runs when it is told to."""

    def __init__(self, machine: Vcpus) -> None:
        super().__init__(machine)
        self._vcpus = machine

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        if how != RUN:
            return super().run_for(seconds, heed=heed, how=how)
        self._vcpus.run()
        return None


def test_under_kvm_p_tells_an_earlier_stop_and_p_without_g_is_lost() -> None:
    """What the machine of these tests is for: it does as QEMU does."""
    vcpus = Vcpus()
    channel = RunningStub(vcpus)
    rip = b"%x" % [name for name, _ in LAYOUT].index("rip")
    vcpus.run()
    assert channel.send(b"p" + rip) == b"0001000000000000"
    assert channel.send(b"P" + rip + b"=7777000000000000") == b"OK"
    assert vcpus.registers[CPU]["rip"] == 0x101
    channel.send(b"g")
    assert channel.send(b"p" + rip) == b"0101000000000000"
    assert channel.send(b"P" + rip + b"=7777000000000000") == b"OK"
    assert vcpus.registers[CPU]["rip"] == 0x7777


@pytest.mark.parametrize("strict", [False, True])
def test_under_kvm_registers_are_those_of_now(strict: bool) -> None:
    vcpus = Vcpus()
    channel = RunningStub(vcpus)
    channel.strict = strict
    stub = QemuStub(channel)
    for _ in range(3):
        vcpus.run()
        stub.forget()
        for cpu in reversed(stub.cpus()):
            assert stub.read_register(cpu, "rip") == vcpus.registers[cpu]["rip"]
            assert stub.read_registers(cpu) == vcpus.registers[cpu]
        stub.step(CPU)
        assert stub.read_register(CPU, "rip") == vcpus.registers[CPU]["rip"]
        reached = vcpus.registers[CpuId(2)]["rip"] + 1
        assert stub.run_to((VirtAddr(reached),), 1) == 2
        assert stub.read_register(CPU, "rip") == vcpus.registers[CPU]["rip"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("values", [{"rip": 0x5000}, {"rip": 0x5000, "rbx": 7}, {"cr3": 0x9000}])
def test_under_kvm_no_write_is_lost(strict: bool, values: dict[str, int]) -> None:
    vcpus = Vcpus()
    channel = RunningStub(vcpus)
    channel.strict = strict
    stub = QemuStub(channel)
    for run in (vcpus.run, lambda: stub.step(CpuId(2)), lambda: None):
        run()
        stub.forget()
        for cpu in stub.cpus():
            expected = vcpus.registers[cpu] | values
            stub.write_registers(cpu, values)
            assert vcpus.registers[cpu] == stub.read_registers(cpu) == expected
        vcpus.registers[CPU] |= dict.fromkeys(values, 1)


# -- steps by the trap flag ---------------------------------------------------------------------------------------

FAULT, OTHER_FAULT = VirtAddr(0x9000), VirtAddr(0xA000)
STACK_TOP = 0x2000


class Stepping(Vcpus):
    """vCPUs with memory, and an instruction of a test's choice at any address."""

    def __init__(self, code: bytes = b"\x90", *, leads_to: int = 1, pushes: bool = False) -> None:
        super().__init__()
        self.code, self.leads_to, self.pushes = code, leads_to, pushes
        self.stack = bytearray(0x100)
        self.stepped_with: list[int] = []
        for registers in self.registers.values():
            registers |= {"rsp": STACK_TOP, "eflags": 0x246}

    def step(self, cpu: CpuId) -> None:
        self.runs += 1
        registers = self.registers[cpu]
        self.stepped_with.append(registers["eflags"])
        if self.leads_to in self.exception_entries:
            registers["rsp"] -= 48
            self.stack[24:32] = registers["eflags"].to_bytes(8, "little")
            registers |= {"rip": self.leads_to, "eflags": registers["eflags"] & ~0x100}
        else:
            registers["rip"] += self.leads_to
            if self.pushes:
                registers["rsp"] -= 8
                self.stack[:8] = registers["eflags"].to_bytes(8, "little")

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        if addr == self.registers[cpu]["rip"]:
            return self.code.ljust(size, b"\x90")[:size]
        start = addr - self.registers[cpu]["rsp"]
        return bytes(self.stack[start : start + size])

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        start = addr - self.registers[cpu]["rsp"]
        self.stack[start : start + len(data)] = data
        return True


def stepping(vcpus: Stepping) -> tuple[QemuStub, RunningStub]:
    channel = RunningStub(vcpus)
    stub = QemuStub(channel)
    stub.watch_faults({FAULT: 24, OTHER_FAULT: 24, VirtAddr(0xB000): 24, VirtAddr(0xC000): 16})
    return stub, channel


def test_under_kvm_a_step_after_rip_was_written_sets_the_trap_flag_and_leaves_none() -> None:
    vcpus = Stepping()
    stub, channel = stepping(vcpus)
    stub.write_registers(CPU, {"rip": 0x5000})
    stub.step(CPU)
    assert vcpus.stepped_with == [0x346]
    assert (vcpus.registers[CPU]["rip"], vcpus.registers[CPU]["eflags"]) == (0x5001, 0x246)
    assert channel.breakpoints == set()


def test_the_stub_of_this_test_runs_away_without_it() -> None:
    vcpus = Stepping()
    stub, channel = stepping(vcpus)
    stub.write_registers(CPU, {"rip": 0x5000})
    with pytest.raises(RanAwayError):
        channel.send(b"vCont;s:p1.1")


@pytest.mark.parametrize("code", [b"\x9c", b"\x66\x9c", b"\x48\x9c"])
def test_flags_that_a_step_pushes_have_no_trap_flag(code: bytes) -> None:
    vcpus = Stepping(code, leads_to=len(code), pushes=True)
    stub, _ = stepping(vcpus)
    stub.step(CPU)
    assert vcpus.stack[:8] == (0x246).to_bytes(8, "little")


def test_a_fault_ends_a_step_and_its_frame_has_no_trap_flag() -> None:
    vcpus = Stepping(leads_to=FAULT)
    stub, channel = stepping(vcpus)
    stub.step(CPU)
    assert stub.read_register(CPU, "rip") == FAULT
    assert vcpus.stack[24:32] == (0x246).to_bytes(8, "little")
    assert channel.breakpoints == set()


def test_a_trap_flag_of_the_guests_own_is_left_in_what_a_fault_pushes() -> None:
    vcpus = Stepping(leads_to=FAULT)
    vcpus.registers[CPU]["eflags"] = 0x346
    stub, _ = stepping(vcpus)
    stub.step(CPU)
    assert vcpus.stack[24:32] == (0x346).to_bytes(8, "little")


@pytest.mark.parametrize("taken", range(5))
def test_a_step_needs_two_of_the_four_breakpoints_and_says_so(taken: int) -> None:
    vcpus = Stepping()
    stub, channel = stepping(vcpus)
    channel.breakpoints |= set(range(taken))
    if taken <= 2:
        stub.step(CPU)
    else:
        with pytest.raises(TargetError, match="cannot be stepped: a step under KVM needs 2 of the processor's 4"):
            stub.step(CPU)
        assert vcpus.stepped_with == []
    assert channel.breakpoints == set(range(taken))


def test_what_a_step_that_was_cut_off_has_left_is_taken_away() -> None:
    vcpus = Stepping()
    stub, _ = stepping(vcpus)
    vcpus.registers[CPU] |= {"eflags": 0x346, "rip": FAULT, "rsp": STACK_TOP - 48}
    vcpus.stack[24:32] = (0x346).to_bytes(8, "little")
    stub.forget()
    stub.drop_trap_flag(CPU)
    assert (vcpus.registers[CPU]["eflags"], bytes(vcpus.stack[24:26])) == (0x246, b"\x46\2")


def test_under_tcg_nothing_is_set_for_a_step(stub: QemuStub, described: Any) -> None:
    described.answers[b"vCont;s:p1.1"] = b"T05thread:p01.01;"
    stub.watch_faults({FAULT: 24})
    stub.step(CPU)
    stub.drop_trap_flag(CPU)
    assert described.packets == [b"vCont;s:p1.1"]


def test_a_step_that_does_not_come_back_is_an_error(stub: QemuStub, described: Any) -> None:
    described.run_for = lambda seconds, *, heed, how: None
    with pytest.raises(TargetError, match="vCPU 1 has not come back from a step in 30 s"):
        stub.step(CPU)


# -- what caches of page tables hold ------------------------------------------------------------------------------


def test_under_kvm_a_flush_is_another_cr4_while_the_machine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpus = Vcpus()
    stub = QemuStub(RunningStub(vcpus))
    for registers in vcpus.registers.values():
        registers["cr4"] = 0xA0
    ran_with: list[int] = []

    def run() -> None:
        ran_with.extend(registers["cr4"] for registers in vcpus.registers.values())

    monkeypatch.setattr(vcpus, "run", run)
    assert not stub.quirks.flushes_at_write
    with stub.flushed():
        stub.run_briefly()
    assert ran_with == [0x20, 0x20]
    assert [registers["cr4"] for registers in vcpus.registers.values()] == [0xA0, 0xA0]


@pytest.mark.parametrize("error", [TargetError("x"), KeyboardInterrupt()])
def test_cr4_is_put_back_whatever_happens(error: BaseException) -> None:
    vcpus = Vcpus()
    stub = QemuStub(RunningStub(vcpus))
    before = vcpus.registers[CPU]["cr4"]
    with pytest.raises(type(error)), stub.flushed():
        raise error
    assert vcpus.registers[CPU]["cr4"] == before
