"""A Linux kernel, found and understood from guest memory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gdb_kprobe.errors import GuestStateError, NeedsTypesError
from gdb_kprobe.guest.guest import Place, runs_from
from gdb_kprobe.guest.resolve import function_at, resolve
from gdb_kprobe.guest.symbol_text import Snapshot, piece_at, take_snapshot
from gdb_kprobe.kprobes.kernel_rules import Rules, rules_of
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.linux.btf import Btf, read_btf
from gdb_kprobe.linux.e820 import E820Table, read_e820
from gdb_kprobe.linux.ftrace import (
    SITE_SIZE,
    FtraceRecords,
    FtraceSite,
    FtraceTracers,
    read_ftrace_records,
    read_ftrace_tracers,
)
from gdb_kprobe.linux.guest_kprobes import GuestKprobes, read_guest_kprobes
from gdb_kprobe.linux.image import KernelImage, find_build_id, find_image, read_string
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.kallsyms_table import read_core_symbols
from gdb_kprobe.linux.modules import Module, ModuleState, load_of, module_at, read_module_symbols, read_modules
from gdb_kprobe.linux.proven_types import prove_types
from gdb_kprobe.linux.redirects import Redirect, read_redirects
from gdb_kprobe.linux.stack_areas import scan_all_stacks, unlisted_stacks
from gdb_kprobe.linux.state import GuestState, read_state
from gdb_kprobe.linux.tasks import (
    Stack,
    StackKind,
    Task,
    cpu_stacks,
    current_tasks,
    live_stacks,
    read_tasks,
    scan_stacks,
    task_on_stack,
    task_stacks,
)
from gdb_kprobe.linux.text import TextFacts, is_padding, read_text_facts
from gdb_kprobe.linux.types import Types
from gdb_kprobe.linux.untyped_kprobes import read_untyped_kprobes
from gdb_kprobe.linux.vmlinux import build_id_of, types_of
from gdb_kprobe.model import AddressRange, CpuId, ModuleLoad, Reason, Refusal, VirtAddr, offset
from gdb_kprobe.system import idt
from gdb_kprobe.system.paging import PageTable, kernel_root, loaded_table
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory

if TYPE_CHECKING:
    from gdb_kprobe.linux.reference_search import Run

MODULES = AddressRange(VirtAddr(0xFFFF_FFFF_C000_0000), VirtAddr(0xFFFF_FFFF_FF00_0000))
"""MODULES_VADDR to MODULES_END, arch/x86/include/asm/pgtable_64_types.h."""

BUILD_ID_SIZE = 20
_KERNEL_HALF = 1 << 63
_FEATURE_CX16 = 4 * 32 + 13
_FEATURE_LAHF_LM = 6 * 32
"""X86_FEATURE_CX16 and X86_FEATURE_LAHF_LM, arch/x86/include/asm/cpufeatures.h."""


class LinuxGuest:
    """A :class:`~gdb_kprobe.guest.guest.Guest` that runs Linux."""

    def __init__(
        self, memory: PageTable, gates: idt.Idt, image: KernelImage, kallsyms: Kallsyms, vmlinux: Path | None = None
    ) -> None:
        self.memory = memory
        self.image = image
        self.bp_entry = gates.breakpoint_handler()
        self._bp_text = memory.walk(self.bp_entry)
        self.gates = gates.handlers()
        self._core = self.kallsyms = kallsyms
        own = read_btf(memory, kallsyms)
        self._vmlinux = None if own is not None else vmlinux
        """What has the types that the kernel itself has not."""
        self.types: Types = own or self._types_of(vmlinux)
        self.region: AddressRange | None = None
        """Where a session has put its own code, which is no text of the guest's."""
        self._modules: tuple[Module, ...] = ()
        self._read_modules()

    # -- identity -----------------------------------------------------------------------------------------------

    @property
    def text_base(self) -> VirtAddr:
        return self.image.base

    @cached_property
    def banner(self) -> str:
        """``Linux version 6.1.0-...``, as in /proc/version."""
        return read_string(self.memory, self.kallsyms.address("linux_banner")).strip()

    @property
    def release(self) -> str:
        """``6.1.0-43-cloud-amd64``, as ``uname -r`` says."""
        words = self.banner.split()
        return words[2] if len(words) > 2 else "?"

    @property
    def description(self) -> str:
        return f"Linux {self.release}, KASLR slide {self.image.slide:#x}"

    @cached_property
    def build_id(self) -> bytes:
        notes = self.kallsyms.section("__start_notes", "__stop_notes")
        text = find_build_id(self.memory, notes) if notes else ""
        return bytes.fromhex(text)[:BUILD_ID_SIZE].ljust(BUILD_ID_SIZE, b"\0")

    @property
    def modules(self) -> tuple[Module, ...]:
        return self._modules

    def state(self) -> GuestState:
        """Booting, running, panicked: as it is now."""
        return read_state(self.memory, self.kallsyms, self.types)

    def e820(self) -> E820Table:
        """The guest's own map of its physical memory."""
        return read_e820(self.memory, self.kallsyms)

    # -- places -------------------------------------------------------------------------------------------------

    def resolve(self, location: Location) -> Place:
        return resolve(self.kallsyms, location, has_modules=self._has_modules, has_types=self.has_types)

    def place_of(self, addr: VirtAddr) -> Place:
        return function_at(self.kallsyms, addr)

    def refusal_at(self, place: Place, length: int) -> Refusal | None:
        return self._facts.reason_at(place.addr, length) or self._ftrace_refusal(place, length)

    def _ftrace_refusal(self, place: Place, length: int) -> Refusal | None:
        found = self.ftrace_use(AddressRange(place.addr, offset(place.addr, length)))
        if found is None:
            return None
        ip, why = found
        behind = self.place_of(offset(ip, SITE_SIZE))
        return Refusal(Reason.FTRACE_BUSY, place.addr, f"{place}: {why}", f"probe {behind}, behind it")

    @property
    def boost_rules(self) -> Rules:
        return rules_of(self.release)

    @cached_property
    def has_lahf(self) -> bool:
        try:
            return self._has_feature(_FEATURE_LAHF_LM)
        except NeedsTypesError:
            return False

    @property
    def has_cmpxchg16b(self) -> bool:
        """Whether all vCPUs have it, as far as is known."""
        try:
            return self._has_feature(_FEATURE_CX16)
        except NeedsTypesError:
            return True

    def _has_feature(self, number: int) -> bool:
        """Linux keeps the features that all its CPUs have in ``boot_cpu_data``.

        :raises NeedsTypesError: where in there is not known.
        """
        at = self.kallsyms.address("boot_cpu_data") + self.types.offset_of("cpuinfo_x86", "x86_capability")
        word, bit = divmod(number, 32)
        return bool(int.from_bytes(self.memory.read(VirtAddr(at + 4 * word), 4), "little") >> bit & 1)

    def piece_at(self, addr: VirtAddr, code: bytes) -> Piece:
        return piece_at(self._facts, self._all_kprobes(), addr, code)

    def references(self, text: TextMap) -> References:
        from gdb_kprobe.guest.references import core_runs, runs, search_references

        if self._references is None:
            core, *modules = self._facts.text
            if self._core_runs is None:
                self._core_runs = core_runs(self._snapshot((core,), text))
            self._references = search_references(
                self._facts, [*self._core_runs, *runs(self._snapshot(tuple(modules), text))], self._opaque_text()
            )
        return self._references

    def _opaque_text(self) -> Iterator[tuple[VirtAddr, bytes]]:
        """Text that may refer to other, and cannot be decoded: of modules whose symbols are not known.

        So is that of a function with a kprobe of the guest's in it that has replaced what is not known.
        """
        if self.has_types:
            return
        ranges = [AddressRange(place.start, place.end) for place in map(self.place_of, self._opaque_kprobes())]
        if self._has_modules:
            found = (run.range for run in self.memory.mappings(MODULES) if run.executable)
            ranges += [run for run in found if self.region is None or not run.overlaps(self.region)]
        for run in ranges:
            yield run.start, self.memory.read(run.start, run.size)

    def _opaque_kprobes(self) -> Iterator[VirtAddr]:
        return (kprobe.addr for kprobe in self._all_kprobes() if kprobe.opaque)

    def snapshot(self, text: TextMap) -> Snapshot:
        """All live text as it is now; *text* knows what of it is ours."""
        return self._snapshot(self._facts.text, text)

    def _snapshot(self, windows: tuple[AddressRange, ...], text: TextMap) -> Snapshot:
        return take_snapshot(self.memory, replace(self._facts, text=windows), self._all_kprobes(), text)

    def ftrace_sites(self, text: AddressRange) -> list[FtraceSite]:
        if self._ftrace_read is None:
            self._ftrace_read = read_ftrace_records(self.memory, self.kallsyms, self.types)
        found = self._ftrace_read.sites_in(text)
        return [replace(site, data=self.memory.read(site.record, len(site.data))) for site in found]

    def ftrace_use(self, text: AddressRange) -> tuple[VirtAddr, str] | None:
        for site in self.ftrace_sites(text):
            why = None if site.is_disabled else site.why_not_borrow(self.memory.read(site.ip, SITE_SIZE))
            if why is not None:
                return site.ip, why
        return None

    def ftrace_tracers(self) -> FtraceTracers:
        return read_ftrace_tracers(self.memory, self.kallsyms, self.types)

    def redirects(self) -> Mapping[VirtAddr, Redirect]:
        if self._redirects_read is None:
            try:
                self._redirects_read = read_redirects(self.memory, self.kallsyms, self.types)
            except NeedsTypesError:
                self._redirects_read = {}  # said at the attach
        return self._redirects_read

    def own_kprobes(self) -> GuestKprobes:
        if self._kprobes_read is None:
            if self.has_types:
                self._kprobes_read = read_guest_kprobes(self.memory, self.kallsyms, self.types)
            else:
                self._kprobes_read = read_untyped_kprobes(self.memory, self.kallsyms, self._is_ftrace_nop)
        return self._kprobes_read

    def _all_kprobes(self) -> GuestKprobes:
        """:raises GuestStateError: not all of them can be read."""
        kprobes = self.own_kprobes()
        kprobes.check_all()
        return kprobes

    def _is_ftrace_nop(self, addr: VirtAddr) -> bool:
        return any(site.ip == addr for site in self.ftrace_sites(AddressRange(addr, offset(addr, 1))))

    def fixup_of(self, addr: VirtAddr) -> VirtAddr | None:
        return self._facts.fixup_of(addr)

    def match(self, prefix: str) -> Iterable[str]:
        return self.kallsyms.complete_text(prefix)

    def clones_of(self, place: Place) -> tuple[str, ...]:
        """The other functions that the compiler has made of the source of the one at *place*: ``elf_map.isra.0``.

        A call of the function in the source may be a call of any of them.
        """
        symbol = place.symbol
        if symbol is None or place.offset:
            return ()
        base = symbol.name.partition(".")[0]
        return tuple(
            other.name
            for name in dict.fromkeys((base, *self.kallsyms.complete(f"{base}.")))
            for other in self.kallsyms.lookup(name)
            if other.is_text and other.addr != symbol.addr and other.module == symbol.module and not _is_part(name)
        )

    def functions(self, pattern: str) -> Iterator[Place]:
        return self._functions(pattern, self._facts.is_live_text)

    def init_functions(self, pattern: str) -> Iterator[Place]:
        return self._functions(pattern, lambda addr: any(addr in init for init in self._facts.init))

    def _functions(self, pattern: str, is_wanted: Callable[[VirtAddr], bool]) -> Iterator[Place]:
        module, colon, glob = pattern.rpartition(":")
        seen: set[VirtAddr] = set()
        for symbol in self.kallsyms.match(glob):
            if symbol.addr in seen or not symbol.is_text or (colon and symbol.module != module):
                continue
            if _is_part(symbol.name) or is_padding(symbol.name):
                continue
            if is_wanted(symbol.addr):
                seen.add(symbol.addr)
                yield Place(symbol.addr, symbol.addr, self.kallsyms.end(symbol), symbol)

    def text_ranges(self) -> Iterable[AddressRange]:
        """Live text: the core kernel's and each live module's."""
        return self._facts.text

    def text_facts(self) -> TextFacts:
        """All that the guest says of its text."""
        return self._facts

    def prepare(self) -> None:
        """Read now what :meth:`refusal_at` and :meth:`resolve` need, so that the first probe does not wait for it."""
        self.place_of(self._facts.text[0].start)

    # -- what changes while the guest runs ----------------------------------------------------------------------

    def stack_words_into(
        self, target: AddressRange, stack_pointers: Mapping[CpuId, int], *, on_vcpus: bool = False
    ) -> list[int] | None:
        if not self.has_types:
            return scan_all_stacks(self.memory, self.kallsyms, self.e820(), target, stack_pointers.values())
        tasks = read_tasks(self.memory, self.kallsyms, self.types)
        running = frozenset(current_tasks(self.memory, self.kallsyms, self.types).values())
        pointers = tuple(stack_pointers.values())
        elsewhere = [rsp for rsp in pointers if rsp >= _KERNEL_HALF and task_on_stack(tasks, rsp) is None]
        # In a switch of tasks a CPU is on the stack of the next one, which is not the current one yet.
        running |= {task.addr for task in tasks if any(rsp in task.stack for rsp in pointers)}
        stacks = list(task_stacks([task for task in tasks if not on_vcpus or task.addr in running], running))
        of_cpus = cpu_stacks(self.memory, self.kallsyms, self.types)
        if elsewhere:
            stacks += live_stacks(of_cpus, elsewhere)
        stacks += self._unlisted(tasks, of_cpus, pointers)
        words = []
        for stack in stacks:
            # What lies below a vCPU's stack pointer is dead; of exception stacks there are several in a range.
            nested = stack.kind is StackKind.EXCEPTION
            floor = 0 if nested else max((rsp for rsp in pointers if rsp in stack.range), default=0)
            words += [word.value for word in scan_stacks(self.memory, (stack,), target) if word.addr >= floor]
        return words

    def _unlisted(self, tasks: Sequence[Task], of_cpus: Sequence[Stack], pointers: Sequence[int]) -> Iterator[Stack]:
        """The stacks of tasks that are on no list any more, and may be on a vCPU, or preempted."""
        known = [stack.range for stack in of_cpus] + [task.stack for task in tasks]
        size = self.types.size_of("irq_stack")  # THREAD_SIZE: see read_tasks
        for area in unlisted_stacks(self.memory, self.kallsyms, self.e820(), size, known, pointers):
            yield Stack("a task that is on no list", area)

    def owner_of(self, addr: VirtAddr) -> ModuleLoad | None:
        module = module_at(self._modules, addr)
        return None if module is None else load_of(module)

    @property
    def takes_modules(self) -> bool:
        return self.has_types and self._has_modules

    @property
    def _has_modules(self) -> bool:
        return self._core.find("modules") is not None  # CONFIG_MODULES

    def loaded_modules(self) -> Mapping[str, ModuleLoad]:
        return {module.name: load_of(module) for module in self._ready() if module.state is ModuleState.LIVE}

    def admit_module(self, module: VirtAddr) -> None:
        self._admitted = next((load_of(found) for found in self._modules if found.raw.addr == module), None)
        self._forget_text()

    def is_same_boot(self, monitor: Monitor) -> bool:
        return runs_from(monitor, self.memory.memory, self.bp_entry, self._bp_text)

    def refresh(self) -> None:
        self.memory.invalidate()
        self._kprobes_read = None
        self._redirects_read = None
        self._read_modules()

    # -- private ------------------------------------------------------------------------------------------------

    def _types_of(self, vmlinux: Path | None) -> Types:
        """The types of a kernel that has none in its memory; without *vmlinux* those that can be proven.

        :raises GuestStateError: *vmlinux* is another kernel's.
        :raises KprobeError: it has no types either.
        """
        if vmlinux is None:
            return prove_types(self.memory, self.kallsyms)
        found = build_id_of(vmlinux)[:BUILD_ID_SIZE].ljust(BUILD_ID_SIZE, b"\0")
        if found != self.build_id:
            raise GuestStateError(
                f"{vmlinux} is not the guest's kernel: its build id is {found.hex()}, the guest's"
                f" {self.build_id.hex()}",
                f"the guest runs {self.description}, and has no type information of its own",
            )
        return Btf(types_of(vmlinux))

    @property
    def unknown(self) -> tuple[str, ...]:
        """What the kernel has, or may have, of which nothing is known without its types; for messages."""
        if self.has_types:
            return ()
        found = []
        if self._has_modules:
            found.append("what is in modules cannot be probed")
        if self.kallsyms.find("ftrace_ops_list") is not None:
            found += ["live patches of a function are not seen", "an entry's nop cannot be borrowed"]
        if self.kallsyms.find("kprobe_table") is not None:
            found.append("functions in which the guest has a kprobe of its own are refused")
        return tuple(found)

    @property
    def has_types(self) -> bool:
        """Whether all types of the kernel are known, and not only what can be proven without."""
        return isinstance(self.types, Btf)

    @property
    def types_from(self) -> str:
        """Where all types of the kernel are known from, for messages; empty if they are not known."""
        if not self.has_types:
            return ""
        return "the kernel's own (BTF)" if self._vmlinux is None else f"those of {self._vmlinux}"

    @property
    def _facts(self) -> TextFacts:
        if self._facts_read is None:
            self._facts_read = read_text_facts(self.memory, self.kallsyms, self.types, self._ready())
        return self._facts_read

    def _read_modules(self) -> None:
        modules: tuple[Module, ...] = ()
        if not self.has_types:
            # A reference may come from a module, of which nothing but its text can be read.
            self._references = None
        elif self.takes_modules:
            modules = read_modules(self.memory, self.types, self._core.address("modules"))
        if modules == self._modules and self._facts_read is not None:
            return
        self._modules = modules
        self.kallsyms = self._core.with_modules(read_module_symbols(self.memory, module) for module in modules)
        self._forget_text()

    def _ready(self) -> tuple[Module, ...]:
        """The modules; the one that was admitted counts as live, for it is only its init that has not run yet.

        One that is formed, but not about to be initialized, is not ready: its ftrace records are not in use
        (``ftrace_module_enable``), and would be asked for later, with a jump of ours there.
        """
        return tuple(
            replace(module, state=ModuleState.LIVE)
            if module.state is ModuleState.COMING and load_of(module) == self._admitted
            else module
            for module in self._modules
        )

    def _forget_text(self) -> None:
        self._facts_read = None
        self._references = None
        self._ftrace_read = None

    _admitted: ModuleLoad | None = None
    _facts_read: TextFacts | None = None
    _references: References | None = None
    _core_runs: list[Run] | None = None
    """The core kernel's text, which stays: what is known of it is, too."""
    _ftrace_read: FtraceRecords | None = None
    _kprobes_read: GuestKprobes | None = None
    _redirects_read: Mapping[VirtAddr, Redirect] | None = None


def _is_part(name: str) -> bool:
    """Whether it is no function, but what the compiler has moved out of one: ``elf_map.cold``, ``f.part.0.cold``."""
    return name.endswith(".cold") or ".cold." in name


def open_linux(monitor: Monitor, memory: PhysicalMemory, vmlinux: Path | None = None) -> LinuxGuest:
    """Find the kernel that the stopped machine runs; *vmlinux* has its types, should it have none itself.

    Without them it is understood as far as goes without (:attr:`LinuxGuest.has_types`).

    :raises GuestStateError: there is none, it is not up yet, or it has panicked: which, and what to do.
    """
    cpus = idt.read_registers(monitor)
    cpu = next((cpu for cpu in cpus if cpu.is_long_mode), cpus[0])
    loaded = loaded_table(memory, cpu.cr3, cpu.cr4)
    handler = idt.find_breakpoint_handler(loaded, cpu)
    table = kernel_root(memory, cpu.cr3, cpu.cr4, handler)
    image = find_image(table, handler)
    kallsyms = Kallsyms(read_core_symbols(table, image))
    expected = kallsyms.find("asm_exc_int3")
    if expected is not None and expected != handler:
        found = kallsyms.symbol_at(handler)
        raise GuestStateError(
            f"the guest's IDT is not final: #BP leads to {found[0] if found else hex(handler)}, not to asm_exc_int3",
            "the kernel is booting; use 'kprobe attach --wait'",
        )
    # The reference page table of the kernel half, whichever task runs on the vCPU now.
    kernel_table = PageTable(memory, table.translate(kallsyms.address("init_top_pgt")), table.levels)
    gates = idt.read_idt(table, cpu.idt_base, cpu.idt_limit)
    guest = LinuxGuest(kernel_table, gates, image, kallsyms, vmlinux)
    guest.state().check_running()
    return guest
