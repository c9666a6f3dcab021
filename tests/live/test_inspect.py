"""What the Python API says of a session, against the guest itself, its RAM, and QEMU's monitor."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec, GuestVm
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

TEXT_BASE = 0xFFFF_FFFF_8100_0000
"""Where a kernel is linked to be."""
NOP5 = bytes.fromhex("0f1f440000")


ASK = """
import json
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api

def site(one):
    return {
        "addr": one.addr, "place": str(one.place), "insn": one.insn.raw.hex(), "rung": one.rung,
        "armed": one.is_armed, "stops": one.stops, "original": one.original.hex(), "patched": one.patched.hex(),
        "slot": [one.slot.start, one.slot.end], "declined": [[rung, why.reason] for rung, why in one.declined],
        "owner": one.owner, "probes": one.probes,
    }

def failure(act):
    try:
        act()
    except KprobeError as error:
        return error.message

def show(value):
    print("ANSWER " + json.dumps(value))
"""


def ask(gdb: GdbMi, expression: str) -> Any:
    (found,) = re.findall(r"^ANSWER (.*)$", gdb.console(f"python show({expression})"), re.M)
    return json.loads(found)


def kallsyms(vm: GuestVm) -> dict[str, int]:
    """The guest's own table, of each name the first."""
    lines = (line.split() for line in vm.kallsyms().splitlines())
    found: dict[str, int] = {}
    for addr, _, name, *_ in lines:
        found.setdefault(name, int(addr, 16))
    return found


@contextlib.contextmanager
def events(vm: GuestVm) -> Iterator[Callable[[], list[str]]]:
    """QEMU's events from now on, by their names; gives what says which there were."""
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.settimeout(10)
        qmp.connect(str(vm.qmp_path))
        lines = qmp.makefile("rw")

        def command(name: str) -> list[str]:
            """Execute it; returns the events that came before its answer."""
            lines.write(json.dumps({"execute": name}) + "\n")
            lines.flush()
            seen: list[str] = []
            while "return" not in (said := json.loads(lines.readline())):
                seen += [said["event"]] if "event" in said else []
            return seen

        lines.readline()  # the greeting
        command("qmp_capabilities")
        yield lambda: command("query-status")


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_sites_are_what_the_text_and_the_region_hold(probed: Boot, kernel: str) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=2))
    vm, memory = guest.guest, guest.snapshot.guest.memory
    with guest.gdb() as gdb:
        gdb.console(f"python exec({ASK!r})")
        guest.add(gdb, "p:jump __x64_sys_getpriority")
        guest.add(gdb, "p:again __x64_sys_getpriority")
        guest.add(gdb, "p:trap __do_sys_getpriority", "boosted")
        guest.add(gdb, "p:step __x64_sys_geteuid", "single-step")
        guest.add(gdb, "p:module loop:loop_control_ioctl")
        guest.add(gdb, "p:off vfs_read")
        gdb.console("kprobe disable off")
        found = ask(gdb, "[site(one) for one in api.sites()]")
        by_probe = {name: one for one in found for name in one["probes"]}
        assert {name: (one["rung"], one["armed"], one["stops"]) for name, one in by_probe.items()} == {
            "jump": ("optimized", True, False),
            "again": ("optimized", True, False),
            "trap": ("boosted", True, False),
            "step": ("single-step", True, True),
            "module": ("optimized", True, False),
            "off": ("optimized", False, False),
        }
        assert by_probe["jump"] == by_probe["again"]
        assert {rung for rung, _ in by_probe["step"]["declined"]} == {"optimized", "boosted"}
        assert by_probe["module"]["owner"].startswith("loop")
        assert by_probe["jump"]["owner"] == ""

        virt, phys = ask(gdb, "[api.region().range.start, api.region().phys]")
        gdb.cont()
        # While the guest runs there are the plugin's own, too: it has to know when the module goes.
        running = ask(gdb, "[site(one) for one in api.sites()]")
        assert [one for one in running if one["probes"]] == found
        assert {one["place"].partition("+")[0] for one in running if not one["probes"]} >= {"free_module"}
        for one in running:
            original, patched = bytes.fromhex(one["original"]), bytes.fromhex(one["patched"])
            addr = VirtAddr(one["addr"])
            assert guest.snapshot.original(addr, len(original)) == original
            assert original.startswith(bytes.fromhex(one["insn"]))
            assert memory.read(addr, len(patched)) == (patched if one["armed"] else original), one
            start, end = one["slot"]
            assert start < end
            # A slot begins with the address that it is for.
            assert vm.read_u64(phys + start - virt) == addr
        armed = {one["addr"]: len(one["patched"]) // 2 for one in running if one["armed"]}
        assert armed.keys() <= guest.probed_bytes()
        assert guest.probed_bytes() <= {addr + byte for addr, size in armed.items() for byte in range(size)}
        gdb.interrupt()
        assert ask(gdb, "[api.state(api.get(name)) for name in ('jump', 'off')]") == ["armed", "disabled"]
        gdb.console("python jump = api.get('jump'); api.delete(jump)")
        assert ask(gdb, "[api.site(jump), api.site(api.get('again')).probes]") == [None, ["again"]]
        assert "jump is not there: it was deleted" in ask(gdb, "failure(lambda: api.delete(jump))")
        gdb.console("python newer = api.add('p:jump __x64_sys_setpriority')")
        assert "jump is not there" in ask(gdb, "failure(lambda: api.delete_many([api.get('off'), jump]))")
        assert {"jump", "off"} <= set(ask(gdb, "[probe.name for probe in api.probes()]"))
        gdb.console("python api.delete_many([newer])")
        gdb.console("kprobe detach")
        assert "not attached to a guest" in ask(gdb, "failure(lambda: api.sites())")


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_guest_and_region_are_what_the_guest_and_qemu_say(probed: Boot, kernel: str) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=2))
    vm = guest.guest
    release, vcpus = vm.check_output("uname -r; nproc").split()
    banner = vm.check_output("cat /proc/version").strip()
    symbols = kallsyms(vm)
    with guest.gdb() as gdb:
        gdb.console(f"python exec({ASK!r})")
        assert ask(gdb, "(lambda g: [g.release, g.vcpus, g.slide, g.bp_entry])(api.guest())") == [
            release, int(vcpus), symbols["_text"] - TEXT_BASE, symbols["asm_exc_int3"],
        ]  # fmt: skip
        assert release in ask(gdb, "api.guest().description")
        for name in ("vfs_read", "jiffies", "linux_banner"):
            assert ask(gdb, f"api.address({name!r})") == symbols[name]
        assert ask(gdb, "api.place('vfs_read+5').addr") == symbols["vfs_read"] + 5
        assert ask(gdb, f"str(api.place({symbols['vfs_read'] + 5}))") == "vfs_read+0x5"
        assert ask(gdb, "api.place('loop:loop_control_ioctl').addr") == symbols["loop_control_ioctl"]
        assert ask(gdb, f"api.read(api.address('linux_banner'), {len(banner)}).decode()") == banner
        assert "0x0 is not mapped in the guest" in ask(gdb, "failure(lambda: api.read(0, 1))")
        assert "the guest's kernel has no symbol nosuch" in ask(gdb, "failure(lambda: api.address('nosuch'))")

        guest.add(gdb, "p:read vfs_read")
        start, insns, ftrace = ask(
            gdb, "(lambda f: [f.place.start, [i.raw.hex() for i in f.insns], f.ftrace])(api.function('vfs_read+5'))"
        )
        code = bytes.fromhex("".join(insns))
        assert start == symbols["vfs_read"]
        assert guest.snapshot.original(VirtAddr(start), len(code)) == code
        assert [guest.snapshot.original(VirtAddr(at), 5) for at in ftrace] == [NOP5]

        virt, code, phys, used = ask(
            gdb, "(lambda r: [r.range.start, r.code.start, r.phys, r.slots_used])(api.region())"
        )
        assert vm.hmp(f"gva2gpa {virt:#x}").strip() == f"gpa: {phys:#x}"
        assert vm.hmp(f"gva2gpa {code:#x}").strip() == f"gpa: {phys + code - virt:#x}"
        assert vm.hmp(f"gva2gpa {code - 0x1000:#x}").strip() == "Unmapped", "what is not in use is not mapped"
        assert used > 0
        assert ask(gdb, "api.is_quiet()") is True
        gdb.cont()
        assert ask(gdb, "[api.guest().release, api.guest().vcpus]") == [release, int(vcpus)]
        assert f"{vcpus} vCPU(s)" in gdb.console("kprobe info")
        assert "the guest is running" in ask(gdb, "failure(lambda: api.read(api.address('jiffies'), 8))")
        gdb.interrupt()
        gdb.console("kprobe detach")


def test_stops_are_those_that_qemu_tells_of(probed: Boot) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    with guest.gdb() as gdb:
        gdb.console(f"python exec({ASK!r})")
        guest.add(gdb, "p:counted __x64_sys_getpriority")
        gdb.console("python api.add('p:handled __do_sys_getpriority if si == 0x41', lambda hit: None)")
        guest.touched |= guest.patched(gdb)
        connection, counters, watchdog, in_guest = ask(
            gdb, "(lambda a: [a.connection, a.counters, a.watchdog, a.in_guest])(api.attachment())"
        )
        assert connection == vm.gdb_address
        assert counters == "shared memory (ram)"
        assert in_guest is True
        assert b"gdb_kprobe" in Path(f"/proc/{watchdog}/cmdline").read_bytes()
        with events(vm) as seen:
            for calls in (7, 30):
                before = ask(gdb, "api.attachment().stops")
                gdb.cont()
                vm.run("true")
                seen()
                vm.check_output(f"workload syscall {GETPRIORITY} 50 1 0x40")
                assert "STOP" not in seen()
                vm.check_output(f"workload syscall {GETPRIORITY} {calls} 1 0x41")
                assert seen().count("STOP") == calls
                gdb.interrupt()
                assert ask(gdb, "api.attachment().stops") - before == calls
        gdb.console("kprobe detach")
