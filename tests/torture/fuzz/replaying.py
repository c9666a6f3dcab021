"""A guest is recorded, and readers are asked of what was recorded, with changes in it."""

from __future__ import annotations

import copy
import random
import signal
import struct
import time
import traceback
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from gdb_kprobe.errors import ReportedError
from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.kprobes.slots import INT3
from gdb_kprobe.linux.btf import Btf
from gdb_kprobe.model import PAGE_SIZE, CpuId, PhysAddr, offset
from gdb_kprobe.region.directory import ENTRY_SIZE, Kind, RegionObject, read_directory
from gdb_kprobe.region.header import MAGIC, Header, read_header
from gdb_kprobe.region.layout import DIRECTORY_OFFSET
from gdb_kprobe.region.records import RECORD_SIZE, Record, iter_records, sealed
from gdb_kprobe.region.region import links_of
from gdb_kprobe.render.text import table
from gdb_kprobe.system.paging import Entry
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import ENTRY
from tests.support.client import StubClient
from tests.support.guests import environment, profile
from tests.torture.fuzz.mutation import mutate
from tests.torture.fuzz.readers import LARGE, READERS, Asked, Reader, damaged_types
from tests.torture.fuzz.recording import Machine, Pages, Read, Recorder, Replay, Table, TooMuchReadError, Write

MODULE = "loop"
FUNCTION = ENTRY
PROBES = (
    "p:jump " + FUNCTION,
    "p:cond vfs_read if di == 3",
    "p:open do_sys_openat2 dfd=%di:s32",
    "p:mod loop:lo_ioctl",
)
OWN_KPROBES = ("p:own vfs_write", "p:inside vfs_statx+8", "r:ret ksys_read", "p:ours do_sys_openat2")
_TRACING = "/sys/kernel/tracing"
_TOLD = 10.0
"""Seconds between two lines on how far a run is."""
_SEALED = 0.3
"""Of the changes, those after which the checksums in the region are right."""
_TYPES_CHANGED = 0.1
"""Of the questions, those for which the types are changed, and not the memory."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A guest that a session has left armed. *records* and *links* are what undoes that, by physical address."""

    pages: Pages
    registers: Mapping[CpuId, Mapping[str, int]]
    system: str
    region: PhysAddr
    header: Header
    objects: tuple[RegionObject, ...]
    records: Mapping[PhysAddr, Record]
    links: tuple[Entry, ...]
    reads: Mapping[str, tuple[Read, ...]]
    known: LinuxGuest

    def of(self, kind: Kind) -> Iterator[RegionObject]:
        """The region's objects of *kind*."""
        return (found for found in self.objects if found.kind == kind)

    def cells(self) -> Iterator[PhysAddr]:
        """Where there is room for a record."""
        for found in self.of(Kind.RECORDS):
            for at in range(found.start, found.end - RECORD_SIZE + 1, RECORD_SIZE):
                yield offset(self.region, at)


def left_armed(guest: GuestVm) -> None:
    """Have *guest* run with probes whose gdb was killed, and with a module and kprobes of its own."""
    guest.check_output(f"grep -q ^{MODULE} /proc/modules || insmod /modules/{MODULE}.ko")
    with GdbMi(environment(guest)) as gdb:
        gdb.console("set kprobe watchdog off")
        gdb.console(f"kprobe attach --dispatch guest {profile(guest)}")
        for probe in PROBES:
            gdb.console(f"kprobe add {probe}")
        gdb.cont()
        for event in OWN_KPROBES:
            guest.run(f"echo '{event}' >>{_TRACING}/kprobe_events")
        guest.check_output(f"echo 1 >{_TRACING}/events/kprobes/enable")
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    guest.check_output("true")


def record(spec: GuestSpec) -> Recording:
    """Boot a guest, and record what the readers read of it when a session was killed.

    :raises AssertionError: a reader fails, though nothing is damaged.
    """
    with GuestVm(spec) as guest:
        left_armed(guest)
        return record_guest(guest)


def record_guest(guest: GuestVm) -> Recording:
    """Record *guest*, which :func:`left_armed` has prepared; it is stopped meanwhile."""
    with RspSocket(guest.gdb_address) as channel:
        stub = StubClient(channel).stub
        registers = {cpu: stub.read_registers(cpu) for cpu in stub.cpus()}
        system = GuestMonitor(guest).monitor("info registers -a")
        recorder = Recorder(GuestRam(guest))
        region = PhysAddr(guest.reserved_base or 0)
        known = open_linux(GuestMonitor(guest), recorder)
        header = read_header(recorder, region)
        assert header is not None, "no session has left anything"
        records = tuple(iter_records(recorder, header))
        sites = {known.memory.translate(record.patch.addr): record for record in records}
        links = links_of(known.memory, header.virt, header.phys, header.size)
        pages = recorder.pages
        reads = {
            reader.name: _reads(reader, recorder, registers, system, known, region) for reader in (*READERS, *LARGE)
        }
        known.text_facts()
    # From here on there is only what was recorded.
    known.memory = Table(Replay(pages), known.memory.root, known.memory.levels)
    objects = read_directory(Replay(pages), header)
    return Recording(pages, registers, system, region, header, objects, sites, links, reads, known)


class _Following(Replay):
    """Records while it reads."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder.pages)
        self._recorder = recorder

    def _page(self, at: int) -> bytes:
        if at not in self.changed and at not in self._recorder.pages:
            self._recorder.read_physical(PhysAddr(at), 0x1000)
        return super()._page(at)


def _reads(
    reader: Reader, recorder: Recorder, registers: Mapping[CpuId, Mapping[str, int]], system: str, known: LinuxGuest,
    region: PhysAddr,
) -> tuple[Read, ...]:  # fmt: skip
    memory = _Following(recorder)
    machine = Machine(memory, registers, system)
    machine.start()
    memory.reads = []
    asked = Asked(machine, Table(memory, known.memory.root, known.memory.levels), known, region)
    for text in reader.ask(asked):
        assert is_shown(text), f"{reader.name}: {text!r}"
    found = tuple(dict.fromkeys(memory.reads))
    assert found, reader.name
    return found


class TookTooLongError(BaseException):
    """A reader has not come to an end: no part of what readers may catch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What went wrong at which mutation."""

    number: int
    reader: str
    changes: str
    wrong: str

    def __str__(self) -> str:
        return f"FAILED mutation {self.number}, {self.reader}: {self.changes}\n    {self.wrong}"


@dataclass
class _Told:
    """What was seen of one reader."""

    asked: int = 0
    answered: int = 0
    slowest: float = 0.0
    most_written: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Fuzzer:
    """Asks the readers of one recording."""

    def __init__(
        self, recording: Recording, seed: int, only: str = "", readers: Sequence[Reader] = (*READERS, *LARGE)
    ) -> None:
        """*only*: of the *readers* those whose names have it."""
        self._recording = recording
        self._seed = seed
        self._memory = Replay(recording.pages)
        self._machine = Machine(self._memory, recording.registers, recording.system)
        chosen = [reader for reader in readers if only in reader.name]
        self._small = [reader for reader in chosen if reader not in LARGE] or chosen
        self._large = [reader for reader in chosen if reader in LARGE] or chosen
        self._told = {reader.name: _Told() for reader in (*self._small, *self._large)}
        assert isinstance(recording.known.types, Btf)
        self._btf = recording.known.types
        self._words = _words_of(self._btf)
        self.findings: list[Finding] = []

    def run(self, number: int, large: float, first: int = 0) -> int:
        """Make *number* mutations, a share *large* of them in what is large; returns how many have found something."""
        started = told = time.monotonic()
        before = signal.signal(signal.SIGPROF, _too_long)
        try:
            for index in range(first, first + number):
                self._one(index, large)
                if time.monotonic() - told > _TOLD:
                    told = time.monotonic()
                    done = index - first + 1
                    print(
                        f"  {done} of {number}, {done / (told - started):.0f} a second, {len(self.findings)} failed",
                        flush=True,
                    )
        finally:
            signal.signal(signal.SIGPROF, before)
        return len(self.findings)

    @property
    def asked(self) -> int:
        """How many questions were asked."""
        return sum(told.asked for told in self._told.values())

    @property
    def errors(self) -> int:
        """How many of them were answered by an error of ours."""
        return sum(told.errors.total() for told in self._told.values())

    @property
    def kinds(self) -> int:
        """How many different ones there were, but for numbers."""
        return len({kind for told in self._told.values() for kind in told.errors})

    def summary(self) -> str:
        """What was seen, by reader."""
        rows = [
            (name, str(told.asked), str(told.answered), str(told.asked - told.answered), str(len(told.errors)),
             f"{told.slowest * 1000:.0f}", str(told.most_written))
            for name, told in self._told.items()
        ]  # fmt: skip
        return table(("reader", "asked", "answers", "errors", "kinds", "slowest ms", "most writes"), rows)

    def _one(self, index: int, large: float) -> None:
        chosen = random.Random(f"{self._seed}:{index}")
        readers = self._large if chosen.random() < large else self._small
        reader = chosen.choices(readers, [reader.weight for reader in readers])[0]
        told = self._told[reader.name]
        told.asked += 1
        recording = self._recording
        self._memory.start()
        self._machine.start()
        known = recording.known
        if reader not in LARGE and chosen.random() < _TYPES_CHANGED:
            changes, known = self._other_types(chosen)
        else:
            changes = mutate(self._memory, chosen, recording.reads[reader.name])
        if sealed := chosen.random() < _SEALED:
            self._seal()
        changes += self._other_registers(chosen)
        asked = Asked(
            self._machine, Table(self._memory, recording.known.memory.root, recording.known.memory.levels), known,
            recording.region,
        )  # fmt: skip
        started = time.process_time()
        wrong = ""
        try:
            signal.setitimer(signal.ITIMER_PROF, reader.seconds)
            try:
                for text in reader.ask(asked):
                    if not is_shown(text):
                        wrong = f"it shows {text!r}"
                told.answered += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except ReportedError as error:
            told.errors[_kind(error)] += 1
            if not is_shown(str(error)):
                wrong = f"its error shows {str(error)!r}"
        except (Exception, TookTooLongError, TooMuchReadError):
            wrong = "".join(traceback.format_exc(limit=-6))
        told.slowest = max(told.slowest, time.process_time() - started)
        told.most_written = max(told.most_written, len(self._memory.writes))
        wrong = wrong or "; ".join(self._bad_writes(reader, self._memory.writes, forged=sealed))
        if wrong:
            self.findings.append(Finding(index, reader.name, changes, wrong))
            print(self.findings[-1], flush=True)

    def _other_types(self, chosen: random.Random) -> tuple[str, LinuxGuest]:
        """The guest, with other types than it has."""
        changes = []
        for _ in range(chosen.choice((1, 1, 2))):
            at = chosen.choice(self._words)
            values = (
                0,
                1,
                4,
                7,
                8,
                0xFFFF,
                1 << 20,
                0xFFFF_FFFF,
                chosen.randrange(1 << 20),
                self._btf._words[at] ^ 1 << chosen.randrange(32),
            )
            changes.append((at, chosen.choice(values)))
        known = copy.copy(self._recording.known)
        known.types = damaged_types(self._btf, changes)
        return f"types: {changes}", known

    def _other_registers(self, chosen: random.Random) -> str:
        """Some vCPUs are where a session has them: at the #BP entry, at the gate, in a slot."""
        if chosen.randrange(4):
            return ""
        cpu = chosen.choice(self._machine.cpus())
        header, known = self._recording.header, self._recording.known
        records = list(self._recording.records.values())
        places = (header.gate, known.bp_entry, header.code.start, *(record.slot.code for record in records))
        rip = chosen.choice(places) + chosen.choice((0, 0, 0, 1))
        self._machine.write_registers(cpu, {"rip": rip})
        return f"; vCPU {cpu} at {rip:#x}"

    def _seal(self) -> None:
        """Have the checksums of header, directory and records be right, as one who forges them would."""
        memory, header = self._memory, self._recording.header
        if not any(at in memory.changed for at in range(header.phys, header.phys + header.size, PAGE_SIZE)):
            return
        size = len(header.pack()) - 4
        data = memory.read_physical(header.phys, size)
        memory.change(header.phys + size, zlib.crc32(data).to_bytes(4, "little"))
        start = offset(header.phys, DIRECTORY_OFFSET)
        for at in range(start, start + PAGE_SIZE - ENTRY_SIZE + 1, ENTRY_SIZE):
            entry = memory.read_physical(PhysAddr(at), ENTRY_SIZE)
            if any(entry):
                memory.change(at, RegionObject(*struct.unpack_from("<HHIII", entry)).pack(header))
        for at in self._recording.cells():
            record = memory.read_physical(at, RECORD_SIZE)
            memory.change(at, sealed(record, header.cookie) if any(record) else record)

    def _bad_writes(self, reader: Reader, writes: Iterable[Write], *, forged: bool) -> Iterator[str]:
        """What must not have been written."""
        for write in writes:
            if not reader.writes or not self._undoes(write, forged=forged):
                yield f"it wrote {write.new.hex(' ')} over {write.old.hex(' ')} at physical {write.phys:#x}"

    def _undoes(self, write: Write, *, forged: bool) -> bool:
        """Whether *write* is one that undoes the recorded session; what is forged may at most be written over a patch.

        That is an int3, or the jump or call of a record; the guest's own padding is of int3 as well.
        """
        recording = self._recording
        record = recording.records.get(PhysAddr(write.phys))
        if record is not None:
            return write.new == record.patch.old or (forged and write.old == record.patch.new)
        if forged and write.old == INT3 * len(write.old):
            return True
        header = recording.header
        zeros = not any(write.new)
        if write.phys == recording.region:
            return zeros and len(write.new) == len(MAGIC)
        if any(link.addr == write.phys for link in recording.links) and len(write.new) == 8:
            return zeros
        if forged and zeros and write.phys in range(recording.region, recording.region + header.size):
            return len(write.new) in (8, RECORD_SIZE)  # a forged directory has records and definitions anywhere in it
        if any(write.phys == offset(recording.region, found.start) for found in recording.of(Kind.DEFINITIONS)):
            return zeros and len(write.new) == 8
        return zeros and len(write.new) == RECORD_SIZE and write.phys in set(recording.cells())


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLongError


def is_shown(text: str) -> bool:
    text = text.replace("\n", "")  # a message has lines
    return text.isascii() and (text == "" or text.isprintable())


def _kind(error: ReportedError) -> str:
    """The error without what differs from one to the next."""
    words = [word for word in error.message.split() if not any(character.isdigit() for character in word)]
    return f"{type(error).__name__}: {' '.join(words)}"


def _words_of(btf: Btf) -> array[int]:
    """The indexes of the words of those types that were asked for."""
    found = array("I")
    for name, _ in btf._members:
        for type_id in btf._ids(name):
            start = btf._starts[type_id]
            found.extend(range(start, start + 3 + 3 * btf._vlen(type_id)))
    return found
