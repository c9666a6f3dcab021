"""Which kernel text may be touched: live text, and in it what the kernel's own kprobes would refuse.

The rules are those of ``check_kprobe_address_safe`` (kernel/kprobes.c) and of ``alternatives_text_reserved``, read from
the guest's own tables.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.modules import Module, ModuleState
from gdb_kprobe.linux.structs import for_each_struct
from gdb_kprobe.linux.text_tables import TextTables, read_text_tables
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, Reason, Refusal, VirtAddr
from gdb_kprobe.system.bounds import guest_range
from gdb_kprobe.target.protocols import Memory

_SECTIONS = (
    ("__entry_text_start", "__entry_text_end", Reason.ENTRY_TEXT, ".entry.text"),
    ("__noinstr_text_start", "__noinstr_text_end", Reason.NOINSTR, ".noinstr.text"),
    ("__cpuidle_text_start", "__cpuidle_text_end", Reason.NOINSTR, ".cpuidle.text"),
    ("__kprobes_text_start", "__kprobes_text_end", Reason.KPROBES_TEXT, ".kprobes.text"),
    # The trampolines are single jumps that static_call_update() rewrites; they are in no table of sites.
    ("__static_call_text_start", "__static_call_text_end", Reason.STATIC_CALL_TRAMPOLINE, "a static call's trampoline"),
)
_INIT_SECTION = ("__init_begin", "__init_end")
_BP_PATH = ("asm_exc_int3", "exc_int3")
_TEMPLATES = (
    # Between these labels of arch/x86/kernel/ftrace_64.S create_trampoline() copies, and compares what it copies.
    "ftrace_caller",
    "ftrace_caller_op_ptr",
    "ftrace_call",
    "ftrace_graph_call",
    "ftrace_caller_end",
    "ftrace_epilogue",
    "ftrace_stub",
    "ftrace_stub_graph",
    "ftrace_regs_caller",
    "ftrace_regs_caller_op_ptr",
    "ftrace_regs_call",
    "ftrace_regs_caller_jmp",
    "ftrace_regs_caller_end",
    "ftrace_stub_direct_tramp",
    # machine_kexec() copies from the first to the last of these, arch/x86/kernel/relocate_kernel_64.S.
    "relocate_kernel",
    "relocate_range",
    "identity_mapped",
    "virtual_mapped",
    "swap_pages",
)
_PADDING_PREFIXES = ("__pfx_", "__cfi_")

_HINT = "choose another instruction or function"
_CALL_SIZE = 5
_UD2_SIZE = 2
_LOCK_SIZE = 1
_JUMP_LABEL_SIZE = 5
_SHORT_JUMP_LABEL_SIZE = 2
_SHORT_JUMP_LABELS = (b"\xeb", b"\x66")  # jmp rel8, and the first byte of the 2-byte nop 66 90


def is_padding(name: str) -> bool:
    """Whether *name* is no function, but what lies in front of one (objtool's ``__pfx_``, kCFI's ``__cfi_``)."""
    return name.startswith(_PADDING_PREFIXES)


@dataclass(frozen=True, slots=True)
class ForbiddenRange:
    """Text that is refused as a whole, why, and what it is."""

    range: AddressRange
    reason: Reason
    what: str


class ForbiddenRanges:
    """Many ranges, which may overlap, and the question whether one of them is at an address."""

    def __init__(self, entries: Iterable[ForbiddenRange]) -> None:
        # Of entries that begin together, the one given first, with the more telling reason, stays first.
        self.entries = tuple(sorted(entries, key=lambda entry: entry.range.start))
        self._starts = [entry.range.start for entry in self.entries]
        # How far up the entries to the left of each reach: where a search to the left may end.
        self._reach = list(accumulate((entry.range.end for entry in self.entries), max))

    def find(self, window: AddressRange) -> ForbiddenRange | None:
        """Return the lowest entry that shares a byte with *window*."""
        return next(iter(self.overlapping(window)), None)

    def overlapping(self, window: AddressRange) -> list[ForbiddenRange]:
        """Return all entries that share a byte with *window*, the lowest first."""
        found = []
        at = bisect_left(self._starts, window.end) - 1
        while at >= 0 and self._reach[at] > window.start:
            if self.entries[at].range.overlaps(window):
                found.append(self.entries[at])
            at -= 1
        return found[::-1]


@dataclass(frozen=True, slots=True)
class GuestSite:
    """*size* bytes at *addr* that the guest itself changes, or looks for: a jump label, say.

    *what* ends with a place for the address.
    """

    addr: int
    size: int
    reason: Reason
    what: str


@dataclass(frozen=True, slots=True)
class SymbolRule:
    """Why all of a symbol is refused, and what it is."""

    reason: Reason
    what: str


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the guest says of its text at one moment; read it anew after the guest has run.

    *text* is live text: the core kernel's and that of each live module. *forbidden* is what must not be touched;
    *bp_path* is the part of it that an int3 itself runs through.
    """

    memory: Memory
    kallsyms: Kallsyms
    text: tuple[AddressRange, ...]
    init: tuple[AddressRange, ...]
    forbidden: ForbiddenRanges
    tables: TextTables
    bp_path: tuple[AddressRange, ...] = ()
    fixups: array[int] = field(init=False, repr=False, compare=False)
    """Where the kernel goes on after faults, sorted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fixups", array("Q", sorted(set(self.tables.ex_fixups))))

    def is_live_text(self, addr: int) -> bool:
        """Say whether *addr* is in the core kernel's text or in that of a live module (init text is neither)."""
        return any(addr in window for window in self.text) and not any(addr in window for window in self.init)

    def fixup_of(self, addr: int) -> VirtAddr | None:
        """Return where the kernel goes on after a fault of the instruction at *addr*; None where that is an oops."""
        at = bisect_left(self.tables.ex_table, addr)
        found = at < len(self.tables.ex_table) and self.tables.ex_table[at] == addr
        return VirtAddr(self.tables.ex_fixups[at]) if found else None

    def in_extable(self, addr: int) -> bool:
        """Say whether the instruction at *addr* is one whose fault the kernel fixes up."""
        return self.fixup_of(addr) is not None

    def reason_at(self, addr: VirtAddr, length: int) -> Refusal | None:
        """Return why the *length* bytes of the instruction at *addr* must not be touched, or None.

        An exception-table instruction is no refusal here: it must only not be run elsewhere (:meth:`in_extable`).
        """
        window = AddressRange(addr, VirtAddr(addr + length))
        return self._not_live(window) or self._forbidden(window) or self._patched(window)

    def _not_live(self, window: AddressRange) -> Refusal | None:
        if any(window.overlaps(init) for init in self.init):
            return Refusal(
                Reason.INIT_TEXT,
                window.start,
                f"{self._name(window.start)} is init text, which the guest frees and uses for something else",
                "kallsyms lists init functions for ever; choose a function that stays",
            )
        if not self.is_live_text(window.start):
            return Refusal(
                Reason.NOT_TEXT,
                window.start,
                f"{window.start:#x} is neither in the core kernel's text nor in that of a live module",
                "is it data, or of a module that is gone?",
            )
        return None

    def _forbidden(self, window: AddressRange) -> Refusal | None:
        if any(window.overlaps(path) for path in self.bp_path):
            return self._refuse(Reason.BP_PATH, window.start, "an int3 there would trap for ever")
        entry = self.forbidden.find(window)
        if entry is not None:
            return self._refuse(entry.reason, window.start, entry.what)
        found = self.kallsyms.symbol_at(window.start)
        rule = None if found is None else self.rule_for_symbol(found[0].name)
        return None if rule is None else self._refuse(rule.reason, window.start, rule.what)

    def rule_for_symbol(self, name: str) -> SymbolRule | None:
        """Return why nothing of the symbol *name* may be touched, as far as its name says it; None otherwise."""
        if is_padding(name):
            return SymbolRule(Reason.PADDING, "padding in front of a function")
        if name in _TEMPLATES:
            return SymbolRule(Reason.TEMPLATE, "it runs where a copy of it lies, which a probe would break")
        # A part that the compiler split off (foo.cold, foo.isra.0) is refused like its function.
        stem = name.partition(".")[0]
        if stem != name:
            for symbol in self.kallsyms.lookup(stem):
                entry = self.forbidden.find(AddressRange(symbol.addr, VirtAddr(symbol.addr + 1)))
                if entry is not None:
                    return SymbolRule(entry.reason, f"{stem} is in {entry.what}")
        return None

    def _patched(self, window: AddressRange) -> Refusal | None:
        site = next(self.sites_in(window), None)
        return None if site is None else self._refuse(site.reason, window.start, f"{site.what} {site.addr:#x}")

    def sites_in(self, window: AddressRange) -> Iterator[GuestSite]:
        """Yield the places that share a byte with *window* and that the guest patches, or knows by address."""
        tables = self.tables
        for addr in _around(tables.jump_labels, window, _JUMP_LABEL_SIZE):
            size = self._jump_label_size(addr)
            if addr + size > window.start:
                yield GuestSite(addr, size, Reason.JUMP_LABEL, "the guest switches the jump label at")
        for sites, size, reason, what in (
            (tables.static_calls, _CALL_SIZE, Reason.STATIC_CALL, "the guest redirects the call at"),
            (tables.bugs, _UD2_SIZE, Reason.BUG_TABLE, "the kernel recognizes its ud2 at"),
            (tables.locks, _LOCK_SIZE, Reason.ALTERNATIVE, "the guest patches the lock prefix at"),
        ):
            for addr in _around(sites, window, size):
                yield GuestSite(addr, size, reason, what)

    def _jump_label_size(self, site: int) -> int:
        # Kernel commit ab3257042c26 "jump_label, x86: Allow short NOPs" (in v5.14): the size is in the text only.
        first = self.memory.read(VirtAddr(site), 1)
        return _SHORT_JUMP_LABEL_SIZE if first in _SHORT_JUMP_LABELS else _JUMP_LABEL_SIZE

    def _refuse(self, reason: Reason, addr: VirtAddr, what: str) -> Refusal:
        return Refusal(reason, addr, f"{self._name(addr)}: {what}", _HINT)

    def _name(self, addr: VirtAddr) -> str:
        found = self.kallsyms.symbol_at(addr)
        return f"{found[0]}+{found[1]:#x}" if found else f"{addr:#x}"


def read_text_facts(memory: Memory, kallsyms: Kallsyms, types: Types, modules: tuple[Module, ...]) -> TextFacts:
    """Read everything that decides what text may be touched. *kallsyms* has the symbols of *modules*.

    :raises GuestStateError: the kernel's structures are not as known here.
    """
    core = guest_range("the kernel's text, by its symbols,", kallsyms.address("_stext"), kallsyms.address("_etext"))
    init = kallsyms.section(*_INIT_SECTION)
    return TextFacts(
        memory=memory,
        kallsyms=kallsyms,
        text=(core, *(module.text for module in modules if module.state is ModuleState.LIVE)),
        init=(
            *((init,) if init else ()),
            *(module.init_text for module in modules if module.init_text is not None),
        ),
        forbidden=ForbiddenRanges(_read_forbidden(memory, kallsyms, types, modules)),
        tables=read_text_tables(memory, kallsyms, types, modules),
        bp_path=tuple(
            AddressRange(symbol.addr, kallsyms.end(symbol)) for name in _BP_PATH for symbol in kallsyms.lookup(name)
        ),
    )


def _read_forbidden(
    memory: Memory, kallsyms: Kallsyms, types: Types, modules: Iterable[Module]
) -> Iterator[ForbiddenRange]:
    for start, end, reason, what in _SECTIONS:
        section = kallsyms.section(start, end)
        if section is not None and section.size:
            yield ForbiddenRange(section, reason, what)
    for module in modules:
        for name, reason in (("noinstr_text", Reason.NOINSTR), ("kprobes_text", Reason.KPROBES_TEXT)):
            if module.raw.has(f"{name}_size") and module.raw.uint(f"{name}_size"):
                first = module.raw.pointer(f"{name}_start")
                what = f"{name} of module {module.name}"
                last = first + module.raw.uint(f"{name}_size")
                yield ForbiddenRange(guest_range(what, first, last), reason, what)
    # NOKPROBE_SYMBOL() leaves a table in init memory only, from which the kernel makes this list at boot. Without
    # CONFIG_KPROBES there is neither: the macro is empty then.
    head = kallsyms.find("kprobe_blacklist")
    if head is None or not types.has_member("kprobe_blacklist_entry", "start_addr"):
        return
    for entry in for_each_struct(memory, types, "kprobe_blacklist_entry", "list", head):
        what = f"the entry of the guest's kprobe blacklist at {entry.addr:#x}"
        blacklisted = guest_range(what, entry.pointer("start_addr"), entry.pointer("end_addr"))
        yield ForbiddenRange(blacklisted, Reason.BLACKLISTED, "the guest's kprobe blacklist")


def _around(sites: array[int], window: AddressRange, size: int) -> Iterator[int]:
    """Yield the sites of *size* bytes that share a byte with *window*."""
    first = bisect_right(sites, window.start - size)
    yield from sites[first : bisect_left(sites, window.end)]
