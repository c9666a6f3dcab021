"""The dispatcher's code, executed: found or not, counted, sent to the slot, the caller's registers kept."""

from __future__ import annotations

import random

import pytest
from unicorn import UC_ARCH_X86, UC_HOOK_CODE, UC_MODE_64, Uc
from unicorn import x86_const as uc

from gdb_kprobe.actions.lower import COUNTER, ENABLE, REGIONS, lower
from gdb_kprobe.bpf.verifier import check
from gdb_kprobe.kprobes import guest_dispatch as code
from gdb_kprobe.kprobes.action import MISS_SIZE, UNDO_SIZE, Action, Ask, Verdict
from gdb_kprobe.kprobes.handler import Handler, Program
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.linux import pt_regs
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import iter_insns

CODE, TABLE, COUNTERS, STACK = (VirtAddr(0x10_0000 * n) for n in range(1, 5))
PROGRAM = Program(check(lower(None), REGIONS), COUNTER)
DISPATCHER, GATE = VirtAddr(CODE + 0x1000), VirtAddr(CODE)
FORWARD, BACK = VirtAddr(CODE + 0x8000), VirtAddr(CODE + 0x9000)
REGS = STACK + 0x8000
BITS = 4
CELL = VirtAddr(COUNTERS + 0x8000)
KERNEL_CS, USER_CS = 0x10, 0x33
KEPT = ("RBX", "RBP", "R12", "R13", "R14", "R15")
REGISTERS = ("RAX", "RCX", "RDX", "RSI", "RDI", *KEPT, *(f"R{n}" for n in range(8, 12)))
KERNEL = 0x7100_0000
"""Stands for kernel text; unicorn reads the byte at a probed address that is not probed any more."""


class Machine:
    """The dispatcher as the #BP entry calls it: RDI and RSP as there, anything in the other registers."""

    def __init__(self) -> None:
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        for base in (CODE, TABLE, COUNTERS, STACK, KERNEL):
            self.uc.mem_map(base, 0x10_0000)
        self.uc.mem_write(DISPATCHER, code.emit_dispatcher(DISPATCHER, CELL, FORWARD))
        self.use(TABLE, BITS)
        self.gate = code.emit_gate(GATE, FORWARD)
        self.uc.mem_write(GATE, self.gate.code)
        self.uc.mem_write(FORWARD, b"\xf4")
        self.uc.mem_write(BACK, b"\xf4")
        self.taken: set[int] = set()

    def use(self, table: VirtAddr, bits: int) -> None:
        """Have the table of 2**bits entries at *table* searched from now on."""
        self.uc.mem_write(CELL, code.table_word(table, bits).to_bytes(8, "little"))

    def enter(self, addr: int, handler: int) -> None:
        index = code.table_index(addr, BITS)
        while index in self.taken:
            index = (index + 1) % (1 << BITS)
        self.taken.add(index)
        self.uc.mem_write(TABLE + index * code.ENTRY.size, code.ENTRY.pack(addr, handler))

    def hit(self, addr: int, cs: int = KERNEL_CS, *, until: int = BACK) -> tuple[int, int]:
        """Where it went, and the IP that the interrupted context has then."""
        regs = bytearray(random.randbytes(pt_regs.SIZE))
        at = pt_regs.OFFSETS
        regs[at["rip"] : at["rip"] + 8] = (addr + 1).to_bytes(8, "little")
        regs[at["cs"] : at["cs"] + 8] = cs.to_bytes(8, "little")
        self.uc.mem_write(REGS, bytes(regs))
        self.uc.mem_write(REGS - 8, BACK.to_bytes(8, "little"))
        kept = {name: random.getrandbits(64) for name in KEPT}
        for name in ("RAX", "RCX", "RDX", "RSI", *(f"R{n}" for n in range(8, 12))):
            self.uc.reg_write(getattr(uc, f"UC_X86_REG_{name}"), random.getrandbits(64))
        for name, value in kept.items():
            self.uc.reg_write(getattr(uc, f"UC_X86_REG_{name}"), value)
        self.uc.reg_write(uc.UC_X86_REG_RDI, REGS)
        self.uc.reg_write(uc.UC_X86_REG_RSP, REGS - 8)
        self.uc.emu_start(DISPATCHER, until, count=1000)
        assert {name: self.uc.reg_read(getattr(uc, f"UC_X86_REG_{name}")) for name in KEPT} == kept
        rip = self.uc.reg_read(uc.UC_X86_REG_RIP)
        assert self.uc.reg_read(uc.UC_X86_REG_RSP) == REGS - 8 + 8 * (rip == BACK)
        after = self.uc.mem_read(REGS, pt_regs.SIZE)
        ip = int.from_bytes(after[at["rip"] : at["rip"] + 8], "little")
        regs[at["rip"] : at["rip"] + 8] = after[at["rip"] : at["rip"] + 8]
        assert after == regs, "nothing but IP is changed"
        return int(rip), ip

    def counter(self, index: int) -> int:
        return int.from_bytes(self.uc.mem_read(COUNTERS + 32 * index, 8), "little")


@pytest.fixture
def machine() -> Machine:
    return Machine()


AT = VirtAddr(CODE + 0x2000)
SLOT = VirtAddr(CODE + 0x4000)
MISSED = VirtAddr(COUNTERS + 8)


def counter_at(index: int) -> VirtAddr:
    return VirtAddr(COUNTERS + 32 * index)


def enable(machine: Machine, *counters: int) -> None:
    for counter in counters:
        machine.uc.mem_write(counter_at(counter) + ENABLE, b"\1\0\0\0")


def counting(machine: Machine, index: int, counters: list[int], slot: int) -> int:
    at = VirtAddr(AT + 0x100 * index)
    enable(machine, *counters)
    action = Action(tuple(Handler(PROGRAM, counter_at(counter)) for counter in counters))
    made = code.emit_handler(at, action, VirtAddr(KERNEL), VirtAddr(slot))
    assert (made.entry, made.answer) == (at, None)
    machine.uc.mem_write(at, made.code)
    return at


def asking(text: str | None, index: int) -> Handler:
    condition = None if text is None else parse_condition(text)
    return Handler(Program(check(lower(condition, Verdict.HOST), REGIONS), COUNTER, decides=True), counter_at(index))


def serve(machine: Machine, action: Action) -> code.HandlerCode:
    made = code.emit_handler(AT, action, VirtAddr(KERNEL), SLOT)
    machine.uc.mem_write(AT, made.code)
    machine.uc.mem_write(SLOT, b"\xf4")
    machine.enter(KERNEL, made.entry)
    return made


def ask(machine: Machine, made: code.HandlerCode, *, somebody: bool) -> int:
    """What the interrupted code does that was sent to *made*; where it is then, with its registers as they were."""
    before = {name: random.getrandbits(64) for name in REGISTERS}
    before |= {"RSP": STACK + 0x4000, "EFLAGS": random.getrandbits(12) & 0x8D5 | 2}
    for name, value in before.items():
        machine.uc.reg_write(getattr(uc, f"UC_X86_REG_{name}"), value)
    until = machine.gate.gate if somebody else SLOT
    machine.uc.emu_start(AT, until, count=100)
    after = {name: machine.uc.reg_read(getattr(uc, f"UC_X86_REG_{name}")) for name in before}
    assert after == {**before, "RSP": before["RSP"] - 8 * somebody}
    if somebody:
        assert int.from_bytes(machine.uc.mem_read(after["RSP"], 8), "little") == made.answer
    return int(machine.uc.reg_read(uc.UC_X86_REG_RIP))


def test_an_address_that_is_not_in_the_table_goes_to_the_guests_own_handler(machine: Machine) -> None:
    machine.enter(KERNEL, counting(machine, 0, [0], CODE + 0x4000))
    assert machine.hit(KERNEL + 1, until=FORWARD) == (FORWARD, KERNEL + 2)
    assert machine.counter(0) == 0


def test_user_mode_goes_to_the_guests_own_handler_even_with_a_probed_address(machine: Machine) -> None:
    machine.enter(KERNEL, counting(machine, 0, [0], CODE + 0x4000))
    assert machine.hit(KERNEL, USER_CS, until=FORWARD) == (FORWARD, KERNEL + 1)
    assert machine.counter(0) == 0


def test_each_of_many_sites_counts_for_itself_whatever_the_table_looks_like(machine: Machine) -> None:
    sites = random.Random(5).sample(range(KERNEL, KERNEL + 0x100_0000), 12)  # 12 of 16 entries: collisions and a wrap
    for index, addr in enumerate(sites):
        machine.enter(addr, counting(machine, index, [index], CODE + 0x4000 + 16 * index))
    for index, addr in enumerate(sites):
        for _ in range(index + 1):
            assert machine.hit(addr) == (BACK, CODE + 0x4000 + 16 * index)
    assert [machine.counter(index) for index in range(12)] == list(range(1, 13))
    assert machine.hit(KERNEL + 0x200_0000, until=FORWARD)[0] == FORWARD


@pytest.mark.parametrize("counters", [[], [0], [0, 1, 2]])
def test_a_handler_counts_for_every_probe_of_its_site(machine: Machine, counters: list[int]) -> None:
    machine.enter(KERNEL, counting(machine, 0, counters, CODE + 0x4000))
    assert machine.hit(KERNEL) == (BACK, CODE + 0x4000)
    assert [machine.counter(index) for index in range(4)] == [int(index in counters) for index in range(4)]


@pytest.mark.parametrize("somebody", [True, False])
def test_a_hit_for_the_host_stops_at_the_gate_and_is_a_miss_when_nobody_is_there(
    machine: Machine, somebody: bool
) -> None:
    action = Action((Handler(PROGRAM, counter_at(1)),), Ask(GATE, MISSED, VirtAddr(KERNEL)), always=True)
    made = serve(machine, action)
    assert made.answer is not None
    assert made.code[made.answer - AT - UNDO_SIZE :][:UNDO_SIZE] == KERNEL.to_bytes(8, "little")
    assert machine.hit(KERNEL) == (BACK, AT), "it is asked where the int3 was"
    assert ask(machine, made, somebody=somebody) == (GATE if somebody else SLOT)
    assert int.from_bytes(machine.uc.mem_read(MISSED, 8), "little") == int(not somebody)
    assert machine.counter(1) == 0


YES, NO = f"cs == {KERNEL_CS:#x}", "cs == 0x11"


@pytest.mark.parametrize("texts", [[NO], [YES], [None], [NO, YES], [YES, NO], [None, None], [NO] * 3])
@pytest.mark.parametrize("counted", [0, 1, 2, 3])
def test_a_hit_asks_the_host_only_if_a_program_says_so_and_all_others_count(
    machine: Machine, texts: list[str | None], counted: int
) -> None:
    handlers = [asking(text, index) for index, text in enumerate(texts)]
    handlers.insert(min(counted, len(handlers)), Handler(PROGRAM, counter_at(8)))
    handlers.append(Handler(PROGRAM, counter_at(9)))
    enable(machine, *range(10))
    made = serve(machine, Action(tuple(handlers), Ask(GATE, MISSED, VirtAddr(0))))
    assert made.code[made.entry - AT :][:4] == code.ENDBR64
    wanted = any(text != NO for text in texts)
    assert machine.hit(KERNEL) == (BACK, AT if wanted else SLOT)
    assert [machine.counter(index) for index in range(10)] == [0] * 8 + [1, 1]


def test_no_program_asks_for_a_probe_that_is_disabled(machine: Machine) -> None:
    serve(machine, Action((asking(YES, 0), asking(None, 1)), Ask(GATE, MISSED, VirtAddr(KERNEL))))
    assert machine.hit(KERNEL) == (BACK, SLOT)


def test_what_the_host_steps_goes_on_in_a_copy_without_it(machine: Machine) -> None:
    action = Action((asking(YES, 0),), Ask(GATE, MISSED, VirtAddr(KERNEL)))
    enable(machine, 0)
    copied: list[VirtAddr] = []

    def copy(at: VirtAddr) -> bytes:
        copied.append(at)
        return b"\x90\xf4"

    made = code.emit_handler(AT, action, VirtAddr(KERNEL), SLOT, copy)
    assert made.answer is not None
    assert copied == [made.answer + MISS_SIZE]
    assert made.code[copied[0] - AT :][:2] == b"\x90\xf4"
    machine.uc.mem_write(AT, made.code)
    machine.enter(KERNEL, made.entry)
    assert machine.hit(KERNEL) == (BACK, AT)
    machine.uc.mem_write(counter_at(0) + ENABLE, bytes(4))
    assert machine.hit(KERNEL) == (BACK, copied[0])


@pytest.mark.parametrize("handlers", [0, 1, 3])
def test_whatever_an_indirect_branch_leads_to_begins_with_endbr64(machine: Machine, handlers: int) -> None:
    """So that the code runs with indirect branch tracking on: read from what is emitted, for TCG has no tracking."""
    programs = tuple(Handler(PROGRAM, counter_at(index)) for index in range(handlers))
    asks = Action((*programs, asking(YES, 0)), Ask(GATE, MISSED, VirtAddr(0)))
    entered = [code.emit_handler(AT, action, VirtAddr(KERNEL), SLOT) for action in (Action(programs), asks)]
    handler, stopping = (made.code[made.entry - AT :] for made in entered)
    gate = machine.gate.code
    retired = gate[machine.gate.retired - GATE :]
    assert [target[:4] for target in (handler, stopping, retired)] == [code.ENDBR64] * 3

    def indirect(text: bytes, start: VirtAddr) -> list[str]:
        found = (str(insn) for insn in iter_insns(text, start))
        return [text for text in found if text.startswith(("jmp", "call")) and "0x" not in text.split("[")[0]]

    dispatcher = code.emit_dispatcher(DISPATCHER, CELL, FORWARD)
    assert indirect(dispatcher, DISPATCHER) == ["jmp qword ptr [r8 + 8]"]
    assert [indirect(text, AT) for text in (handler, stopping, gate)] == [[], [], []]


def test_an_int3_that_was_removed_meanwhile_leads_back_to_the_instruction(machine: Machine) -> None:
    machine.enter(KERNEL, machine.gate.retired)
    machine.uc.mem_write(KERNEL, b"\x55")
    assert machine.hit(KERNEL) == (BACK, KERNEL)


def test_an_int3_that_the_guest_has_put_where_ours_was_is_the_guests(machine: Machine) -> None:
    machine.enter(KERNEL, machine.gate.retired)
    machine.uc.mem_write(KERNEL, b"\xcc")
    assert machine.hit(KERNEL, until=FORWARD) == (FORWARD, KERNEL + 1)


@pytest.mark.parametrize("bits", [1, 4, 9, 16])
def test_a_table_of_any_size_is_searched_to_its_end_and_on_from_its_start(bits: int) -> None:
    machine, size = Machine(), 1 << bits
    machine.use(TABLE, bits)
    addr = next(addr for addr in range(KERNEL, KERNEL + 0xF_0000) if code.table_index(addr, bits) == size - 1)
    other = next(at for at in range(addr + 1, KERNEL + 0xF_FFFF) if code.table_index(at, bits) == size - 1)
    machine.uc.mem_write(TABLE + (size - 1) * code.ENTRY.size, code.ENTRY.pack(other, SLOT))
    machine.uc.mem_write(TABLE, code.ENTRY.pack(addr, machine.gate.retired))
    machine.uc.mem_write(addr, b"\x55")
    assert machine.hit(addr) == (BACK, addr)


def test_a_table_that_is_exchanged_while_it_is_searched_is_searched_to_its_end(machine: Machine) -> None:
    """At any instruction: what was there before the exchange is found in either."""
    larger, handler = VirtAddr(TABLE + 0x8000), code.emit_handler(AT, Action(), VirtAddr(KERNEL), SLOT)
    machine.uc.mem_write(AT, handler.code)
    machine.enter(KERNEL, handler.entry)
    index = code.table_index(KERNEL, BITS + 3)
    machine.uc.mem_write(larger + index * code.ENTRY.size, code.ENTRY.pack(KERNEL, handler.entry))
    for at in range(16):
        machine.use(TABLE, BITS)
        seen = 0

        def exchange(*_: object, at: int = at) -> None:
            nonlocal seen
            if seen == at:
                machine.use(larger, BITS + 3)
            seen += 1

        hook = machine.uc.hook_add(UC_HOOK_CODE, exchange)
        assert machine.hit(KERNEL) == (BACK, SLOT)
        machine.uc.hook_del(hook)
        assert seen > at
