"""Every instruction of a live kernel, classified: the counts against the guest's own tables and against iced.

What is counted here is taken from /proc/kallsyms, /proc/iomem, debugfs and the RAM's file: nothing of the plugin's.

A part of the core text; by the command of the shell all of it. GDB_KPROBE_FULL=1 in the environment: all of it in each
test, of both kernels, with and without mitigations.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import iced_x86
import pytest

from gdb_kprobe.errors import RefusedError
from gdb_kprobe.guest.function_text import FunctionText
from gdb_kprobe.guest.linux import MODULES, LinuxGuest, open_linux
from gdb_kprobe.guest.references import runs, search_references
from gdb_kprobe.guest.survey import survey
from gdb_kprobe.guest.symbol_text import Snapshot, read_references
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.kprobes.slots import SlotAllocator
from gdb_kprobe.kprobes.survey import BY_PLACE, Survey
from gdb_kprobe.model import AddressRange, Boost, Reason, Rung, VirtAddr
from gdb_kprobe.session.sites.planner import Planner
from gdb_kprobe.testing.oracle import GuestMonitor, GuestRam
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.build.kernel import find_kernel

pytestmark = pytest.mark.live

OFF = ("mitigations=off",)
GUESTS = [
    GuestSpec(),
    *(
        pytest.param(spec, marks=pytest.mark.full)
        for spec in (
            GuestSpec(extra_cmdline=OFF),
            GuestSpec(kernel="newest"),
            GuestSpec(kernel="newest", extra_cmdline=OFF),
        )
    ),
]
PART = 1 if os.environ.get("GDB_KPROBE_FULL") else 2
"""One of so many parts of the core text is looked at."""
MOST_REFUSED = 0.005
SEED = 20260721
SAMPLE = 100

# From include/linux/jump_label.h, static_call_types.h, asm-generic/bug.h, arch/x86/include/asm/extable.h: the size of
# an entry; its first member is the place, relative to itself.
TABLES = {
    Reason.JUMP_LABEL: ("__start___jump_table", "__stop___jump_table", 16),
    Reason.STATIC_CALL: ("__start_static_call_sites", "__stop_static_call_sites", 8),
    Reason.BUG_TABLE: ("__start___bug_table", "__stop___bug_table", 12),
    Reason.EX_TABLE: ("__start___ex_table", "__stop___ex_table", 12),
}
SITE_SIZE = {Reason.JUMP_LABEL: 2, Reason.STATIC_CALL: 5, Reason.BUG_TABLE: 2, Reason.EX_TABLE: 1}
FORBIDDEN = (Reason.NOINSTR, Reason.ENTRY_TEXT, Reason.KPROBES_TEXT, Reason.BLACKLISTED, Reason.BP_PATH)


def gunzip(text: str) -> str:
    """What base64 shows of a compressed file: the console is slow."""
    return gzip.decompress(base64.b64decode(text)).decode()


class Told:
    """What the guest itself says of its core text."""

    def __init__(self, vm: GuestVm) -> None:
        kallsyms = gunzip(vm.check_output("gzip -c /proc/kallsyms | base64"))
        lines = re.findall(r"^([0-9a-f]{16}) \w (\S+)$", kallsyms, re.M)
        self.symbols = [(int(addr, 16), name) for addr, name in lines]
        self.named = {name: addr for addr, name in reversed(self.symbols)}
        self.addrs = sorted({addr for addr, _ in self.symbols})
        start, end = re.findall(r"^\s*([0-9a-f]+)-([0-9a-f]+) : Kernel code", vm.check_output("cat /proc/iomem"), re.M)[
            0
        ]
        assert int(end, 16) > int(start, 16)
        self._offset = int(start, 16) - self.named["_text"]
        self._vm = vm
        self.core = range(self.named["_stext"], self.named["_etext"])
        self.part = self._part()
        """A part of the core text, from symbol to symbol."""
        self.text = self.read(self.part.start, len(self.part))
        listed = re.findall(
            r"^0x([0-9a-f]+)-0x([0-9a-f]+)\s", vm.check_output("cat /sys/kernel/debug/kprobes/blacklist"), re.M
        )
        self._listed = sorted((int(first, 16), int(last, 16)) for first, last in listed)
        # The idle code: the kernel's list has it only since it is a part of .noinstr.text.
        self._listed = sorted([*self._listed, (self.named["__cpuidle_text_start"], self.named["__cpuidle_text_end"])])
        self._reach = list(accumulate((last for _, last in self._listed), max))
        self._names: dict[int, list[str]] = {}
        for addr, name in self.symbols:
            self._names.setdefault(addr, []).append(name)
        self._stems = {name for addr, name in self.symbols if self._is_listed(addr)}

    def read(self, addr: int, size: int) -> bytes:
        return self._vm.read_ram(addr + self._offset, size)

    def _part(self) -> range:
        """Its end: there is the text that must not be probed, too."""
        if PART == 1:
            return self.core
        first = bisect_left(self.addrs, self.core.stop - len(self.core) // PART)
        return range(self.addrs[first], self.core.stop)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """The part of the core text, cut at every symbol."""
        start, end = self.part.start, self.part.stop
        cuts = [*self.addrs[bisect_left(self.addrs, start) : bisect_left(self.addrs, end)], end]
        for first, last in pairwise(cuts):
            yield first, self.text[first - start : last - start]

    def _is_listed(self, addr: int) -> bool:
        at = bisect_right(self._listed, (addr, 1 << 64)) - 1
        return at >= 0 and addr < self._reach[at]

    def is_forbidden(self, addr: int) -> bool:
        """By the guest's kprobe blacklist; a part of a function (``foo.cold``) goes with the function."""
        if self._is_listed(addr):
            return True
        names = self._names[self.addrs[bisect_right(self.addrs, addr) - 1]]
        return any("." in name and name.partition(".")[0] in self._stems for name in names)

    def sites(self, reason: Reason) -> set[int]:
        """The places in the table that are in the part of the core text and not forbidden."""
        first, last, size = TABLES[reason]
        start, end = self.named[first], self.named[last]
        data = self.read(start, end - start)
        places = {start + at + struct.unpack_from("<i", data, at)[0] for at in range(0, len(data), size)}
        return {at for at in places if at in self.part and not self.is_forbidden(at)}

    def instructions_at(self, addr: int, size: int) -> int:
        """How many instructions begin in the *size* bytes at *addr*."""
        decoder = iced_x86.Decoder(64, self.read(addr, 15), ip=addr)
        count = 0
        while decoder.position < size:
            decoder.decode()
            count += 1
        return count


@dataclass
class Checked:
    vm: GuestVm
    guest: LinuxGuest
    snapshot: Snapshot
    core: Survey
    told: Told


@pytest.fixture(scope="module")
def checked(guest_pool: Any) -> Callable[[GuestSpec], Checked]:
    """A function from a spec to a guest whose core text has been surveyed; once for each spec."""
    known: dict[GuestSpec, Checked] = {}

    def get(spec: GuestSpec) -> Checked:
        if spec not in known:
            vm = guest_pool.get(spec)
            told = Told(vm)
            vm.stop()
            guest = open_linux(GuestMonitor(vm), GuestRam(vm))
            snapshot = guest.snapshot(TextMap())
            vm.cont()
            (text,) = (code for start, code in snapshot.windows if start == told.core.start)
            assert len(text) == len(told.core)
            part = text[told.part.start - told.core.start :]
            core = replace(snapshot, windows=((VirtAddr(told.part.start), part),))
            assert core.size == len(told.text)
            known[spec] = Checked(vm, guest, snapshot, survey(guest, core, MODULES, Boost.RELOCATE), told)
        return known[spec]

    return get


@pytest.mark.parametrize("spec", GUESTS, ids=lambda spec: f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}")
def test_the_table_from_the_shell(
    spec: GuestSpec, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    file = tmp_path / "check.json"
    command = [sys.executable, "-m", "gdb_kprobe.launcher.cli", "check", "--all", "--kernel", spec.kernel]
    done = subprocess.run(
        [*command, "--append", " ".join(spec.extra_cmdline), "--json", str(file)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    record_property("table", done.stdout)
    print(done.stdout)
    found = json.loads(file.read_text())
    assert list(found) == ["kernel", "instructions", "rungs", "refused", "not_optimized"]
    assert spec.kernel != "bare"
    assert found["kernel"] == find_kernel(spec.kernel).release
    assert list(found["rungs"]) == ["single-step", "boosted", "optimized"]
    assert found["instructions"] == sum(found["rungs"].values()) + sum(found["refused"].values())
    counted = found["instructions"] - found["refused"][Reason.PADDING.name]
    assert counted > 2_000_000
    otherwise = sum(count for reason, count in found["refused"].items() if Reason[reason] not in BY_PLACE)
    assert 0 < otherwise <= MOST_REFUSED * counted, found["refused"]
    probeable = sum(found["rungs"].values())
    assert probeable > 0.9 * counted
    assert found["rungs"]["optimized"] >= 0.85 * probeable
    assert probeable == found["rungs"]["optimized"] + sum(found["not_optimized"].values())
    entries = re.search(r"Of (\d+) function entries outside of forbidden text (\d+) get one", done.stdout)
    assert entries is not None
    assert int(entries[2]) >= 0.99 * int(entries[1]) > 40_000
    assert found["rungs"]["single-step"] < 0.01 * probeable
    compared = re.search(r"would take (\d+) of them, and boost\s+(\d+)", done.stdout)
    assert compared is not None
    assert int(compared[2]) < int(compared[1]) <= probeable


@pytest.mark.parametrize("spec", GUESTS, ids=lambda spec: f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}")
def test_counts_equal_the_guests_tables(spec: GuestSpec, checked: Callable[[GuestSpec], Checked]) -> None:
    found = checked(spec)
    core, told = found.core, found.told
    for reason in (Reason.JUMP_LABEL, Reason.STATIC_CALL, Reason.BUG_TABLE):
        sites = told.sites(reason)
        assert len(sites) > 1000 // PART
        expected = sum(told.instructions_at(site, SITE_SIZE[reason]) for site in sites)
        assert core.refused[reason] == expected, reason
    assert core.not_boosted == {Reason.EX_TABLE: len(told.sites(Reason.EX_TABLE))}
    assert core.rungs[Rung.SINGLE_STEP] == core.not_boosted[Reason.EX_TABLE] > 100 // PART


@pytest.mark.parametrize("spec", GUESTS, ids=lambda spec: f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}")
def test_the_instructions_are_those_that_iced_sees(spec: GuestSpec, checked: Callable[[GuestSpec], Checked]) -> None:
    found = checked(spec)
    told = found.told
    trampolines = told.named["__static_call_text_start"], told.named["__static_call_text_end"]
    count: Counter[str] = Counter()
    for addr, code in told.pieces():
        part = iced_count(code)
        count["all"] += part
        if trampolines[0] <= addr < trampolines[1]:
            count["trampolines"] += part
        elif told.is_forbidden(addr):
            count["forbidden"] += part
    core = found.core
    assert core.instructions == count["all"]
    assert core.refused[Reason.STATIC_CALL_TRAMPOLINE] == count["trampolines"]
    assert sum(core.refused[reason] for reason in FORBIDDEN) == count["forbidden"]


@pytest.mark.parametrize("spec", GUESTS, ids=lambda spec: f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}")
def test_a_search_finds_what_all_text_refers_to(spec: GuestSpec, checked: Callable[[GuestSpec], Checked]) -> None:
    """What a probe asks of its own surroundings, and what the survey has found out of all text."""
    found = checked(spec)
    everything = read_references(found.snapshot)
    search = search_references(found.snapshot.facts, runs(found.snapshot))
    rng = random.Random(SEED)
    places = [
        at for start, code in found.snapshot.windows for at in rng.choices(range(start, start + len(code)), k=3000)
    ]
    targets = [at for at in places if everything.is_target(at + 1, at + 5)]
    assert len(targets) > 100
    assert [at for at in places if search.is_target(at + 1, at + 5)] == targets
    taken = [at for at in places if everything.is_taken(at, at + 64)]
    assert len(taken) > 10
    assert [at for at in places if search.is_taken(at, at + 64)] == taken
    for place in rng.sample(list(found.guest.functions("*")), 3000):
        function = AddressRange(place.start, place.end)
        assert search.is_unresolved(function) == everything.is_unresolved(function), place


def iced_count(code: bytes) -> int:
    """Instructions in *code*; from the first place that is none, each byte counts."""
    fill = len(code) - len(code.rstrip(b"\xcc"))
    decoder = iced_x86.Decoder(64, code)
    count, end = 0, len(code) - fill
    while decoder.position < end:
        at = decoder.position
        if decoder.decode().is_invalid:
            return count + len(code) - at
        count += 1
    return count + len(code) - decoder.position


@pytest.mark.parametrize("spec", GUESTS, ids=lambda spec: f"{spec.kernel}{'-off' * bool(spec.extra_cmdline)}")
def test_the_survey_says_what_a_probe_is_told(spec: GuestSpec, checked: Callable[[GuestSpec], Checked]) -> None:
    """On a sample of functions, every instruction planned one by one."""
    found = checked(spec)
    guest, windows = found.guest, dict(found.snapshot.windows)
    chosen = random.Random(SEED).sample(
        [
            addr
            for addr in found.told.addrs
            if any(addr in AddressRange(start, VirtAddr(start + len(code))) for start, code in windows.items())
        ],
        SAMPLE,
    )
    slots = SlotAllocator(AddressRange(VirtAddr(MODULES.end - 0x100_0000), MODULES.end))
    planner = Planner(guest, TextMap(), slots, tuple(Rung))
    for addr in [
        *chosen,
        *(
            found.told.named[name]
            for name in ("__get_user_8", "copy_user_generic_string", "exc_int3")
            if name in found.told.named
        ),
    ]:
        place = guest.place_of(VirtAddr(addr))
        if place.end - place.start > 4000:
            continue
        expected: Counter[Reason | Rung] = Counter()
        for insn in FunctionText(guest, TextMap(), place).whole():
            try:
                plan = planner.plan(guest.place_of(insn.addr), needs_post=False, strategy=None)
            except RefusedError as error:
                expected[error.refusal.reason] += 1
            else:
                slots.discard(plan.slot)
                expected[plan.rung] += 1
        only = replace(
            found.snapshot, windows=((place.start, guest.memory.read(place.start, place.end - place.start)),)
        )
        got = survey(guest, only, slots.area, Boost.RELOCATE, references=guest.references(TextMap()))
        counts: Counter[Reason | Rung] = Counter(dict((*got.rungs.items(), *got.refused.items())))
        assert +counts == expected, place
