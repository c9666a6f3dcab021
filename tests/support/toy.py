"""A small machine that a session can be tried on: physical RAM, page tables, two vCPUs, exceptions, a stub.

Instructions are executed by unicorn, one at a time, through page tables that lie in the RAM and are walked here anew.
What a guest's kernel does in C, its exception handlers, is done in Python: :meth:`ToyMachine.handle_breakpoint` and
:meth:`ToyMachine.handle_page_fault`. Either raises :class:`GuestDiedError` where a kernel would oops.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import unicorn
from unicorn import x86_const

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.guest.bare import BareGuest
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.model import GENERAL_REGISTERS, AddressRange, CpuId, ModuleLoad, PhysAddr, Rung, VirtAddr
from gdb_kprobe.region.directory import Kind
from gdb_kprobe.region.header import Header, read_header
from gdb_kprobe.region.layout import DIRECTORY_OFFSET, FIRST_PAGE, MARK_OFFSET, MARK_SIZE
from gdb_kprobe.region.records import Record, iter_records
from gdb_kprobe.region.region import Region, create_mapped
from gdb_kprobe.session.probes import Hit, Probe
from gdb_kprobe.session.session import Session
from gdb_kprobe.session.sites.plans import Policy
from gdb_kprobe.system import idt
from gdb_kprobe.system.paging import PageTable
from gdb_kprobe.target.packets import RUN
from gdb_kprobe.target.protocols import Machine
from gdb_kprobe.target.quirks import Accelerator, Quirks
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.x86.decode import decode
from tests.support.kvm_stub import TF, KvmStub

RAM_SIZE = 8 << 20
TEXT, TEXT_PHYS = 0xFFFF_FFFF_8010_0000, 0x10_0000
DATA, DATA_PHYS = 0xFFFF_FFFF_8020_0000, 0x20_0000
STACKS, STACKS_PHYS, STACK_SIZE = 0xFFFF_FFFF_8030_0000, 0x30_0000, 0x4000
USER, USER_PHYS = 0x40_0000, 0x3F_0000
LAZY, LAZY_PHYS = 0xFFFF_FFFF_8038_0000, 0x38_0000
REGION_PHYS, REGION_SIZE = 0x40_0000, 0x20_0000
ROOT, TABLE_POOL = 0x60_0000, 0x60_1000
WINDOW = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))

P, W, U, NX = 1, 2, 4, 1 << 63
KERNEL_CS, USER_CS = 0x10, 0x33
_REGISTER = {
    name: getattr(x86_const, f"UC_X86_REG_{'RFLAGS' if name == 'eflags' else name.upper()}")
    for name in GENERAL_REGISTERS
}
_MASK = (1 << 64) - 1

# Each function is hexadecimal code; `count` increments the function's counter, NAME:rel is a rel32 to a symbol.
PROGRAM = {
    "f_nop": "0f1f440000 count 8d0437 c3",  # nop; ...; lea eax, [rdi+rsi]; ret
    "f_push": "55 4889e5 53 count 5b 5d 8d0437 c3",  # push rbp; mov rbp, rsp; push rbx; ...
    "f_lea": "488d05 constant:rel count 488b00 c3",  # lea rax, [rip+constant]; ...; mov rax, [rax]
    "f_jcc": "85ff 740b 8d0437 count c3 count b863000000 c3",  # test edi, edi; jz
    "f_back": "31c0 ffc0 39f8 75fa count c3",  # xor eax, eax; 1: inc eax; cmp eax, edi; jne 1b
    "f_call": "e8 leaf:rel count ffc0 c3",  # call leaf; ...; inc eax
    "f_call_register": "488d05 leaf:rel ffd0 count ffc0 c3",  # lea rax, [leaf]; call rax
    "f_jmp": "eb02 0f0b count 8d0437 c3",  # jmp over ud2
    "f_loop": "31c0 89f9 ffc0 e2fc count c3",  # mov ecx, edi; 1: inc eax; loop 1b
    "f_load": "488b07 count c3",  # mov rax, [rdi]: faults
    "f_store": "488937 count c3",  # mov [rdi], rsi: faults, and has no fixup
    "f_int3": "cc count c3",  # a breakpoint of the guest's own
    "f_pushf": "9c 58 count 8d0437 c3",  # pushfq; pop rax; ...
    "f_ret": "c3",
    "leaf": "8d0437 c3",
    "fixup": "48c7c0f2ffffff c3",  # mov rax, -14; ret
    "done": "f4",
    "bp_entry": "f4",
    "pf_entry": "f4",
}
DATA_SYMBOLS = {"idt": 0, "constant": 0x800, "counters": 0x900}
CONSTANT = 0x1234


class GuestDiedError(Exception):
    """The guest's kernel would have oopsed."""


def link(program: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Assemble *program*; returns the text and the address of every symbol."""
    symbols = {name: DATA + offset for name, offset in DATA_SYMBOLS.items()}
    symbols |= {f"count_{name}": DATA + 0x900 + 8 * index for index, name in enumerate(program)}
    symbols |= {name: TEXT + 0x40 * index for index, name in enumerate(program)}
    text = bytearray()
    for name, source in program.items():
        text += b"\xcc" * (symbols[name] - TEXT - len(text))
        for word in source.replace("count", f"48ff05 count_{name}:rel").split():  # inc qword ptr [rip+rel32]
            if word.endswith(":rel"):
                text += struct.pack("<i", symbols[word[:-4]] - (TEXT + len(text) + 4))
            else:
                text += bytes.fromhex(word)
    return bytes(text).ljust(0x1000, b"\xcc"), symbols


class _Registers(dict[str, int]):
    """The registers of a vCPU of *machine*, which notes that they were changed."""

    def __init__(self, machine: ToyMachine, values: dict[str, int]) -> None:
        super().__init__(values)
        self._machine = machine

    def __setitem__(self, name: str, value: int) -> None:
        self._machine.changed()
        super().__setitem__(name, value)

    def update(self, *args: Any, **values: int) -> None:
        self._machine.changed()
        super().update(*args, **values)

    # dict says by overloads what it takes; the tests give it dicts.
    def __ior__(self, values: Any) -> Self:  # type: ignore[override, misc]
        self.update(values)
        return self


class ToyMachine:
    """RAM, vCPUs 1 and 2, and what QEMU's stub does with them."""

    shown: CpuId | None = None

    def __init__(self) -> None:
        self.ram = mmap.mmap(-1, RAM_SIZE)
        self._buffer = (ctypes.c_char * RAM_SIZE).from_buffer(self.ram)
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_BROADWELL)
        self._uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._uc.mem_map_ptr(0, RAM_SIZE, unicorn.UC_PROT_ALL, ctypes.addressof(self._buffer))
        self._uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)
        self._pool = TABLE_POOL
        self.text, self.symbols = link(PROGRAM)
        self._load()
        self.runs = 0
        """Grows with each change of registers, whoever makes it."""
        self.others_runs = 0
        """The same, but for what comes through :class:`ToyWire`."""
        self.is_on_wire = False
        self.traps = 0
        """How many #DB the guest has taken that nobody had asked for."""
        self.flushes_at_write = True
        self.exception_entries: Collection[int] = (self.symbols["pf_entry"],)
        self.registers = {cpu: _Registers(self, self._reset(cpu)) for cpu in (1, 2)}

        self.breakpoints: set[int] = set()
        self.users_breakpoints: set[int] = set()
        self.watched: frozenset[int] = frozenset()
        self.log: list[tuple[int, bytes]] = []
        """Physical writes in their order: all that a debugger has done to the guest's memory."""
        self.ignored: set[int] = set()
        """Physical addresses where a write changes nothing, as in a ROM."""
        self.rejected: set[int] = set()
        """Physical addresses where a write is an error."""
        self.cr0 = 0x8001_0011
        self.idt_limit = 16 * 32 - 1
        self.unmoved_steps = 0
        """How many of the next steps come back with nothing executed, as one in 500 of QEMU's does."""
        self.overrunning_steps = 0
        """How many of the next steps execute two instructions, as those of some instructions do."""
        self.changes_left: int | None = None
        """After so many changes of anything the connection is lost, as when gdb is killed."""
        self.fixups: dict[int, int] = {}
        self.lazy: set[int] = set()
        """Pages at LAZY that the guest maps when they are touched."""
        self.own_int3: list[tuple[int, int]] = []
        """(address, CS) of each #BP that the guest's own handler saw."""

    def changed(self) -> None:
        """Registers have changed: a vCPU has run, or was written to."""
        self.runs += 1
        self.others_runs += not self.is_on_wire

    # -- the guest's memory -----------------------------------------------------------------------------------------

    def _load(self) -> None:
        for virt, phys, size, flags in (
            (TEXT, TEXT_PHYS, 0x1000, P),
            (DATA, DATA_PHYS, 0x1000, P | W | NX),
            (STACKS, STACKS_PHYS, 2 * STACK_SIZE, P | W | NX),
            (USER, USER_PHYS, 0x1000, P | U),
        ):
            for at in range(0, size, 0x1000):
                self.map(virt + at, phys + at, flags)
        self.ram[TEXT_PHYS : TEXT_PHYS + 0x1000] = self.text
        self.ram[USER_PHYS : USER_PHYS + 0x1000] = b"\xcc" * 0x1000
        self.set_quad(DATA_PHYS + DATA_SYMBOLS["constant"], CONSTANT)
        for vector, name in ((3, "bp_entry"), (14, "pf_entry")):
            handler = self.symbols[name]
            gate = struct.pack(
                "<HHBBHII", handler & 0xFFFF, KERNEL_CS, 0, 0xEE, handler >> 16 & 0xFFFF, handler >> 32, 0
            )
            self.ram[DATA_PHYS + 16 * vector : DATA_PHYS + 16 * vector + 16] = gate

    def quad(self, phys: int) -> int:
        return int.from_bytes(self.ram[phys : phys + 8], "little")

    def set_quad(self, phys: int, value: int) -> None:
        self.ram[phys : phys + 8] = (value & _MASK).to_bytes(8, "little")

    def map(self, virt: int, phys: int, flags: int) -> None:
        """What the guest's kernel does to map a page of 4 KiB."""
        table = ROOT
        for shift in (39, 30, 21):
            entry = table + 8 * (virt >> shift & 511)
            if not self.quad(entry):
                self.set_quad(entry, self._pool | P | W | U)
                self._pool += 0x1000
            table = self.quad(entry) & 0xF_FFFF_FFFF_F000
        self.set_quad(table + 8 * (virt >> 12 & 511), phys | flags)

    def walk(self, virt: int) -> tuple[int, int] | None:
        """Physical address and unicorn's permissions of *virt*, as the processor finds them."""
        table, writable, executable = ROOT, True, True
        for shift in (39, 30, 21, 12):
            value = self.quad(table + 8 * (virt >> shift & 511))
            if not value & P:
                return None
            writable, executable = writable and bool(value & W), executable and not value & NX
            table = value & 0xF_FFFF_FFFF_F000
        rights = unicorn.UC_PROT_READ
        rights |= (unicorn.UC_PROT_WRITE if writable else 0) | (unicorn.UC_PROT_EXEC if executable else 0)
        return table + (virt & 0xFFF), rights

    def _fill(self, uc: Any, virt: int, access: int, entry: Any, data: object) -> bool:
        found = self.walk(virt)
        if found is None:
            return False
        entry.paddr, entry.perms = found[0] & -0x1000, found[1]
        return True

    # -- the vCPUs --------------------------------------------------------------------------------------------------

    def _reset(self, cpu: int) -> dict[str, int]:
        values = dict.fromkeys(GENERAL_REGISTERS, 0)
        values |= {
            "rip": self.symbols["done"],
            "rsp": self.stack_top(cpu),
            "eflags": 0x202,
            "rbx": 0xB0B0,
            "rbp": 0xB1B1,
        }
        return values | {"cs": KERNEL_CS, "ss": 0x18, "cr3": ROOT, "cr4": 0x20}

    @staticmethod
    def stack_top(cpu: int) -> int:
        return STACKS + cpu * STACK_SIZE - 0x100

    def execute(self, cpu: int) -> None:
        """One instruction, or the exception that it raises."""
        values = self.registers[cpu]
        rip = values["rip"]
        if rip == self.symbols["bp_entry"]:
            return self.handle_breakpoint(cpu)
        if rip == self.symbols["pf_entry"]:
            return self.handle_page_fault(cpu)
        found = self.walk(rip)
        if found is not None and found[1] & unicorn.UC_PROT_EXEC and self.ram[found[0]] == 0xCC:
            return self.raise_exception(cpu, "bp_entry", rip + 1)
        trap = values["eflags"] & TF
        if trap and not self.is_on_wire:
            # What Linux does with a #DB that nobody has asked for: it warns, and goes on without.
            self.traps += 1
            trap = 0
            values["eflags"] &= ~TF
        for name, number in _REGISTER.items():
            self._uc.reg_write(number, values[name] & ~TF if name == "eflags" else values[name])
        try:
            self._uc.emu_start(rip, 0, 0, 1)
        except unicorn.UcError:
            return self.raise_exception(cpu, "pf_entry", rip, 0)
        for name, number in _REGISTER.items():
            values[name] = self._uc.reg_read(number)
        values["eflags"] |= trap
        return None

    def raise_exception(self, cpu: int, entry: str, rip: int, *error_code: int) -> None:
        """Push the frame, on a stack aligned to 16 (from user mode: on the kernel's), and go to the handler."""
        values = self.registers[cpu]
        top = self.stack_top(cpu) if values["cs"] & 3 else values["rsp"]
        frame = (*error_code, rip, values["cs"], values["eflags"], values["rsp"], values["ss"])
        rsp = (top & -16) - 8 * len(frame)
        self._store(rsp, struct.pack(f"<{len(frame)}Q", *frame))
        values.update(rip=self.symbols[entry], rsp=rsp, cs=KERNEL_CS, eflags=values["eflags"] & ~TF)

    def iretq(self, cpu: int) -> None:
        values = self.registers[cpu]
        names = ("rip", "cs", "eflags", "rsp", "ss")
        values.update(zip(names, struct.unpack("<5Q", self.load(values["rsp"], 40)), strict=True))

    def handle_breakpoint(self, cpu: int) -> None:
        """The guest's own #BP handler: it knows ``f_int3`` and what is in user mode."""
        rip, cs = struct.unpack("<2Q", self.load(self.registers[cpu]["rsp"], 16))
        if rip - 1 != self.symbols["f_int3"] and not cs & 3:
            raise GuestDiedError(f"int3 at {rip - 1:#x}")
        self.own_int3.append((rip - 1, cs))
        self.iretq(cpu)

    def handle_page_fault(self, cpu: int) -> None:
        """The guest's own #PF handler: it pages in, or looks the address up in its exception table, or dies."""
        values = self.registers[cpu]
        values["rsp"] += 8
        rip = int.from_bytes(self.load(values["rsp"], 8), "little")
        if self.lazy:
            page = self.lazy.pop()
            self.map(page, LAZY_PHYS, P | W | NX)
        elif rip in self.fixups:
            self._store(values["rsp"], self.fixups[rip].to_bytes(8, "little"))
        else:
            raise GuestDiedError(f"page fault at {rip:#x}")
        self.iretq(cpu)

    def load(self, virt: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            found = self.walk(virt + len(data))
            assert found is not None, f"{virt:#x}"
            count = min(size - len(data), 0x1000 - (found[0] & 0xFFF))
            data += self.ram[found[0] : found[0] + count]
        return data

    def _store(self, virt: int, data: bytes) -> None:
        for at, byte in enumerate(data, virt):
            found = self.walk(at)
            assert found is not None, f"{at:#x}"
            self.ram[found[0]] = byte

    # -- what the stub offers: Machine and Breakpoints ----------------------------------------------------------------

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        if addr + size > RAM_SIZE:
            raise TargetError(f"no RAM at {addr:#x}")
        return self.ram[addr : addr + size]

    def _change(self) -> None:
        if self.changes_left is not None:
            if not self.changes_left:
                raise ConnectionLostError("gdb was killed")
            self.changes_left -= 1

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self._change()
        if addr + len(data) > RAM_SIZE or addr in self.rejected:
            raise TargetError(f"cannot write at {addr:#x}")
        self.log.append((addr, data))
        if addr not in self.ignored:
            self.ram[addr : addr + len(data)] = data
        self._uc.ctl_flush_tb()

    def cpus(self) -> tuple[CpuId, ...]:
        return CpuId(1), CpuId(2)

    def read_registers(self, cpu: CpuId) -> dict[str, int]:
        return dict(self.registers[cpu])

    def read_register(self, cpu: CpuId, name: str) -> int:
        return self.registers[cpu][name]

    def write_registers(self, cpu: CpuId, values: dict[str, int]) -> None:
        assert values.keys() <= self.registers[cpu].keys()
        assert all(0 <= value <= _MASK for value in values.values())
        if values:
            self._change()
            self.registers[cpu] |= values
        if "cr4" in values and self.flushes_at_write:
            self.flush_tlb()

    def flush_tlb(self) -> None:
        self._uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)

    @property
    def quirks(self) -> Quirks:
        return Quirks(Accelerator.TCG)

    def watch_faults(self, entries: Any) -> None:
        """A step ends at each."""

    def drop_trap_flag(self, cpu: CpuId) -> None:
        """There is none."""

    @contextlib.contextmanager
    def flushed(self) -> Iterator[None]:
        yield
        self.flush_tlb()

    def check_can_run(self) -> None:
        """It always can."""

    def run_briefly(self) -> None:
        raise AssertionError("there is no need")

    def run_to(self, addrs: Any, seconds: float, *, heed: bool = True) -> CpuId | None:
        raise NotImplementedError

    def read_current(self, cpu: CpuId, addr: VirtAddr, size: int) -> bytes | None:
        pages = range(addr & -0x1000, addr + size, 0x1000)
        return self.load(addr, size) if all(self.walk(page) for page in pages) else None

    def write_current(self, cpu: CpuId, addr: VirtAddr, data: bytes) -> bool:
        if self.read_current(cpu, addr, len(data)) is None:
            return False
        self._change()
        self._store(addr, data)
        return True

    def step(self, cpu: CpuId) -> None:
        self._change()
        if self.unmoved_steps:
            self.unmoved_steps -= 1
        else:
            self.execute(cpu)
            if self.overrunning_steps:
                self.overrunning_steps -= 1
                self.execute(cpu)

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def drop_breakpoints(self) -> None:
        self.breakpoints.clear()

    def monitor(self, command: str) -> str:
        if command == "info kvm":
            return "kvm support: enabled"
        assert command == "info registers -a", command
        return "".join(
            f"CPU#{cpu - 1}\nCPL=0 HLT=0\nGS =0000 0 0\nIDT=     {self.symbols['idt']:016x} {self.idt_limit:08x}\n"
            f"CR0={self.cr0:08x} CR3={ROOT:016x} CR4=00000020\nEFER=0000000000000500\n"
            for cpu in self.cpus()
        )

    def insert(self, addr: VirtAddr) -> None:
        self.breakpoints.add(addr)

    def remove(self, addr: VirtAddr) -> None:
        self.breakpoints.discard(addr)

    def is_taken(self, addr: VirtAddr) -> bool:
        return addr in self.users_breakpoints

    def taken(self) -> Collection[int]:
        return self.users_breakpoints

    def watch(self, addrs: Collection[VirtAddr]) -> None:
        self.watched = frozenset(addrs)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def hardware_taken(self) -> int:
        return len(self.users_breakpoints)


class ToyWire(KvmStub):
    """What QEMU's stub is for :class:`ToyMachine` under KVM. A packet that speaks of stale registers is an error."""

    strict = True

    def __init__(self, machine: ToyMachine) -> None:
        super().__init__(machine)
        self._toy = machine
        machine.flushes_at_write = False
        self._ran_with = {cpu: machine.registers[cpu]["cr4"] for cpu in machine.cpus()}

    def run_for(self, seconds: float, *, heed: bool = True, how: bytes = RUN) -> bytes | None:
        for cpu, before in self._ran_with.items():
            self._ran_with[cpu] = self._toy.registers[cpu]["cr4"]
            if before != self._ran_with[cpu]:
                self._toy.flush_tlb()
        return super().run_for(seconds, heed=heed, how=how)

    def send(self, packet: bytes) -> bytes:
        self._toy.is_on_wire = True
        try:
            return super().send(packet)
        finally:
            self._toy.is_on_wire = False


class WiredStub(QemuStub):
    """The project's stub over that, and what an adapter does: it forgets when others have had the machine."""

    def __init__(self, machine: ToyMachine) -> None:
        super().__init__(ToyWire(machine))
        self._toy = machine
        self._seen = machine.others_runs

    def _state(self, cpu: CpuId) -> bytes:
        if self._seen != self._toy.others_runs:
            self._seen = self._toy.others_runs
            self.forget()
        return super()._state(cpu)


class ToyGuest(BareGuest):
    """The software of the machine, with an exception table and stacks that can be found."""

    def __init__(self, machine: ToyMachine) -> None:
        table = PageTable(machine, PhysAddr(ROOT), 4)
        symbols = {name: VirtAddr(addr) for name, addr in machine.symbols.items()}
        gates = idt.read_idt(table, symbols["idt"], 16 * 32 - 1)
        super().__init__(table, gates, symbols, AddressRange(VirtAddr(TEXT), VirtAddr(TEXT + 0x1000)))
        self._machine = machine
        self.owner: ModuleLoad | None = None
        """What all text belongs to."""

    def owner_of(self, addr: VirtAddr) -> ModuleLoad | None:
        return self.owner

    def fixup_of(self, addr: VirtAddr) -> VirtAddr | None:
        found = self._machine.fixups.get(addr)
        return None if found is None else VirtAddr(found)

    def stack_words_into(
        self, target: AddressRange, stack_pointers: Mapping[CpuId, int], *, on_vcpus: bool = False
    ) -> list[int] | None:
        words: list[int] = []
        for cpu, rsp in stack_pointers.items():
            live = self._machine.load(rsp, STACKS + cpu * STACK_SIZE - rsp)
            words += struct.unpack(f"<{len(live) // 8}Q", live[: len(live) // 8 * 8])
        return [word for word in words if word in target]


@dataclass
class Toy:
    """The machine with a session on it, and the vocabulary of the tests."""

    machine: ToyMachine
    guest: ToyGuest
    region: Region
    session: Session
    hits: list[Hit]
    died: type[Exception] = GuestDiedError
    left: list[Probe] = field(default_factory=list)
    """Probes of a session before, adopted."""

    def again(self) -> Toy:
        """A new session on the same machine, after this one has ended."""
        return make_toy(self.machine, wired=isinstance(self.session.machine, WiredStub))

    def addr(self, name: str, offset: int = 0) -> VirtAddr:
        return VirtAddr(self.machine.symbols[name] + offset)

    def add(self, definition: str, pre: Any = None, post: Any = None, **options: Any) -> Probe:
        """``add("f_push")``, ``add("p:name f_push+1 if di == 6")``."""
        rung = options.pop("rung", None)
        text = definition if definition.startswith("p") else f"p:{definition.replace('+', '_')} {definition}"
        return self.session.add(Probe(parse_definition(text), pre, post, strategy=rung, **options))

    def call(self, name: str, cpu: int = 1, **registers: int) -> int | None:
        """Call a function of the guest, with edi = 6 and esi = 7; returns rax, or None when it stopped for the user."""
        values = self.machine.registers[cpu]
        values |= {"rdi": 6, "rsi": 7, "rip": self.addr(name), "rsp": self.machine.stack_top(cpu) - 0x200, **registers}
        values["rsp"] -= 8
        self.machine.set_quad(values["rsp"] - STACKS + STACKS_PHYS, self.addr("done"))
        return self.resume(cpu)

    def resume(self, cpu: int = 1, most: int = 500) -> int | None:
        """Let a vCPU run until the function has returned (rax) or the user gets the prompt (None)."""
        values = self.machine.registers[cpu]
        passing = False
        for _ in range(most):
            rip = values["rip"]
            if rip == self.addr("done"):
                assert values["rsp"] == self.machine.stack_top(cpu) - 0x200, "the stack is not balanced"
                return values["rax"]
            if rip in self.machine.breakpoints and not passing:
                if self.session.on_breakpoint(CpuId(cpu)):
                    return None
                passing = values["rip"] == rip
                continue
            passing = False
            self.machine.execute(cpu)
        raise AssertionError(f"vCPU {cpu} hangs at {values['rip']:#x}")

    def run_until(self, addr: int, cpu: int = 1) -> None:
        """Execute, with nobody watching breakpoints, until RIP is *addr*."""
        for _ in range(500):
            if self.machine.registers[cpu]["rip"] == addr:
                return
            self.machine.execute(cpu)
        raise AssertionError(f"vCPU {cpu} does not come to {addr:#x}")

    def put(self, name: str, cpu: int = 1, **registers: int) -> None:
        """Put a vCPU at the start of a function, as a caller would, and do not run it."""
        values = self.machine.registers[cpu]
        values |= {"rdi": 6, "rsi": 7, "rip": self.addr(name), "rsp": self.machine.stack_top(cpu) - 0x208, **registers}
        self.machine.set_quad(values["rsp"] - STACKS + STACKS_PHYS, self.addr("done"))

    def put_at_trap(self, name: str, cpu: int = 1) -> None:
        """Put a vCPU at the #BP entry, by the int3 that begins a function."""
        self.put(name, cpu)
        self.machine.execute(cpu)
        assert self.machine.registers[cpu]["rip"] == self.addr("bp_entry")

    def count(self, name: str) -> int:
        """How often the guest itself has counted the function."""
        return self.machine.quad(DATA_PHYS + self.addr(f"count_{name}") - DATA)

    def reset_count(self, name: str) -> None:
        self.machine.set_quad(DATA_PHYS + self.addr(f"count_{name}") - DATA, 0)

    def changed_text(self) -> dict[int, int]:
        """Address -> byte, of all text that is not as it was loaded."""
        now = self.machine.ram[TEXT_PHYS : TEXT_PHYS + 0x1000]
        return {TEXT + at: now[at] for at in range(0x1000) if now[at] != self.machine.text[at]}

    def bytes_of(self, *names: str) -> list[int]:
        """The addresses of the bytes of the first instruction of each of the functions *names*."""
        starts = [self.addr(name) for name in names]
        insns = [decode(self.machine.text[start - TEXT :][:15], start) for start in starts]
        return sorted(at for insn in insns for at in range(insn.addr, insn.end))

    def header(self) -> Header | None:
        return read_header(self.machine, PhysAddr(REGION_PHYS))

    def records(self) -> list[Record]:
        """The records, from memory alone."""
        header = self.header()
        return [] if header is None else sorted(iter_records(self.machine, header), key=lambda r: r.patch.addr)

    def writes(self) -> list[str]:
        """The writes since the last call, by name: what of the region, or the guest's text or page tables.

        Counters and definitions of probes are left out: nothing depends on when they are written.
        """
        kinds = [(found.start, found.end, found.kind) for found in self.region.objects]
        names: list[str] = []
        for addr, data in self.machine.log:
            at = addr - REGION_PHYS
            if MARK_OFFSET <= at < MARK_OFFSET + MARK_SIZE:
                continue  # tests/unit/session/test_moment.py
            kind = next((kind for start, end, kind in kinds if start <= at < end), None)
            if 0 <= at < DIRECTORY_OFFSET:
                names.append("header")
            elif 0 <= at < FIRST_PAGE * 0x1000:
                names.append("directory")
            elif kind == Kind.RECORDS:
                names.append("record" if any(data) else "clear record")
            elif kind == Kind.CODE:
                names.append("slot")
            elif kind is not None:
                continue
            elif 0 <= at < REGION_SIZE:
                names.append("table")
            else:
                names.append("text" if TEXT_PHYS <= addr < TEXT_PHYS + 0x1000 else "link")
        self.machine.log.clear()
        return names

    def assert_idle(self) -> None:
        """Nothing of ours is in the guest: no int3, no record, no breakpoint, no site, no slot that is in use."""
        assert self.changed_text() == {}
        assert self.records() == []
        assert self.machine.breakpoints == set()
        assert self.session.table.all() == ()
        assert self.region.slots.used == sum(slot.size for slot in self.region.slots.quarantined)


def make_toy(
    machine: ToyMachine, rungs: tuple[Rung, ...] = (Rung.BOOSTED, Rung.SINGLE_STEP), *, wired: bool = False
) -> Toy:
    """A session on *machine*; *wired*: by packets, under KVM's rules."""
    guest = ToyGuest(machine)
    by: Machine = WiredStub(machine) if wired else machine
    region = create_mapped(machine, machine, guest, PhysAddr(REGION_PHYS), REGION_SIZE, None, WINDOW)
    _begin(region)
    session = Session(by, guest, region, machine, Policy(rungs))
    toy = Toy(machine, guest, region, session, [])
    session.listen(toy.hits.append)
    machine.log.clear()
    return toy


ToyWith = Callable[..., Toy]
"""Makes a :class:`Toy` of a machine (and rungs): also a second session on the same machine."""


def _begin(region: Region) -> None:
    """Have all that the first probe needs room in, so that what an act writes does not depend on what was before."""
    spec = parse_definition("p:first f_nop")
    region.definitions.add(spec, None, region.counters.allocate().addr, has_handler=False)
    region.definitions.remove(spec.name)
    slot = region.slots.allocate(1)
    assert slot is not None
    region.slots.discard(slot)
    region.commit()
    region.records.add(Record(CodePatch(VirtAddr(0), b"\0", b"\0"), slot, Rung.BOOSTED))
    region.records.remove(VirtAddr(0))
