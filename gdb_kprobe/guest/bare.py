"""A guest without Linux: page tables, an IDT, and a file of symbols are all that is asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.guest import Place, runs_from
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.linux.ftrace import FtraceSite, FtraceTracers
from gdb_kprobe.linux.guest_kprobes import GuestKprobes
from gdb_kprobe.linux.redirects import Redirect
from gdb_kprobe.model import AddressRange, CpuId, ModuleLoad, Reason, Refusal, Symbol, VirtAddr, offset
from gdb_kprobe.system import idt
from gdb_kprobe.system.paging import PageTable, loaded_table
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory


class WithoutKernel:
    """What a program without a kernel around it has none of: function tracing, kprobes, known stacks, modules.

    :class:`~gdb_kprobe.guest.guest.GuestFtrace`, ``GuestKprobing``, ``GuestStacks`` and ``GuestModules``.
    """

    def ftrace_sites(self, text: AddressRange) -> tuple[FtraceSite, ...]:
        return ()

    def ftrace_use(self, text: AddressRange) -> None:
        return None

    def ftrace_tracers(self) -> FtraceTracers:
        return FtraceTracers((), changing=False)

    def redirects(self) -> Mapping[VirtAddr, Redirect]:
        return {}

    def own_kprobes(self) -> GuestKprobes:
        return GuestKprobes()

    def stack_words_into(
        self, target: AddressRange, stack_pointers: Mapping[CpuId, int], *, on_vcpus: bool = False
    ) -> list[int] | None:
        return None

    def owner_of(self, addr: VirtAddr) -> ModuleLoad | None:
        return None

    @property
    def takes_modules(self) -> bool:
        return False

    def loaded_modules(self) -> Mapping[str, ModuleLoad]:
        return {}

    def admit_module(self, module: VirtAddr) -> None:
        pass


class BareGuest(WithoutKernel):
    """A :class:`~gdb_kprobe.guest.guest.Guest` of which nobody promises anything.

    *text* is the range that may be probed; its end ends the last function.
    """

    def __init__(self, memory: PageTable, gates: idt.Idt, symbols: Mapping[str, VirtAddr], text: AddressRange) -> None:
        self.memory = memory
        self.bp_entry = gates.breakpoint_handler()
        self._bp_text = memory.walk(self.bp_entry)
        self.gates = gates.handlers()
        self._symbols = dict(symbols)
        self._text = text
        inside = sorted((addr, name) for name, addr in symbols.items() if addr in text)
        self._addrs = [addr for addr, _ in inside]
        self._names = [name for _, name in inside]

    @property
    def description(self) -> str:
        return f"bare metal, {len(self._symbols)} symbols"

    @property
    def text_base(self) -> VirtAddr:
        return self._text.start

    @property
    def build_id(self) -> bytes:
        return bytes(20)

    def resolve(self, location: Location) -> Place:
        if location.address is not None:
            return self.place_of(location.address)
        base = self._symbols.get(location.symbol)
        if base is None:
            names = ", ".join(self._names[:20])
            refusal = Refusal(
                Reason.NO_SYMBOL, VirtAddr(0), f"{location.symbol} is not in the symbol file", f"it has {names}"
            )
            raise RefusedError(f"cannot probe {location}", refusal)
        place = self.place_of(base)
        addr = offset(base, location.offset)
        if not base <= addr < place.end:
            size = place.end - base
            refusal = Refusal(
                Reason.OFFSET_OUTSIDE_SYMBOL,
                addr,
                f"{location.symbol} is at most {size} bytes long",
                f"offsets 0 to {size - 1:#x} are inside",
            )
            raise RefusedError(f"cannot probe {location}", refusal)
        return Place(addr, base, place.end, place.symbol)

    def place_of(self, addr: VirtAddr) -> Place:
        index = bisect_right(self._addrs, addr) - 1
        if index < 0 or addr not in self._text:
            return Place(addr, addr, addr, None)
        start = self._addrs[index]
        above = next((other for other in self._addrs[index + 1 :] if other > start), self._text.end)
        return Place(addr, start, above, Symbol(self._names[index], start, "t"))

    def refusal_at(self, place: Place, length: int) -> Refusal | None:
        if place.addr not in self._text:
            return Refusal(Reason.NOT_TEXT, place.addr, f"{place.addr:#x} is outside of {self._text}")
        if self.place_of(self.bp_entry).start <= place.addr < self.place_of(self.bp_entry).end:
            return Refusal(Reason.BP_PATH, place.addr, "an int3 there would trap for ever")
        return None

    @property
    def boost_rules(self) -> Rules:
        """Nobody's kernel: the newest one's."""
        return Rules.LINUX_6_12

    @property
    def has_lahf(self) -> bool:
        """Nobody says so."""
        return False

    def piece_at(self, addr: VirtAddr, code: bytes) -> Piece:
        return Piece(addr, code)

    def references(self, text: TextMap) -> References | None:
        return None

    def fixup_of(self, addr: VirtAddr) -> VirtAddr | None:
        return None

    def match(self, prefix: str) -> Iterable[str]:
        return sorted(name for name in self._names if name.startswith(prefix))

    def clones_of(self, place: Place) -> tuple[str, ...]:
        return ()

    def functions(self, pattern: str) -> Iterable[Place]:
        named = zip(self._addrs, self._names, strict=True)
        found = {addr: self.place_of(addr) for addr, name in named if fnmatchcase(name, pattern)}
        return tuple(found.values())

    def init_functions(self, pattern: str) -> tuple[Place, ...]:
        return ()

    def is_same_boot(self, monitor: Monitor) -> bool:
        return runs_from(monitor, self.memory.memory, self.bp_entry, self._bp_text)

    def refresh(self) -> None:
        self.memory.invalidate()


def open_bare(
    monitor: Monitor, memory: PhysicalMemory, symbols: Mapping[str, VirtAddr], text: AddressRange | None
) -> BareGuest:
    """Look at the software that the stopped machine runs.

    :raises GuestStateError: it is not in 64-bit mode, or has no #BP handler.
    """
    cpus = idt.read_registers(monitor)
    cpu = next((cpu for cpu in cpus if cpu.is_long_mode), cpus[0])
    table = loaded_table(memory, cpu.cr3, cpu.cr4)
    idt.find_breakpoint_handler(table, cpu)
    gates = idt.read_idt(table, cpu.idt_base, cpu.idt_limit)
    if text is None:
        addrs = sorted(symbols.values())
        text = AddressRange(addrs[0], offset(addrs[-1], 0x1000)) if addrs else AddressRange(VirtAddr(0), VirtAddr(0))
    return BareGuest(table, gates, symbols, text)
