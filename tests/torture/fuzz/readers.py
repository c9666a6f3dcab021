"""The readers of a guest's memory, each as a question that is asked of the recorded one; what it shows is returned."""

from __future__ import annotations

import contextlib
import copy
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.linux import MODULES, LinuxGuest, open_linux
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.bp_path import find_bp_path
from gdb_kprobe.linux.btf import Btf, read_btf
from gdb_kprobe.linux.e820 import read_e820
from gdb_kprobe.linux.ftrace import read_ftrace_records, read_ftrace_tracers
from gdb_kprobe.linux.guest_kprobes import read_guest_kprobes
from gdb_kprobe.linux.image import find_build_id, find_image, read_string
from gdb_kprobe.linux.kallsyms_table import read_core_symbols
from gdb_kprobe.linux.modules import read_module_symbols, read_modules
from gdb_kprobe.linux.page_allocator import find_page_allocator, may_call_here
from gdb_kprobe.linux.proven_types import prove_types
from gdb_kprobe.linux.redirects import read_redirects
from gdb_kprobe.linux.stack_areas import scan_all_stacks
from gdb_kprobe.linux.state import read_state
from gdb_kprobe.linux.tasks import cpu_stacks, current_tasks, read_tasks
from gdb_kprobe.linux.text import read_text_facts
from gdb_kprobe.linux.untyped_kprobes import read_untyped_kprobes
from gdb_kprobe.model import AddressRange, CpuId, PhysAddr, VirtAddr, offset
from gdb_kprobe.region.definitions import read_definitions
from gdb_kprobe.region.header import read_header
from gdb_kprobe.region.records import read_records
from gdb_kprobe.region.region import links_of, why_not_mapped
from gdb_kprobe.session.recovery.orphans import find_leftover
from gdb_kprobe.session.recovery.restore import restore
from gdb_kprobe.session.sites.saved_jumps import plan_of
from gdb_kprobe.system import idt
from gdb_kprobe.system.mapping import find_hole
from gdb_kprobe.system.paging import kernel_root, loaded_table
from tests.torture.fuzz.recording import Machine, Table


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reader is given: the recorded *machine*, and what an undamaged guest was found to be."""

    machine: Machine
    table: Table
    known: LinuxGuest
    region: PhysAddr

    def guest(self) -> LinuxGuest:
        """The guest as *known*, of which all that may change is read again."""
        guest = copy.copy(self.known)
        guest.memory = self.table
        guest.refresh()
        guest.admit_module(VirtAddr(0))
        return guest

    @property
    def pointers(self) -> dict[CpuId, int]:
        return {cpu: self.machine.read_register(cpu, "rsp") for cpu in self.machine.cpus()}


Question = Callable[[Asked], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Reader:
    """*weight*: how often it is asked, beside the others. *seconds* of a processor it may take. *writes*: it may."""

    name: str
    ask: Question
    weight: int
    seconds: float = 2.0
    writes: bool = False


def _leftover(asked: Asked) -> Iterator[str]:
    found = find_leftover(asked.machine)
    if found is not None:
        yield str(found.sites)
        yield from found.restore(asked.machine)


def _let_go(asked: Asked) -> Iterator[str]:
    found = find_leftover(asked.machine)
    if found is not None:
        yield from found.let_go(asked.machine)


def _region(asked: Asked) -> Iterator[str]:
    header = read_header(asked.machine, asked.region)
    if header is None or header.damage:
        yield "" if header is None else header.damage
        return
    why_not_mapped(asked.table, header)
    links_of(asked.table, header.virt, header.phys, header.size)
    records, wrong = read_records(asked.machine, header)
    yield from wrong
    for record in records:
        plan_of(asked.table, record)
    for definition in read_definitions(asked.machine, header):
        yield definition.text
        try:
            yield str(parse_definition(definition.text))
        except KprobeError as error:
            yield str(error)


def _restore(asked: Asked) -> Iterator[str]:
    yield from restore(asked.machine, asked.machine, asked.guest(), asked.region).messages


def _modules(asked: Asked) -> Iterator[str]:
    types = asked.known.types
    for module in read_modules(asked.table, types, asked.known.kallsyms.address("modules")):
        yield module.name
        table = read_module_symbols(asked.table, module)
        yield from table.names
        yield table.types


def _symbols_of_modules(asked: Asked) -> Iterator[str]:
    guest = asked.guest()
    for module in guest.modules:
        yield str(guest.place_of(module.base))
    yield from guest.match("ext4")


def _tasks(asked: Asked) -> Iterator[str]:
    known = asked.known
    for task in read_tasks(asked.table, known.kallsyms, known.types):
        yield str(task)
    for stack in cpu_stacks(asked.table, known.kallsyms, known.types):
        yield stack.owner
    current_tasks(asked.table, known.kallsyms, known.types)


def _stacks(asked: Asked) -> Iterator[str]:
    asked.guest().stack_words_into(MODULES, asked.pointers)
    yield ""


def _ftrace_records(asked: Asked) -> Iterator[str]:
    known = asked.known
    records = read_ftrace_records(asked.table, known.kallsyms, known.types)
    text = known.kallsyms.address("_stext")
    for site in records.sites_in(AddressRange(text, VirtAddr(text + 0x10000))):
        yield str(site.why_not_borrow(b""))


def _tracers(asked: Asked) -> Iterator[str]:
    known = asked.known
    yield str(read_ftrace_tracers(asked.table, known.kallsyms, known.types).why_not_return(0))


def _redirects(asked: Asked) -> Iterator[str]:
    known = asked.known
    for redirect in read_redirects(asked.table, known.kallsyms, known.types).values():
        yield redirect.by


def _kprobes(asked: Asked) -> Iterator[str]:
    known = asked.known
    kprobes = read_guest_kprobes(asked.table, known.kallsyms, known.types)
    for kprobe in kprobes:
        yield str(kprobe.range)
    list(kprobes.within(known.image.text[0]))
    kprobes.check_all()


def _facts(asked: Asked) -> Iterator[str]:
    known = asked.known
    facts = read_text_facts(asked.table, known.kallsyms, known.types, known.modules)
    start = facts.text[0].start
    for at in range(start, start + 0x400, 16):
        yield str(facts.reason_at(VirtAddr(at), 5))


FUNCTIONS: Final = ("vfs_read", "do_sys_openat2", "vfs_write", "vfs_statx", "lo_ioctl")


def _functions(asked: Asked) -> Iterator[str]:
    """What a probe asks of its function."""
    guest = asked.guest()
    for name in FUNCTIONS:
        try:
            place = guest.resolve(Location(name))
            text = FunctionText(guest, TextMap(), place)
            for index in range(len(text.up_to(offset(place.start, 0x60)))):
                yield str(text.refusal(index))
            yield str(guest.ftrace_use(AddressRange(place.start, offset(place.start, 16))))
            yield str(guest.clones_of(place))
        except KprobeError as error:
            yield str(error)


def _references(asked: Asked) -> Iterator[str]:
    """What goes into the bytes of a jump."""
    guest = asked.guest()
    references = guest.references(TextMap())
    for name in FUNCTIONS:
        place = guest.resolve(Location(name))
        yield str(references.is_target(place.start + 1, place.start + 9))
        yield str(references.is_taken(place.start + 1, place.start + 9))
        yield str(references.is_unresolved(AddressRange(place.start, place.end)))


def _paging(asked: Asked) -> Iterator[str]:
    cpu = idt.read_registers(asked.machine)[0]
    loaded = loaded_table(asked.machine, cpu.cr3, cpu.cr4)
    handler = idt.find_breakpoint_handler(loaded, cpu)
    table = kernel_root(asked.machine, cpu.cr3, cpu.cr4, handler)
    gates = idt.read_idt(table, cpu.idt_base, cpu.idt_limit)
    yield str(find_image(table, gates.breakpoint_handler()).slide)
    yield str(find_hole(table, MODULES, 16 << 20))
    yield from (str(run.range) for run in table.mappings(MODULES))


def _small(asked: Asked) -> Iterator[str]:
    known = asked.known
    yield read_string(asked.table, known.kallsyms.address("linux_banner"))
    yield read_state(asked.table, known.kallsyms, known.types).system_state
    table = read_e820(asked.table, known.kallsyms)
    yield table.describe(PhysAddr(0x1000_0000), 16 << 20)
    table.is_reserved(PhysAddr(0x1000_0000), 16 << 20)
    notes = known.kallsyms.section("__start_notes", "__stop_notes")
    yield find_build_id(asked.table, notes) if notes else ""
    with contextlib.suppress(KprobeError):  # the hook is there
        yield str(find_bp_path(asked.table, known.kallsyms, known.bp_entry).call)
    allocator = find_page_allocator(asked.table, known.kallsyms, known.banner, asked.table.levels)
    yield hex(allocator.address(PhysAddr(0)))
    for cpu in asked.machine.cpus():
        may_call_here(asked.table, known.kallsyms, known.types, asked.machine.read_registers(cpu))


def _untyped(asked: Asked) -> Iterator[str]:
    known = asked.known
    types = prove_types(asked.table, known.kallsyms)
    with contextlib.suppress(KprobeError):
        read_text_facts(asked.table, known.kallsyms, types, ())
    for kprobe in read_untyped_kprobes(asked.table, known.kallsyms, lambda addr: False):
        yield str(kprobe.range)
    ram = read_e820(asked.table, known.kallsyms)
    scan_all_stacks(asked.table, known.kallsyms, ram, MODULES, asked.pointers.values())


def _kallsyms(asked: Asked) -> Iterator[str]:
    table = read_core_symbols(asked.table, asked.known.image)
    yield from table.names
    yield table.types


def _btf(asked: Asked) -> Iterator[str]:
    btf = read_btf(asked.table, asked.known.kallsyms)
    if btf is not None:
        yield from _questions(btf)


QUESTIONS: Final = ("task_struct.comm", "module.name", "module.mem", "mutex.owner", "kprobe.ainsn.insn",
                    "optimized_kprobe.optinsn.size", "ftrace_ops.func_hash", "signal_struct.thread_head",
                    "cpuinfo_x86.x86_capability", "smp_alt_module.locks")  # fmt: skip


def _questions(btf: Btf) -> Iterator[str]:
    for question in QUESTIONS:
        name, _, path = question.partition(".")
        with contextlib.suppress(KprobeError):
            btf.has_member(name, path)
            yield str(btf.size_of(name))
    with contextlib.suppress(KprobeError):
        yield from btf.enum("system_states")
    with contextlib.suppress(KprobeError):
        yield str(btf.enumerator("FTRACE_FL_ENABLED"))
    with contextlib.suppress(KprobeError):
        yield str(btf.functions({"vfs_read"}))


def _open(asked: Asked) -> Iterator[str]:
    guest = open_linux(asked.machine, asked.machine)
    yield guest.description
    guest.prepare()


READERS: Final = (
    Reader("what a session has left", _leftover, 30, writes=True),
    Reader("what a session has left, let go", _let_go, 10, writes=True),
    Reader("the region", _region, 40),
    Reader("the restoring of a guest", _restore, 20, writes=True),
    Reader("modules", _modules, 10),
    Reader("symbols of modules", _symbols_of_modules, 5),
    Reader("tasks", _tasks, 20),
    Reader("stacks", _stacks, 5, 5.0),
    Reader("ftrace's records", _ftrace_records, 2),
    Reader("ftrace's tracers", _tracers, 30),
    Reader("redirects", _redirects, 20),
    Reader("kprobes of the guest's own", _kprobes, 30),
    Reader("text tables", _facts, 1),
    Reader("functions", _functions, 2, 5.0),
    Reader("page tables and IDT", _paging, 2, 10.0),
    Reader("small things", _small, 20),
)
"""What takes milliseconds."""

LARGE: Final = (
    Reader("the symbol table", _kallsyms, 2, 20.0),
    Reader("types", _btf, 2, 10.0),
    Reader("all without types", _untyped, 1, 20.0),
    Reader("the whole guest", _open, 1, 30.0),
    Reader("references", _references, 1, 30.0),
)
"""What takes tenths of a second and more."""


def damaged_types(btf: Btf, changes: Iterable[tuple[int, int]]) -> Btf:
    """*btf* with other words at the indexes of *changes*, in time: to index it anew takes a tenth of a second."""
    other = copy.copy(btf)
    words = array("I", btf._words)
    for index, value in changes:
        words[index % len(words)] = value
    other._words = words
    other._members = {}
    return other
