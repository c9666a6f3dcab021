"""What is read from guest memory against what the guest, and QEMU, say of themselves."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs

from gdb_kprobe.errors import GuestStateError, TargetError
from gdb_kprobe.guest.linux import open_linux
from gdb_kprobe.linux.btf import Btf, read_btf
from gdb_kprobe.linux.e820 import read_e820
from gdb_kprobe.linux.image import KernelImage, find_build_id, find_image, read_string
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import read_core_symbols
from gdb_kprobe.linux.modules import Module, read_module_symbols, read_modules
from gdb_kprobe.linux.state import read_state
from gdb_kprobe.linux.tasks import cpu_stacks, current_tasks, read_tasks, scan_stacks, task_stacks
from gdb_kprobe.linux.text import read_text_facts
from gdb_kprobe.model import AddressRange, PhysAddr, Reason, VirtAddr, offset
from gdb_kprobe.system import idt, paging
from gdb_kprobe.system.mapping import CODE_FLAGS, find_hole, map_pages, plan_mapping
from gdb_kprobe.target.ram import RamView
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from kprobe_guest import GuestSpec, GuestVm
from tests.support.probed import Booted

pytestmark = pytest.mark.live

KERNEL_HALF = AddressRange(VirtAddr(0xFF00_0000_0000_0000), VirtAddr(1 << 64))
MODULE_AREA = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))


class Ram:
    """The guest's RAM by its backing file (all of it is below 2 GiB: offset and physical address are the same)."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.size = vm.spec.memory_mb << 20

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if addr + size > self.size:
            raise TargetError(f"no RAM at {addr:#x}")
        return self.vm.read_ram(addr, size)

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self.vm.ram()[addr : addr + len(data)] = data

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def monitor(self, command: str) -> str:
        return self.vm.hmp(command)


@dataclass
class Kernel:
    """A guest that is stopped while it is looked at, and everything that attaching reads of it."""

    vm: GuestVm
    ram: Ram
    registers: tuple[idt.SystemRegisters, ...]
    table: paging.PageTable
    idt: idt.Idt
    image: KernelImage
    core: Kallsyms
    kallsyms: Kallsyms
    btf: Btf
    modules: tuple[Module, ...]
    seconds: dict[str, float]


def open_kernel(vm: GuestVm, cpu: int = 0) -> Kernel:
    """Stop the VM and read the kernel from the CR3 of vCPU *cpu*."""
    vm.stop()
    ram = Ram(vm)
    times = [time.monotonic()]
    registers = idt.read_registers(ram)
    loaded = paging.loaded_table(ram, registers[cpu].cr3, registers[cpu].cr4)
    handler = idt.find_breakpoint_handler(loaded, registers[cpu])
    table = paging.kernel_root(ram, registers[cpu].cr3, registers[cpu].cr4, handler)
    gates = idt.read_idt(table, registers[cpu].idt_base, registers[cpu].idt_limit)
    image = find_image(table, handler)
    times.append(time.monotonic())
    core = Kallsyms(read_core_symbols(table, image))
    times.append(time.monotonic())
    btf = read_btf(table, core)
    assert btf is not None
    times.append(time.monotonic())
    modules = read_modules(table, btf, core.address("modules"))
    kallsyms = core.with_modules([read_module_symbols(table, module) for module in modules])
    times.append(time.monotonic())
    names = ("image", "kallsyms", "btf", "modules")
    seconds = {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}
    return Kernel(vm, ram, registers, table, gates, image, core, kallsyms, btf, modules, seconds)


@pytest.fixture(params=["debian", "newest"])
def vm(request: pytest.FixtureRequest, booted_guest: Booted) -> GuestVm:
    return booted_guest(GuestSpec(kernel=request.param, vcpus=2))


@pytest.fixture
def kernel(vm: GuestVm) -> Iterator[Kernel]:
    try:
        yield open_kernel(vm)
    finally:
        vm.cont()


def proc_kallsyms(vm: GuestVm) -> list[str]:
    return [line for line in vm.kallsyms().splitlines() if not re.search(r"\[(bpf|__builtin__.*)\]", line)]


def test_symbols_equal_proc_kallsyms(vm: GuestVm) -> None:
    expected = proc_kallsyms(vm)
    kernel = open_kernel(vm)
    vm.cont()
    found = [
        f"{symbol.addr:016x} {symbol.type} {symbol.name}" + (f"\t[{symbol.module}]" if symbol.module else "")
        for symbol in kernel.kallsyms
    ]
    differences = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    print(f"\n{len(found)} symbols, {len(kernel.core)} of the core kernel, {len(differences)} differences; "
          f"{', '.join(f'{name} {1000 * took:.0f} ms' for name, took in kernel.seconds.items())}")  # fmt: skip
    assert differences == []
    assert len(found) == len(expected) > 80_000
    assert kernel.modules, "no module is loaded: nothing was compared for modules"


def test_banner_and_slide_are_the_guests_own(vm: GuestVm) -> None:
    version = vm.check_output("cat /proc/version").strip()
    notes = bytes.fromhex(vm.check_output("od -An -v -tx1 /sys/kernel/notes").replace("\n", ""))
    kernel = open_kernel(vm)
    vm.cont()
    assert read_string(kernel.table, kernel.core.address("linux_banner")).removesuffix(r"\x0a") == version
    assert kernel.image.base == kernel.core.address("_text")
    assert kernel.image.slide == kernel.core.address("_text") - 0xFFFF_FFFF_8100_0000
    section = kernel.core.section("__start_notes", "__stop_notes")
    assert section is not None
    build_id = find_build_id(kernel.table, section)
    assert len(build_id) == 40
    assert bytes.fromhex(build_id) in notes


def test_breakpoint_gate_leads_to_asm_exc_int3(kernel: Kernel) -> None:
    assert kernel.core.symbol_at(kernel.idt.breakpoint_handler()) == (kernel.core.lookup("asm_exc_int3")[0], 0)
    assert len(kernel.idt.gates) == 256
    assert kernel.idt.gates[idt.BREAKPOINT_VECTOR].dpl == 3
    handlers = kernel.idt.handlers()
    assert handlers[kernel.core.address("asm_exc_page_fault")].vector == 14


def test_modules_equal_proc_modules(vm: GuestVm) -> None:
    lines = [line.split() for line in vm.check_output("cat /proc/modules").splitlines()]
    kernel = open_kernel(vm)
    vm.cont()
    expected = [(fields[0], int(fields[1]), fields[4], int(fields[5], 16)) for fields in lines]
    assert [(module.name, module.size, str(module.state), module.base) for module in kernel.modules] == expected


def assert_walks_equal_gva2gpa(kernel: Kernel, count: int, oracle_cpu: int = 0) -> str:
    """Compare our walks with QEMU's, at *count* random addresses of the kernel half, and as many beside the mapped."""
    rng = random.Random(1)
    start = KERNEL_HALF.start if kernel.table.levels == 5 else 0xFFFF_8000_0000_0000
    before = time.monotonic()
    runs = list(kernel.table.mappings(AddressRange(VirtAddr(start), KERNEL_HALF.end)))
    took = time.monotonic() - before
    mapped = unmapped = 0
    for index in range(2 * count):
        run = rng.choice(runs).range
        addr = VirtAddr(rng.randrange(run.start, run.end))
        if index % 2:  # often past the end of the run
            addr = VirtAddr(min(run.end + rng.randrange(1 << 14), (1 << 64) - 1))
        answer = str(
            kernel.vm.qmp("human-monitor-command", **{"command-line": f"gva2gpa {addr:#x}", "cpu-index": oracle_cpu})
        )
        found = kernel.table.walk(addr)
        if found is None:
            assert "Unmapped" in answer, f"{addr:#x}: QEMU has {answer}"
            unmapped += 1
        else:
            assert answer.strip() == f"gpa: {found.phys:#x}", f"{addr:#x}: we have {found.phys:#x}"
            mapped += 1
    assert mapped >= count
    assert unmapped > count // 20
    return f"{len(runs)} runs in {1000 * took:.0f} ms, {mapped} mapped and {unmapped} unmapped addresses equal"


def test_page_walks_equal_gva2gpa_with_five_levels(kernel: Kernel) -> None:
    assert kernel.table.levels == 5
    print(f"\n{assert_walks_equal_gva2gpa(kernel, 1000)}")


def qemus_leaves(vm: GuestVm) -> dict[int, tuple[int, str]]:
    """QEMU's ``info tlb``: every leaf of the current table, with its physical address and flags like ``XG-DA---W``.

    (``info mem`` of QEMU 7.2 prints nothing with five levels, after half a minute.)
    """
    lines = re.findall(r"^([0-9a-f]{16}): ([0-9a-f]{16}) (\S{9})$", vm.hmp("info tlb"), re.M)
    return {int(addr, 16): (int(phys, 16), flags) for addr, phys, flags in lines}


def test_every_leaf_and_its_permissions_equal_qemus_info_tlb(kernel: Kernel) -> None:
    window = AddressRange(VirtAddr(0xFFFF_FF00_0000_0000), KERNEL_HALF.end)
    expected = {addr: leaf for addr, leaf in qemus_leaves(kernel.vm).items() if addr in window}
    covered = 0
    for addr, (phys, flags) in expected.items():
        found = kernel.table.walk(VirtAddr(addr))
        assert found is not None
        assert (found.phys, found.executable, found.user, found.writable) == (
            phys, flags[0] != "X", flags[7] == "U", flags[8] == "W"
        ), f"{addr:#x}"  # fmt: skip
        covered += found.page_size
    assert sum(run.range.size for run in kernel.table.mappings(window)) == covered
    assert len(expected) > 1000


def test_page_walks_equal_gva2gpa_with_four_levels() -> None:
    with GuestVm(GuestSpec(cpu="default")) as vm:
        kernel = open_kernel(vm)
        assert kernel.table.levels == 4
        print(f"\n{assert_walks_equal_gva2gpa(kernel, 500)}")
        vm.cont()


@pytest.mark.parametrize("cpu", ["max", "default"])
def test_kernel_table_is_found_from_a_vcpu_in_user_mode_under_pti(cpu: Literal["max", "default"]) -> None:
    with GuestVm(GuestSpec(cpu=cpu, vcpus=2, extra_cmdline=("pti=on",))) as vm:
        job = vm.spawn("workload spin 0")
        deadline = time.monotonic() + 60
        while True:
            vm.stop()
            registers = idt.read_registers(Ram(vm))
            user = next((one.index for one in registers if one.cpl == 3), None)
            # In the kernel, and not on its way in or out, with the user's table.
            idle = next((one.index for one in registers if one.cpl == 0 and not one.cr3 & 0x1000), None)
            if user is not None and idle is not None:
                break
            assert time.monotonic() < deadline, "never one vCPU in user mode and the other one in the kernel"
            vm.cont()
            time.sleep(0.05)
        kernel = open_kernel(vm, user)
        assert kernel.registers[user].cr3 & 0x1000, "the vCPU has not got the user's table loaded"
        assert kernel.table.root == kernel.registers[user].cr3 & ~0x1FFF & ~(1 << 63)
        user_table = paging.loaded_table(kernel.ram, kernel.registers[user].cr3, kernel.registers[user].cr4)
        assert user_table.walk(kernel.core.address("linux_banner")) is None
        # The other vCPU is in the kernel: QEMU walks a kernel table there.
        print(f"\n{assert_walks_equal_gva2gpa(kernel, 300, oracle_cpu=idle)}")
        vm.cont()
        vm.finish(job, kill=True)


def test_planned_mapping_is_what_qemu_then_sees(kernel: Kernel) -> None:
    size, data = 4 << 20, 1 << 20
    base = kernel.vm.reserved_base
    assert base is not None
    virt = find_hole(kernel.table, MODULE_AREA, size)
    assert virt is not None
    before = qemus_leaves(kernel.vm)
    phys, tables = PhysAddr(base), (PhysAddr(base + (8 << 20)), 1 << 16)
    plan = plan_mapping(kernel.table, virt, phys, size, tables=tables, data=data)
    for addr, image in plan.tables:
        kernel.ram.write_physical(addr, image)
    for link in plan.links:
        assert kernel.ram.read_physical(link.addr, 8) == link.old
        kernel.ram.write_physical(link.addr, link.new)
    kernel.table.invalidate()
    map_pages(kernel.table, kernel.ram, offset(virt, data), offset(phys, data), size - data, CODE_FLAGS, tables)
    try:
        after = qemus_leaves(kernel.vm)
    finally:
        for link in plan.undo():
            kernel.ram.write_physical(link.addr, link.new)
    expected = {virt + at: (phys + at, "X--DA---W" if at < data else "---DA----") for at in range(0, size, 0x1000)}
    assert {addr: leaf for addr, leaf in after.items() if addr not in before} == expected
    assert qemus_leaves(kernel.vm) == before


def test_e820_equals_proc_iomem(vm: GuestVm) -> None:
    iomem = vm.check_output("cat /proc/iomem")
    kernel = open_kernel(vm)
    vm.cont()
    table = read_e820(kernel.table, kernel.core)
    kinds = {entry.type_name for entry in table.entries}
    expected = sorted(
        (int(start, 16), int(end, 16), kind)
        for start, end, kind in re.findall(r"^ *([0-9a-f]+)-([0-9a-f]+) : (.*)$", iomem, re.M)
        if kind in kinds
    )
    assert sorted((entry.addr, entry.end - 1, entry.type_name) for entry in table.entries) == expected
    base = vm.reserved_base
    assert base is not None
    assert table.is_reserved(PhysAddr(base), 16 << 20)
    assert not table.is_reserved(PhysAddr(base - 0x1000), 0x2000)
    assert not table.is_reserved(PhysAddr(0x100_0000), 0x1000)


def test_tasks_equal_the_guests_proc(vm: GuestVm) -> None:
    # Started once and left alone: a process with a user-mode loop, seen by both observers.
    job = vm.spawn("workload spin 0")
    script = "for t in /proc/[0-9]*/task/[0-9]*; do echo ${t##*/} $(cut -d/ -f3 <<E\n$t\nE\n) $(cat $t/comm); done"

    def listed() -> dict[int, tuple[int, str]]:
        lines = (line.split(None, 2) for line in vm.check_output(script).splitlines())
        return {int(pid): (int(tgid), comm) for pid, tgid, comm in (line for line in lines if len(line) == 3)}

    expected = listed()
    kernel = open_kernel(vm)
    tasks = read_tasks(kernel.table, kernel.core, kernel.btf)
    current = current_tasks(kernel.table, kernel.core, kernel.btf)
    vm.cont()
    after = listed()
    vm.finish(job, kill=True)
    found = {task.pid: (task.tgid, task.comm) for task in tasks if task.pid}
    assert sum(task.pid == 0 for task in tasks) == 2, "one idle task for each CPU"
    # Who is in both listings was there in between. Helpers of the listing itself, and kernel workers, come and go.
    both = expected.keys() & found.keys()
    gone = {pid: expected[pid] for pid in expected.keys() & after.keys() - both}
    come = {pid: found[pid] for pid in found.keys() - both - after.keys() if not found[pid][1].startswith("kworker")}
    assert gone == {}
    assert come == {}
    assert len(both) > 30
    for pid in both:
        # /proc shows a kernel thread's full name, and what a worker works at, where comm holds 15 characters.
        assert expected[pid][0] == found[pid][0]
        assert expected[pid][1].startswith(found[pid][1])
    assert "workload" in {comm for _, comm in found.values()}
    assert len(current) == 2
    assert set(current.values()) <= {task.addr for task in tasks}


def test_a_zombie_has_no_stack(vm: GuestVm) -> None:
    job = vm.spawn("sleep 0 & exec sleep 1000")
    pid = vm.check_output("until ps -o stat,pid | grep '^ *Z'; do sleep 0.1; done").split()[1]
    kernel = open_kernel(vm)
    tasks = read_tasks(kernel.table, kernel.core, kernel.btf)
    (zombie,) = [task for task in tasks if task.pid == int(pid)]
    assert zombie.comm == "sleep"
    assert zombie.stack.size == 0
    # All others have one, and it can be read.
    stacks = list(task_stacks(tasks))
    assert len(stacks) == len(tasks) - 1
    assert list(
        scan_stacks(kernel.table, stacks, AddressRange(kernel.core.address("_stext"), kernel.core.address("_etext")))
    )
    vm.cont()
    vm.finish(job, kill=True)


def test_stack_scan_finds_the_return_addresses_of_a_sleeper(vm: GuestVm) -> None:
    job = vm.spawn("sleep 1000")
    pid = ""
    while not pid:
        pid = vm.run("pidof sleep")[1].strip()
    vm.check_output(f"until grep -q nanosleep /proc/{pid}/stack; do :; done")
    shown = vm.check_output(f"cat /proc/{pid}/stack")
    kernel = open_kernel(vm)
    tasks = [task for task in read_tasks(kernel.table, kernel.core, kernel.btf) if task.pid == int(pid)]
    text = AddressRange(kernel.core.address("_stext"), kernel.core.address("_etext"))
    words = list(scan_stacks(kernel.table, task_stacks(tasks), text))
    stacks = cpu_stacks(kernel.table, kernel.core, kernel.btf)
    everywhere = list(scan_stacks(kernel.table, [*stacks], text))
    vm.cont()
    vm.finish(job, kill=True)
    found = []
    for word in words:
        symbol = kernel.core.symbol_at(word.value)
        assert symbol is not None
        found.append(f"{symbol[0].name}+{symbol[1]:#x}")
    frames = re.findall(r"\] (\S+)/0x", shown)
    assert len(frames) >= 3
    # Every frame that the guest shows is among the words, in its order.
    remaining = iter(found)
    assert all(frame in remaining for frame in frames), f"{frames} not within {found}"
    assert len(stacks) == 6
    assert everywhere, "CPUs that have had interrupts left return addresses on their interrupt stacks"


def test_state_is_running(kernel: Kernel) -> None:
    state = read_state(kernel.table, kernel.core, kernel.btf)
    assert (state.system_state, state.panic_cpu, state.oops_in_progress) == ("SYSTEM_RUNNING", None, False)
    state.check_running()


@pytest.mark.parametrize("kind", ["debian", pytest.param("newest", marks=pytest.mark.full)])
def test_every_moment_of_a_boot_gives_a_clear_answer(kind: Literal["debian", "newest"]) -> None:
    answers: dict[str, int] = {}
    vm = GuestVm(GuestSpec(kernel=kind))
    vm.start(paused=True)
    try:
        deadline = time.monotonic() + 240
        while "up" not in answers:
            assert time.monotonic() < deadline, f"not up: {answers}"
            try:
                answer = read_state_of(vm) or "up"
            except GuestStateError as error:
                answer = re.sub(r"0x[0-9a-f]+", "ADDR", error.message)
                vm.cont()
            answers[answer] = answers.get(answer, 0) + 1
            # Each look stops the guest for a while; it must have time to get on in between.
            time.sleep(0.1)
    finally:
        vm.close()
    print(f"\n{answers}")
    assert any("not in 64-bit mode" in answer for answer in answers)


def test_state_shows_a_panic() -> None:
    # panic=-1 would reboot at once: the guest is to stay where it is.
    with GuestVm(GuestSpec(extra_cmdline=("panic=0",))) as vm:
        assert not read_state_of(vm)
        vm.spawn("sleep 1; echo c > /proc/sysrq-trigger")
        deadline = time.monotonic() + 30
        while not (panicked := read_state_of(vm)):
            assert time.monotonic() < deadline, "no panic"
            time.sleep(0.2)
        assert "panicked" in panicked


def read_state_of(vm: GuestVm) -> str:
    kernel = open_kernel(vm)
    state = read_state(kernel.table, kernel.core, kernel.btf)
    vm.cont()
    return "" if state.is_running else f"panicked on {state.panic_cpu}" if state.panic_cpu is not None else "not up"


def test_blacklist_equals_the_guests_own(vm: GuestVm) -> None:
    shown = vm.check_output("cat /sys/kernel/debug/kprobes/blacklist")
    kernel = open_kernel(vm)
    facts = read_text_facts(kernel.table, kernel.kallsyms, kernel.btf, kernel.modules)
    vm.cont()
    expected = [(int(a, 16), int(b, 16)) for a, b in re.findall(r"^0x([0-9a-f]+)-0x([0-9a-f]+)\s", shown, re.M)]
    listed = [entry for entry in facts.forbidden.entries if entry.reason is Reason.BLACKLISTED]
    assert sorted((entry.range.start, entry.range.end) for entry in listed) == sorted(expected)
    assert len(expected) > 200
    # The list's first lines that are whole sections come from the sections' symbols; all of it is refused.
    for start, _ in expected:
        assert facts.reason_at(VirtAddr(start), 1) is not None


def test_text_tables_name_instructions_of_the_kind_they_are_for(kernel: Kernel) -> None:
    facts = read_text_facts(kernel.table, kernel.kallsyms, kernel.btf, kernel.modules)
    decoder = Cs(CS_ARCH_X86, CS_MODE_64)

    def decode(addr: int) -> tuple[str, int]:
        _, size, mnemonic, _ = next(decoder.disasm_lite(kernel.table.read(VirtAddr(addr), 15), addr))
        return mnemonic, size

    tables = facts.tables
    live = facts.is_live_text
    assert {decode(addr) for addr in tables.jump_labels if live(addr)} == {
        ("nop", 2), ("nop", 5), ("jmp", 2), ("jmp", 5)
    }  # fmt: skip
    # A tail call to nothing is a ret; one to "return 0" is the 5-byte xor; a WARN() of 6.19 and later is a ud1, whose
    # operand capstone leaves out.
    kinds = {("call", 5), ("nop", 5), ("jmp", 5), ("ret", 1), ("xor", 5), ("ud1", 4)}
    for addr in tables.static_calls:
        if live(addr):
            assert decode(addr) in kinds, f"{addr:#x}"
    assert {decode(addr)[0] for addr in tables.bugs if live(addr)} == {"ud2"}
    assert len(tables.jump_labels) == len(tables.jump_targets) > 5000
    assert len(tables.ex_table) == len(tables.ex_fixups) > 400
    assert facts.in_extable(tables.ex_table[0])
    assert not facts.in_extable(tables.ex_table[0] + 1)


def test_lock_prefixes_are_known_while_a_second_cpu_may_come(expandable: GuestVm) -> None:
    vm = expandable
    kernel = open_kernel(vm)
    facts = read_text_facts(kernel.table, kernel.kallsyms, kernel.btf, kernel.modules)
    live = [addr for addr in facts.tables.locks if facts.is_live_text(addr)]
    found = {kernel.table.read(VirtAddr(addr), 1) for addr in live}
    vm.cont()
    # Patched to a DS prefix, which means nothing there, as long as there is one CPU.
    assert found == {b"\x3e"}
    assert len(live) > 5000


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        ("do_sys_openat2", None),
        ("vfs_read", None),
        ("asm_exc_int3", Reason.BP_PATH),
        ("exc_int3", Reason.BP_PATH),
        ("asm_exc_page_fault", Reason.ENTRY_TEXT),
        ("exc_page_fault", Reason.NOINSTR),
        ("start_kernel", Reason.INIT_TEXT),
        ("linux_banner", Reason.NOT_TEXT),
        ("kprobe_int3_handler", Reason.BLACKLISTED),
        ("__SCT__cond_resched", Reason.STATIC_CALL_TRAMPOLINE),
    ],
)
def test_what_may_be_touched(kernel: Kernel, symbol: str, reason: Reason | None) -> None:
    facts = read_text_facts(kernel.table, kernel.kallsyms, kernel.btf, kernel.modules)
    refusal = facts.reason_at(kernel.core.address(symbol), 5)
    assert (refusal.reason if refusal else None) == reason


def test_console_shows_nothing_wrong_after_all_that(vm: GuestVm) -> None:
    assert vm.dmesg_problems() == []


REAPED = (
    "httpd -p 127.0.0.1:8099 -h /tmp; sleep 1; "
    "for i in 1 2 3 4 5 6; do wget -q -O /dev/null http://127.0.0.1:8099/none; done; killall httpd"
)
"""A server that ignores the end of its children: they take themselves off the list of tasks."""


def test_the_stack_of_a_task_that_is_on_no_list_any_more_is_searched(booted_guest: Booted) -> None:
    """``release_task`` has taken it off, and its last call has not been made yet; its interrupted callers are there."""
    vm = booted_guest(GuestSpec())
    job = vm.spawn(REAPED)
    found = 0
    with RspSocket(vm.gdb_address) as channel:
        stub = QemuStub(channel)
        kernel = open_linux(stub, RamView(stub, None))
        [symbol] = kernel.kallsyms.lookup("do_exit")
        do_exit = AddressRange(symbol.addr, kernel.kallsyms.end(symbol))
        last = kernel.kallsyms.address("do_task_dead")
        for _ in range(20):
            cpu = stub.run_to((last,), 3)
            if cpu is None:
                break
            rsp = stub.read_register(cpu, "rsp")
            kernel.refresh()
            listed = any(rsp in task.stack for task in read_tasks(kernel.memory, kernel.kallsyms, kernel.types))
            words = kernel.stack_words_into(do_exit, {cpu: rsp})
            assert words, "its caller"
            found += not listed
            while stub.read_register(cpu, "rip") == last:
                stub.step(cpu)  # QEMU would stop there again
        channel.detach()
    vm.finish(job)
    assert found >= 3
