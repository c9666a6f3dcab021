"""A sample of ``./install.sh torture fuzz``: what readers make of a guest whose memory holds anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.modules import Module
from gdb_kprobe.linux.structs import read_struct
from gdb_kprobe.model import PhysAddr, VirtAddr
from gdb_kprobe.region.header import read_header
from gdb_kprobe.region.records import RecordKind, iter_records, record_cells
from gdb_kprobe.testing import GdbCommandError, GdbMi
from gdb_kprobe.testing.oracle import GuestRam, text_of
from kprobe_guest import GuestSpec, GuestVm
from tests.support.guests import environment, profile
from tests.torture.fuzz import Fuzzer, Recording, record
from tests.torture.fuzz.readers import Asked, Reader
from tests.torture.fuzz.replaying import left_armed

pytestmark = pytest.mark.live
MUTATIONS = 1500
SEED = 20


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], Recording]:
    """A recording of each kernel, made when it is asked for: the guest is changed, and of no use to others."""
    made: dict[str, Recording] = {}

    def get(kernel: str) -> Recording:
        if kernel not in made:
            made[kernel] = record(GuestSpec(kernel=kernel, vcpus=2))
        return made[kernel]

    return get


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_whatever_the_guest_holds_a_reader_answers_or_says_what_is_wrong(
    recorded: Callable[[str], Recording], kernel: str
) -> None:
    fuzzer = Fuzzer(recorded(kernel), SEED)
    fuzzer.run(MUTATIONS, large=0.01)
    assert [str(finding) for finding in fuzzer.findings] == []
    # Most of what is changed does not matter: but it was read, and where it did, errors of many kinds have said so.
    assert fuzzer.asked == MUTATIONS
    assert fuzzer.errors > MUTATIONS // 20
    assert fuzzer.kinds > 20


def test_a_reader_that_does_as_it_should_not_is_found(recorded: Callable[[str], Recording]) -> None:
    """The fuzzer itself: what fails, does not end, shows what it should not, or writes, is a finding."""

    def fails(asked: Asked) -> list[str]:
        asked.machine.read_physical(asked.region, 8)
        raise IndexError("out of it")

    def hangs(asked: Asked) -> list[str]:
        while True:
            asked.machine.read_physical(asked.region, 8)

    def shows(asked: Asked) -> list[str]:
        return ["\x1b[2J"]

    def writes(asked: Asked) -> list[str]:
        asked.machine.write_physical(PhysAddr(asked.region + 8), b"\xff")
        return []

    for ask, told in (
        (fails, "IndexError: out of it"),
        (hangs, "TookTooLongError"),
        (shows, r"it shows '\x1b[2J'"),
        (writes, "it wrote ff over"),
    ):
        reader = Reader("the region", ask, 1, 0.2, writes=True)
        fuzzer = Fuzzer(recorded("debian"), SEED, readers=(reader,))
        fuzzer.run(1, large=0)
        [finding] = fuzzer.findings
        assert told in finding.wrong


ESCAPE = b"\x1b]0;x\x07"
"""Has a terminal take another title. It is as long as ``lo_ioctl``, but for a byte."""
SHOWN = r"\x1b]0;x\x07"


def test_names_and_strings_of_the_guest_reach_gdb_mi_and_files_escaped() -> None:
    """A module whose name and symbol, and a path whose characters, are what a terminal acts on."""
    with GuestVm(GuestSpec()) as guest:
        guest.check_output("grep -q ^loop /proc/modules || insmod /modules/loop.ko")
        known = text_of(guest).guest
        [module] = [module for module in known.modules if module.name == "loop"]
        [symbol] = known.kallsyms.lookup("lo_ioctl")
        put(guest, known, module.raw.addr + known.types.offset_of("module", "name"), ESCAPE + b"\0")
        put(guest, known, address_of_name(known, module, "lo_ioctl"), ESCAPE + b"\0")
        with GdbMi(environment(guest)) as gdb:
            gdb.console(f"kprobe attach {profile(guest)}")
            plan = gdb.console(f"kprobe plan {symbol.addr:#x}")
            assert f"({SHOWN}+0x0 [{SHOWN}]" in plan.replace("\n", " ")
            place = gdb.command(f'-kprobe-add "p:evil {symbol.addr:#x}"')["probe"]
            assert SHOWN in " ".join(map(str, place.values()))
            with pytest.raises(GdbCommandError) as error:
                gdb.console(f"kprobe add p:within {symbol.addr + 6:#x}")  # no boundary of an instruction
            assert SHOWN in str(error.value)
            gdb.console("kprobe symbols")
            assert SHOWN in gdb.console(f"info symbol {symbol.addr:#x}")
            gdb.console(
                "python import gdb_kprobe.gdbext.api as api; "
                "api.probe('p:paths do_sys_openat2')(lambda hit: print('opened', hit.read_string(hit.regs.si)))"
            )
            gdb.cont()
            guest.run("cat \"/tmp/$(printf '\\033[31mevil')\" 2>/dev/null")
            gdb.interrupt()
            assert r"opened /tmp/\x1b[31mevil" in "".join(gdb.transcript).replace(r"\\\\", "\\").replace(r"\\", "\\")
            gdb.console("kprobe detach")
            raw = "".join(gdb.transcript)
            assert not any(character in raw for character in "\x1b\x07\x9b")
            assert "033" not in raw, "MI spells control characters so: one got there"
        guest.check()


def put(guest: GuestVm, kernel: LinuxGuest, addr: int, data: bytes) -> None:
    """Have the guest hold *data* at the virtual address *addr*."""
    at = kernel.memory.translate(VirtAddr(addr))
    guest.ram()[at : at + len(data)] = data


def address_of_name(kernel: LinuxGuest, module: Module, name: str) -> int:
    """Where the string table of *module* has *name*."""
    table = read_struct(kernel.memory, kernel.types, "mod_kallsyms", module.raw.pointer("kallsyms"))
    strings = kernel.memory.read(table.pointer("strtab"), -table.pointer("strtab") % 0x1000)  # it is small
    return table.pointer("strtab") + strings.index(b"\0" + name.encode() + b"\0") + 1


def test_a_damaged_header_is_told_of_at_the_connection_and_refused_at_the_attach() -> None:
    """What is armed is not known then, so that nothing is written; a damaged record is named, and its place left."""
    with GuestVm(GuestSpec()) as guest:
        left_armed(guest)
        known = text_of(guest).guest
        assert guest.reserved_base is not None
        header = read_header(GuestRam(guest), PhysAddr(guest.reserved_base))
        assert header is not None
        records = tuple(iter_records(GuestRam(guest), header))

        def armed() -> list[bool]:
            return [
                known.memory.read(record.patch.addr, len(record.patch.new)) == record.patch.new for record in records
            ]

        before = armed()
        flip(guest, guest.reserved_base + 100)
        with GdbMi(environment(guest)) as gdb:
            gdb.console(f"target remote {guest.gdb_address}")
            assert "header at physical 0x10000000 is damaged (its checksum is wrong)" in "".join(gdb.transcript)
            gdb.console("disconnect")
            with pytest.raises(GdbCommandError, match=r"is damaged \(its checksum is wrong\)") as error:
                gdb.console(f"kprobe attach {profile(guest)}")
            assert "hint: reset the guest" in str(error.value)
            assert armed() == before
            gdb.console("disconnect")
            flip(guest, guest.reserved_base + 100)
            site = next(record for record in records if record.kind is RecordKind.SITE)
            own = site.patch.addr.to_bytes(8, "little")
            index, cell = next(
                (index, at)
                for index, (at, data) in enumerate(record_cells(GuestRam(guest), header))
                if data[8:16] == own
            )
            flip(guest, cell + 40)
            told = gdb.console(f"kprobe restore {profile(guest)}")
            assert f"record {index} of the region is damaged: its checksum is wrong" in told
        left = [record for record, is_armed in zip(records, armed(), strict=True) if is_armed]
        assert site in left
        # A kprobe of the guest's own has saved one of our jumps, which stays as well.
        assert {record.kind for record in left} == {RecordKind.SITE}


def flip(guest: GuestVm, at: int) -> None:
    """Change a bit at the physical address *at*; the second time it is what it was."""
    guest.ram()[at] ^= 1
