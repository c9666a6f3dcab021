"""The guest's ftrace: the 5-byte nops at function entries that it switches to calls, and how one is borrowed of it.

ftrace keeps a ``struct dyn_ftrace`` (a *record*) for each nop: its address ``ip``, and ``flags``, whose low bits count
the users. Whenever a tracer comes or goes it compares the bytes at ``ip`` with what they should be; at a difference it
warns and switches itself off until the next boot (``ftrace_bug``). So who patches a nop, be it by a jump or by an
int3 on its first byte, must set FTRACE_FL_DISABLED in the record before, and clear it after the nop is back. What the
kernel then does (kernel/trace/ftrace.c), by functions:

``__ftrace_hash_rec_update``
    skips a record that is DISABLED and not ENABLED: users that come are not counted in it, and those that go are not
    taken off. So the bit must neither come nor go while a tracer uses the function. A count of users that is left
    behind, or one that is missing, is a warning and the end of ftrace when the last of them goes.
``ftrace_check_record``, through which every change of text goes (``ftrace_replace_code``, also for direct calls,
function graph, livepatch, sysctl)
    answers FTRACE_UPDATE_IGNORE for such a record: its text is neither verified nor written. (Up to v6.0 for each
    DISABLED one: "ftrace: Still disable enabled records marked as disabled", in v6.1.)
``ftrace_shutdown``, when the last user has gone
    checks that no record has any flag left, DISABLED excepted.
``match_records``
    does not find it: writing a borrowed function's name to ``set_ftrace_filter`` is an invalid argument, and patterns
    pass it by.
``ftrace_location``, and with it kprobes, livepatch and BPF trampolines
    find a record whatever its flags are. So they attach to a borrowed function without an error, and are not called.
``ftrace_module_enable``, ``ftrace_release_mod``
    the kernel itself uses the bit: all records of a module have it until its text is final, those of weak functions
    that were replaced have it for good. ``ftrace_module_enable`` counts the present users when it clears the bit.
    Records of a module that goes are freed with it, whatever their flags are.

The rule that follows: a record may be borrowed when it has no flag but those of its history and its text is the nop;
and be given back when no registered user covers its function and ``ftrace_lock`` is free, for between leaving the
list of users and being taken off the counts a user is in neither.

Where a call is there already, borrowing would take the function from its tracer. A probe goes behind it, to the
instruction at ``ip`` + 5; what comes before ``ip`` (endbr64, a 4-byte nop) is not ftrace's.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from gdb_kprobe.errors import GuestStateError, NeedsTypesError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.structs import Struct, read_pointer, read_struct
from gdb_kprobe.linux.types import Types
from gdb_kprobe.model import AddressRange, VirtAddr
from gdb_kprobe.system.bounds import Steps, Visited, damaged, read_array
from gdb_kprobe.target.protocols import Memory

SITE_SIZE = 5
"""MCOUNT_INSN_SIZE: bytes of text that are ftrace's, from ``ip`` on."""

NOP = bytes.fromhex("0f1f440000")
"""What is there while nobody traces (``ftrace_nop_replace``)."""

_HISTORY = ("FTRACE_FL_TOUCHED", "FTRACE_FL_MODIFIED")
_MOST_OPS = 1 << 12
_MOST_RECORDS = 1 << 21
_MOST_ENTRIES = 1 << 20
_MOST_BITS = 20
"""Of the number of lists in a ``struct ftrace_hash``; FTRACE_HASH_MAX_BITS is 12 (kernel/trace/ftrace.c)."""
_WORD = 8
_LARGEST_RECORD = 256


@dataclass(frozen=True, slots=True)
class FtraceLayout:
    """Where the members of ``struct dyn_ftrace`` are, in bytes, and what the bits of its flags mean.

    *history* are the bits that stay when nobody uses the record any more (FTRACE_NOCLEAR_FLAGS without DISABLED). All
    of them are 0 where they are not known.
    """

    size: int
    ip: int
    flags: int
    enabled: int
    disabled: int
    history: int

    @property
    def knows_flags(self) -> bool:
        """Whether it is known what the flags mean; only then a record can be borrowed, or given back."""
        return self.disabled != 0


@dataclass(frozen=True, slots=True)
class FtraceSite:
    """One record as it was when it was read: *data* is all of it, at *record*."""

    layout: FtraceLayout
    record: VirtAddr
    data: bytes

    @property
    def ip(self) -> VirtAddr:
        """Where the nop, or the call, is."""
        return VirtAddr(self._word(self.layout.ip))

    @property
    def window(self) -> AddressRange:
        """The text that is ftrace's."""
        return AddressRange(self.ip, VirtAddr(self.ip + SITE_SIZE))

    @property
    def flags(self) -> int:
        return self._word(self.layout.flags)

    @property
    def is_enabled(self) -> bool:
        """Whether the text holds a call, or is about to."""
        return bool(self.flags & self.layout.enabled)

    @property
    def is_disabled(self) -> bool:
        """Whether ftrace leaves it alone: borrowed by us, or one that the kernel does not use."""
        return bool(self.flags & self.layout.disabled)

    @property
    def borrowed(self) -> bytes:
        """What to write over *data* to borrow it; written back, *data* gives it back.

        The whole record, because its address is the proof that a record is still there: that of a module which was
        unloaded meanwhile is other memory.
        """
        return self._with_flags(self.flags | self.layout.disabled)

    @property
    def returned(self) -> bytes:
        """What to write over *data* to give it back."""
        return self._with_flags(self.flags & ~self.layout.disabled)

    def _with_flags(self, flags: int) -> bytes:
        at = self.layout.flags
        return self.data[:at] + flags.to_bytes(_WORD, "little") + self.data[at + _WORD :]

    def why_not_return(self, ip: int, text: bytes) -> str | None:
        """Return why this is not the borrowed record of *ip*, where *text* is now, as it was left; or None."""
        if text != NOP:
            return f"its nop is not there, but {text.hex(' ')}"
        if self.ip != ip:
            return "its record is gone"
        if not self.is_disabled or self.flags & ~(self.layout.history | self.layout.disabled):
            return f"its record is not as it was left: its flags are {self.flags:#x}"
        return None

    def why_not_borrow(self, text: bytes) -> str | None:
        """Return why it cannot be borrowed now, or None. *text* is what is at :attr:`ip`, :data:`SITE_SIZE` bytes."""
        if not self.layout.knows_flags:
            return f"whether the guest's ftrace uses it is not known: {NeedsTypesError('its record').message}"
        if self.is_disabled:
            return "the guest's ftrace has this function disabled itself"
        if self.is_enabled:
            return "a tracer of the guest's is called from it"
        if self.flags & ~self.layout.history:
            return "a tracer of the guest's is about to be called from it, or has just left"
        if text != NOP:
            return f"it is no 5-byte nop now, but {text.hex(' ')}"
        return None

    def _word(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + _WORD], "little")


class FtraceRecords:
    """All records at one moment, the core kernel's and its modules'; read them anew when modules have come or gone."""

    def __init__(self, layout: FtraceLayout | None, pages: list[tuple[VirtAddr, bytes]]) -> None:
        """Index *pages*, each the address of its first record and all of its records. No *layout*: no pages."""
        self._layout = layout
        self._data = b"".join(data for _, data in pages)
        self._records: array[int] = array("Q")
        ips: array[int] = array("Q")
        if layout is not None:
            for start, data in pages:
                self._records.extend(range(start, start + len(data), layout.size))
            ips = array("Q", self._data)[layout.ip // _WORD :: layout.size // _WORD]
        # Sorted within the pages of the kernel, and of each module, but these come in the order of loading.
        self._order = sorted(range(len(ips)), key=ips.__getitem__)
        self._ips = array("Q", [ips[index] for index in self._order])

    def __len__(self) -> int:
        return len(self._ips)

    def __iter__(self) -> Iterator[FtraceSite]:
        """Yield them as the kernel lists them in ``available_filter_functions``."""
        return (self._site(index) for index in range(len(self)))

    def find(self, addr: int) -> FtraceSite | None:
        """Return the record of the nop that begins at *addr*."""
        at = bisect_left(self._ips, addr)
        return self._site(self._order[at]) if at < len(self._ips) and self._ips[at] == addr else None

    def sites_in(self, window: AddressRange) -> list[FtraceSite]:
        """Return the records whose text shares a byte with *window*, the lowest first."""
        first = bisect_left(self._ips, window.start - SITE_SIZE + 1)
        return [self._site(self._order[at]) for at in range(first, bisect_left(self._ips, window.end))]

    def _site(self, index: int) -> FtraceSite:
        assert self._layout is not None
        start = index * self._layout.size
        return FtraceSite(self._layout, VirtAddr(self._records[index]), self._data[start : start + self._layout.size])


@dataclass(frozen=True, slots=True)
class _Tracer:
    """What one ``struct ftrace_ops`` covers: *only* these functions (None: all) and none of *never*, by ``ip``."""

    only: frozenset[int] | None
    never: frozenset[int]

    def covers(self, ip: int) -> bool:
        return ip not in self.never and (self.only is None or ip in self.only)


@dataclass(frozen=True, slots=True)
class FtraceTracers:
    """The guest's registered tracers at one moment; *changing*: the guest is registering one, or taking one away."""

    tracers: tuple[_Tracer, ...]
    changing: bool

    def why_not_return(self, ip: int) -> str | None:
        """Return why the record of *ip* cannot be given back now (it stays borrowed, which harms nothing), or None."""
        if self.changing:
            return "the guest is switching its tracers in this moment"
        if any(tracer.covers(ip) for tracer in self.tracers):
            return "a tracer of the guest's covers this function, and was not counted when it came"
        return None


def read_ftrace_records(memory: Memory, kallsyms: Kallsyms, types: Types) -> FtraceRecords:
    """Read all records. A kernel without CONFIG_DYNAMIC_FTRACE has none.

    :raises GuestStateError: the kernel has them, but they cannot be found.
    :raises UnmappedError: the list of pages leads to unmapped memory.
    """
    if kallsyms.find("ftrace_pages_start") is None or not types.has_member("dyn_ftrace", "flags"):
        return FtraceRecords(None, [])
    layout = _layout(types)
    pages: list[tuple[VirtAddr, bytes]] = []
    at = read_pointer(memory, kallsyms.address("ftrace_pages_start"))
    visited, records = Visited("the list ftrace_pages_start"), Steps("the list ftrace_pages_start", _MOST_RECORDS)
    while at:
        visited.visit(at)
        page = read_struct(memory, types, "ftrace_page", at)
        start, count = page.pointer("records"), page.uint("index")
        records.take(count)
        pages.append((start, read_array(memory, f"the ftrace page at {at:#x}", start, count, layout.size)))
        at = page.pointer("next")
    return FtraceRecords(layout, pages)


def _layout(types: Types) -> FtraceLayout:
    ip, flags = types.offset_of("dyn_ftrace", "ip"), types.offset_of("dyn_ftrace", "flags")
    size = types.size_of("dyn_ftrace")
    if any(at % _WORD for at in (size, ip, flags)) or not max(ip, flags) + _WORD <= size <= _LARGEST_RECORD:
        raise damaged(f"struct dyn_ftrace has {size} bytes, with its address at {ip} and its flags at {flags}")
    try:
        types.enumerator("FTRACE_FL_ENABLED")
    except NeedsTypesError:
        return FtraceLayout(size, ip, flags, 0, 0, 0)
    enabled, disabled = (types.enumerator(f"FTRACE_FL_{name}") for name in ("ENABLED", "DISABLED"))
    if enabled is None or disabled is None:
        raise GuestStateError("the flags of struct dyn_ftrace are not as known here", "probe behind the function entry")
    # Kernels before v6.4 ("ftrace: Show a list of all functions that have ever been enabled") have no TOUCHED, those
    # before v6.6 ("ftrace: Add MODIFIED flag to show if IPMODIFY or direct was attached") have no MODIFIED.
    history = sum(types.enumerator(name) or 0 for name in _HISTORY)
    return FtraceLayout(size, ip, flags, enabled, disabled, history)


def read_ftrace_tracers(memory: Memory, kallsyms: Kallsyms, types: Types) -> FtraceTracers:
    """Read who is registered with ftrace. A filter that waits for a module to be loaded counts as no filter.

    :raises GuestStateError: the list cannot be found, or has no end.
    :raises UnmappedError: it leads to unmapped memory.
    """
    lock = read_struct(memory, types, "mutex", kallsyms.address("ftrace_lock"))
    # CONFIG_PREEMPT_RT makes a mutex of an rt_mutex (include/linux/mutex_types.h). Either owner is 0 as long as nobody
    # holds or waits; the low bits say more of the one there is or, in an rt_mutex, of one that is about to be.
    changing = bool(lock.uint("owner" if lock.has("owner") else "rtmutex.owner"))
    tracers: list[_Tracer] = []
    for ops in for_each_ops(memory, kallsyms, types):
        hashes = read_struct(memory, types, "ftrace_ops_hash", ops.pointer("func_hash"))
        only, never = (read_hash(memory, types, hashes.pointer(f"{name}_hash")) for name in ("filter", "notrace"))
        tracers.append(_Tracer(only or None, never))
    return FtraceTracers(tuple(tracers), changing)


def has_ops(memory: Memory, kallsyms: Kallsyms) -> bool:
    """Say whether anybody is registered with ftrace; nobody is in a kernel without it."""
    head, end = kallsyms.find("ftrace_ops_list"), kallsyms.find("ftrace_list_end")
    return head is not None and read_pointer(memory, head) not in (0, end)


def for_each_ops(memory: Memory, kallsyms: Kallsyms, types: Types) -> Iterator[Struct]:
    """Yield each ``struct ftrace_ops`` that is registered.

    :raises GuestStateError: the list cannot be found, or has no end.
    :raises UnmappedError: it leads to unmapped memory.
    """
    end = kallsyms.address("ftrace_list_end")
    at = read_pointer(memory, kallsyms.address("ftrace_ops_list"))
    visited = Visited("the list ftrace_ops_list", Steps("the list ftrace_ops_list", _MOST_OPS))
    while at not in (0, end):
        visited.visit(at)
        ops = read_struct(memory, types, "ftrace_ops", at)
        yield ops
        at = ops.pointer("next")


def read_hash(memory: Memory, types: Types, addr: VirtAddr) -> frozenset[int]:
    """Return the addresses in the ``struct ftrace_hash`` at *addr*; none for a null pointer."""
    if not addr:
        return frozenset()
    table = read_struct(memory, types, "ftrace_hash", addr)
    if not table.uint("count"):
        return frozenset()
    bits = table.uint("size_bits")
    if bits > _MOST_BITS:
        raise damaged(f"the hash of ftrace's at {addr:#x} has {bits} bits")
    heads = array("Q", memory.read(table.pointer("buckets"), _WORD << bits))
    steps = Steps(f"the hash of ftrace's at {addr:#x}", _MOST_ENTRIES)
    return frozenset(entry.uint("ip") for head in heads for entry in _chain(memory, types, head, steps))


def _chain(memory: Memory, types: Types, node: int, steps: Steps) -> Iterator[Struct]:
    link = types.offset_of("ftrace_func_entry", "hlist")
    visited = Visited("a list in a hash of ftrace's", steps)
    while node:
        visited.visit(node)
        entry = read_struct(memory, types, "ftrace_func_entry", VirtAddr(node - link))
        yield entry
        node = entry.uint("hlist.next")
