"""What a session needs to know of the software in the guest, whichever it is.

Two implementations: :mod:`gdb_kprobe.guest.linux` and :mod:`gdb_kprobe.guest.bare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gdb_kprobe.errors import GuestStateError, UnmappedError
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.linux.ftrace import FtraceSite, FtraceTracers
from gdb_kprobe.linux.guest_kprobes import GuestKprobes
from gdb_kprobe.linux.redirects import Redirect
from gdb_kprobe.model import AddressRange, CpuId, ModuleLoad, PhysAddr, Refusal, Symbol, VirtAddr, offset
from gdb_kprobe.system.idt import Gate, find_breakpoint_handler, read_registers
from gdb_kprobe.system.paging import PageTable, Translation, loaded_table
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory


@dataclass(frozen=True, slots=True)
class Place:
    """An address with the function it lies in: *start* is where decoding begins, *end* where the function ends.

    *behind*: a probe at *addr* goes so many bytes behind it (:mod:`gdb_kprobe.session.sites.entries`).
    """

    addr: VirtAddr
    start: VirtAddr
    end: VirtAddr
    symbol: Symbol | None
    behind: int = 0

    @property
    def at(self) -> VirtAddr:
        """Where a probe goes: the instruction that is patched."""
        return offset(self.addr, self.behind)

    @property
    def offset(self) -> int:
        return self.addr - self.start

    @property
    def in_full(self) -> str:
        """``vfs_read+0x0 at +0x5``: with what is patched, where that is somewhere else."""
        return f"{self} at +{self.offset + self.behind:#x}" if self.behind else str(self)

    def __str__(self) -> str:
        if self.symbol is None:
            return f"{self.addr:#x}"
        return f"{self.symbol.name}+{self.offset:#x}" + (f" [{self.symbol.module}]" if self.symbol.module else "")


class GuestIdentity(Protocol):
    """Which software runs in the guest, and whether it still does."""

    @property
    def description(self) -> str:
        """One line: kind and version."""

    @property
    def text_base(self) -> VirtAddr:
        """Start of the kernel image; with KASLR another one at each boot."""

    @property
    def build_id(self) -> bytes:
        """20 bytes that tell this kernel from another."""

    def is_same_boot(self, monitor: Monitor) -> bool:
        """Whether the machine still runs the boot that this was made from. Asks the vCPUs, trusts nothing known."""


class GuestTraps(Protocol):
    """Where its exceptions lead."""

    @property
    def bp_entry(self) -> VirtAddr:
        """First instruction of the #BP handler: IDT[3]."""

    @property
    def gates(self) -> Mapping[VirtAddr, Gate]:
        """Exception and interrupt entries by address."""


class GuestSymbols(Protocol):
    """Its functions by name and by address."""

    def resolve(self, location: Location) -> Place:
        """Return the place that the user named.

        :raises RefusedError: there is no such symbol, there are several, or the offset is outside of it.
        """

    def place_of(self, addr: VirtAddr) -> Place:
        """Return the function around *addr*; without one, the place is just the address."""

    def match(self, prefix: str) -> Iterable[str]:
        """Functions that begin with *prefix*, as a definition names them, for completion; nothing is read for it."""

    def clones_of(self, place: Place) -> tuple[str, ...]:
        """The names of the other functions that the compiler has made of the same source as the one at *place*."""

    def functions(self, pattern: str) -> Iterable[Place]:
        """The functions of live text whose names match the shell pattern ``[MODULE:]GLOB``, each address once."""

    def init_functions(self, pattern: str) -> Iterable[Place]:
        """The same of init text, which symbols tell of for ever, and which is freed."""


class GuestText(Protocol):
    """What it says of its text: what must not be touched, and what goes where."""

    @property
    def memory(self) -> PageTable:
        """The kernel's address space."""

    def place_of(self, addr: VirtAddr) -> Place:
        """Return the function around *addr*; without one, the place is just the address."""

    def refusal_at(self, place: Place, length: int) -> Refusal | None:
        """Why the guest's own rules forbid to touch *length* bytes there, or ``None``."""

    @property
    def boost_rules(self) -> Rules:
        """The rules by which the guest's own kernel boosts its kprobes."""

    @property
    def has_lahf(self) -> bool:
        """Whether all vCPUs have ``lahf`` and ``sahf`` in 64-bit mode."""

    def piece_at(self, addr: VirtAddr, code: bytes) -> Piece:
        """What the guest says of *code*, its text at *addr*, which is of one symbol."""

    def references(self, text: TextMap) -> References | None:
        """What goes where in all live text, of which *text* knows what is ours; ``None`` when that is not known.

        The first question takes some tenths of a second.
        """

    def fixup_of(self, addr: VirtAddr) -> VirtAddr | None:
        """Where the guest's exception table leads after a fault of the instruction at *addr*; ``None`` if nowhere."""


class GuestFtrace(Protocol):
    """Its own function tracing; of a guest without one there are no records, and nothing is traced."""

    def ftrace_sites(self, text: AddressRange) -> Sequence[FtraceSite]:
        """The records of the guest's ftrace that share a byte with *text*, as they are now."""

    def ftrace_use(self, text: AddressRange) -> tuple[VirtAddr, str] | None:
        """Which nop in *text* the guest's ftrace uses so that it cannot be patched now, and why; ``None``: none."""

    def ftrace_tracers(self) -> FtraceTracers:
        """Who traces in the guest now."""

    def redirects(self) -> Mapping[VirtAddr, Redirect]:
        """The functions whose calls go elsewhere now, by the address of the nop at their entry."""


class GuestKprobing(Protocol):
    """Its own kprobes."""

    def own_kprobes(self) -> GuestKprobes:
        """The guest's own kprobes as they are now; those that can be read (:attr:`GuestKprobes.unread`)."""


class GuestStacks(Protocol):
    """Its kernel stacks."""

    def stack_words_into(
        self, target: AddressRange, stack_pointers: Mapping[CpuId, int], *, on_vcpus: bool = False
    ) -> list[int] | None:
        """All words on any kernel stack that point into *target*; ``None`` when stacks cannot be found.

        :param on_vcpus: only on those of the tasks that are on a vCPU now; more, where these cannot be told.
        """


class GuestModules(Protocol):
    """Its modules; a guest without any has nothing that comes or goes."""

    def owner_of(self, addr: VirtAddr) -> ModuleLoad | None:
        """Which load of which module the text at *addr* belongs to; ``None`` for what never goes."""

    @property
    def takes_modules(self) -> bool:
        """Whether there can be modules; without, a probe in one waits in vain."""

    def loaded_modules(self) -> Mapping[str, ModuleLoad]:
        """The modules whose text may be probed, by name, each with this load of it.

        Not those that go, nor those that come, but for :meth:`admit_module`.
        """

    def admit_module(self, module: VirtAddr) -> None:
        """The ``struct module`` at *module* is about to be initialized: its text may be probed from now on."""


class Guest(
    GuestIdentity,
    GuestTraps,
    GuestSymbols,
    GuestText,
    GuestFtrace,
    GuestKprobing,
    GuestStacks,
    GuestModules,
    Protocol,
):
    """The software in the guest. Everything is read from guest memory; nothing here writes."""

    def refresh(self) -> None:
        """Forget what may change while the guest runs (page tables, modules)."""


def runs_from(monitor: Monitor, memory: PhysicalMemory, bp_entry: VirtAddr, text: Translation | None) -> bool:
    """Whether the first vCPU that is in 64-bit mode has *bp_entry* as its #BP handler, and there the same *text*.

    By its own CR3 and IDT. Without KASLR the next boot, and a kernel that the guest itself has booted (kexec), have it
    at the same address; but where a kernel lies elsewhere, the old one's page tables may still be in memory.
    """
    cpu = next((cpu for cpu in read_registers(monitor) if cpu.is_long_mode), None)
    if cpu is None:
        return False
    try:
        table = loaded_table(memory, cpu.cr3, cpu.cr4)
        return find_breakpoint_handler(table, cpu) == bp_entry and _phys(table.walk(bp_entry)) == _phys(text)
    except (UnmappedError, GuestStateError):
        return False


def _phys(found: Translation | None) -> PhysAddr | None:
    return None if found is None else found.phys
