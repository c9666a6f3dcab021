"""Python handlers: what they see is what the workload passed, what they change is what the workload gets."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbMi, GdbTimeoutError
from gdb_kprobe.x86.decode import Insn, iter_insns
from kprobe_guest import GuestSpec
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live


RUNGS = ("single-step", "boosted", "optimized")
ARGUMENT_1 = 0x70
"""Offset of di in struct pt_regs: a system call's first argument."""


@pytest.fixture
def handler(tmp_path: Path) -> Callable[[Any, Any, str], None]:
    """Runs a piece of Python in gdb, with the API as ``kprobe``, that adds probes to a guest."""

    def define(guest: Probed, gdb: GdbMi, text: str) -> None:
        script = tmp_path / "handler.py"
        script.write_text(f"from gdb_kprobe.gdbext import api as kprobe\nseen = []\n{text}")
        gdb.console(f"source {script}")
        guest.touched |= guest.patched(gdb)

    return define


def printed(gdb: GdbMi, expression: str) -> str:
    return str(gdb.console(f"python print({expression})")).strip()


def result_of(guest: Probed, command: str) -> int:
    """What the last system call of the workload returned."""
    return int(guest.guest.check_output(command).rpartition("last result ")[2])


def insns_of(guest: Probed, function: str) -> list[Insn]:
    kernel = guest.snapshot.guest
    (symbol,) = kernel.kallsyms.lookup(function)
    return list(iter_insns(kernel.memory.read(symbol.addr, kernel.kallsyms.size(symbol)), symbol.addr))


@pytest.mark.parametrize("rung", RUNGS)
def test_reads_a_string_that_the_workload_passed(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            f"""
@kprobe.probe("p:swapoff __x64_sys_swapoff")
def on_swapoff(hit):
    path = hit.read_int(hit.regs.di + {ARGUMENT_1:#x})
    seen.append((hit.hit, hit.read_string(path), hit.read(path, 3)))
""",
        )
        gdb.cont()
        for name in ("/first", "/second-name"):
            assert result_of(guest, f"workload syscall 168 2 s:{name}") == -2  # ENOENT
        gdb.interrupt()
        expected = [
            (1, "/first", b"/fi"),
            (2, "/first", b"/fi"),
            (3, "/second-name", b"/se"),
            (4, "/second-name", b"/se"),
        ]
        assert printed(gdb, "seen") == str(expected)
        assert guest.hits(gdb) == {"swapoff": 4}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_a_register_that_is_written_changes_the_result(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            """
@kprobe.probe("p:which __do_sys_getpriority if di == 0")
def on_which(hit):
    hit.regs.di = 7
""",
        )
        gdb.cont()
        assert result_of(guest, "workload syscall 140 10 0 0") == -22  # EINVAL: there is no `which` of 7
        assert result_of(guest, "workload syscall 140 10 1 0") == 20
        gdb.interrupt()
        assert guest.hits(gdb) == {"which": 10}
        gdb.console("kprobe detach")
    assert result_of(guest, "workload syscall 140 10 0 0") == 20


@pytest.mark.parametrize("rung", RUNGS)
def test_memory_that_is_written_changes_the_result(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            f"""
@kprobe.probe("p:regs __x64_sys_getpriority")
def on_regs(hit):
    hit.write(hit.regs.di + {ARGUMENT_1:#x}, (7).to_bytes(8, "little"))
""",
        )
        gdb.cont()
        assert result_of(guest, "workload syscall 140 10 0 0") == -22
        gdb.interrupt()
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_returns_from_the_function_at_its_entry(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            """
@kprobe.probe("p:max __x64_sys_sched_get_priority_max")
def on_max(hit):
    hit.regs.ax = 1000 + hit.hit
    hit.regs.ip = hit.read_int(hit.regs.sp)
    hit.regs.sp += 8
""",
        )
        gdb.cont()
        assert result_of(guest, "workload syscall 146 10 2") == 1010
        gdb.interrupt()
        assert guest.hits(gdb) == {"max": 10}
        gdb.console("kprobe detach")
    assert result_of(guest, "workload syscall 146 10 2") == 99


@pytest.mark.parametrize("rung", RUNGS)
def test_goes_on_at_another_instruction(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    ret = next(insn for insn in insns_of(guest, "__x64_sys_sched_get_priority_max") if insn.is_ret)
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            f"""
@kprobe.probe("p:max __x64_sys_sched_get_priority_max")
def on_max(hit):
    hit.regs.ax, hit.regs.ip = -5, {ret.addr:#x}
""",
        )
        guest.add(gdb, f"p:ret {ret.addr:#x}", rung)
        gdb.cont()
        assert result_of(guest, "workload syscall 146 10 2") == -5
        gdb.interrupt()
        assert guest.hits(gdb) == {"max": 10, "ret": 10}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_skips_the_instruction(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    # The instruction that loads `which`: without it the pointer to pt_regs is taken for it.
    load = next(insn for insn in insns_of(guest, "__x64_sys_getpriority") if insn.op_str.startswith("edi,"))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(guest, gdb, f"kprobe.add('p:load {load.addr:#x}', lambda hit: hit.skip())")
        gdb.cont()
        assert result_of(guest, "workload syscall 140 10 0 0") == -22
        gdb.interrupt()
        assert guest.hits(gdb) == {"load": 10}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_a_post_handler_sees_and_changes_what_the_instruction_did(
    probed: Boot, handler: Any, kernel: str, rung: str
) -> None:
    guest = probed(GuestSpec(kernel=kernel, vcpus=2))
    load = next(insn for insn in insns_of(guest, "__x64_sys_getpriority") if insn.op_str.startswith("esi,"))
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            f"""
def before(hit):
    seen.append(("before", hit.regs.ip - {load.addr:#x}, hit.read_int(hit.regs.di + 0x68)))

def after(hit):
    seen.append(("after", hit.regs.ip - {load.addr:#x}, hit.regs.si))
    hit.regs.si = 1 << 20

kprobe.add("p:load {load.addr:#x}", before, after)
""",
        )
        assert gdb.command("-kprobe-list")["probes"][0]["rung"] == rung
        gdb.cont()
        # No process has that number: ESRCH.
        assert result_of(guest, "workload syscall 140 2 0 1") == -3
        gdb.interrupt()
        assert printed(gdb, "seen") == str([("before", 0, 1), ("after", load.length, 1)] * 2)
        assert guest.hits(gdb) == {"load": 2}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_post_handler_is_called_for_each_call_of_its_condition_and_leaves_the_rungs(
    probed: Boot, handler: Any, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    first = insns_of(guest, "__do_sys_getpriority")[0]
    with guest.gdb() as gdb:
        assert guest.add(gdb, "p:near __x64_sys_getpriority")["rung"] == "optimized"
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            f"""
def after(hit):
    seen.append((hit.regs.ip - {first.addr:#x}, hit.regs.si & 0xFFFFFFFF))

kprobe.add("p:some __do_sys_getpriority if s32(si) == 77", post=after)
""",
        )
        rungs = {probe["name"]: probe["rung"] for probe in gdb.command("-kprobe-list")["probes"]}
        assert rungs == {"near": "optimized", "some": rung}
        asked = int(gdb.console("python print(kprobe.attachment().stops)"))
        gdb.cont()
        runs = " & ".join(f"workload syscall 140 {calls} 0 {who}" for calls, who in ((400, 0), (30, 77)) * vcpus)
        guest.guest.check_output(f"{runs} & wait", timeout=120)
        gdb.interrupt()
        assert guest.hits(gdb) == {"near": 430 * vcpus, "some": 30 * vcpus}
        assert printed(gdb, f"seen == [({first.length}, 77)] * {30 * vcpus}") == "True"
        told = int(gdb.console("python print(kprobe.attachment().stops)")) - asked
        assert told == 30 * vcpus if rung != "single-step" else told >= 30 * vcpus
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_a_post_handler_is_called_once_where_the_user_steps_over_its_instruction(
    probed: Boot, handler: Any, rung: str
) -> None:
    guest = probed(GuestSpec())
    calls = 4
    first = insns_of(guest, "__do_sys_getpriority")[0]
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            """
kprobe.add('p:here __do_sys_getpriority', lambda hit: hit.stop(), lambda hit: seen.append(hit.regs.ip))
""",
        )
        gdb.cont()
        job = guest.guest.spawn(f"workload syscall 140 {calls} 0 0", wait=False)
        for stops in range(1, calls + 1):
            gdb.wait_stop()
            assert gdb.pc == first.addr
            assert printed(gdb, "len(seen)") == str(stops - 1)
            if stops % 2:
                gdb.console("stepi")
                gdb.wait_stop()
                if gdb.pc == first.addr:
                    gdb.console("stepi")  # QEMU reports a step now and then that executed nothing
                    gdb.wait_stop()
                assert gdb.pc == first.end
                assert printed(gdb, f"seen == [{first.end:#x}] * {stops}") == "True"
            gdb.cont()
        assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"here": calls}
        assert printed(gdb, f"seen == [{first.end:#x}] * {calls}") == "True"
        assert gdb.command("-kprobe-list")["probes"][0]["rung"] == rung
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_gdb_killed_in_the_middle_of_post_handlers_loses_no_call_of_the_guest(
    probed: Boot, handler: Any, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    calls = 3000
    with guest.gdb(watchdog=False) as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(guest, gdb, "kprobe.add('p:post __do_sys_getpriority', post=lambda hit: None)")
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall 140 {calls} 0 0", wait=False) for _ in range(vcpus)]
        time.sleep(random.uniform(1, 2))
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"kprobe adopt {guest.profile}")
        gdb.cont()
        for job in jobs:
            status, said = guest.guest.finish(job, timeout=120)
            assert (status, f"{calls} calls done" in said) == (0, True)
        gdb.interrupt()
        [probe] = gdb.command("-kprobe-list")["probes"]
        # The one hit that each vCPU was at when gdb was killed may have been counted, or not, or missed.
        assert calls * vcpus - 2 * vcpus <= int(probe["hits"]) + int(probe["missed"]) <= calls * vcpus + vcpus
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_a_condition_counts_exactly_the_calls_that_match(probed: Boot, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    with guest.gdb() as gdb:
        guest.add(gdb, "p:zero __do_sys_getpriority which=%di:s32 if which == 0", rung)
        guest.add(gdb, "p:negative __do_sys_getpriority who=%si:s32 if who < 0 && di != 0", rung)
        guest.add(gdb, "p:never __do_sys_getpriority if s32(di) > 2", rung)
        gdb.cont()
        calls = ["140 30 0 -1", "140 20 1 -1", "140 7 2 3"]
        guest.guest.check_output(" & ".join(f"workload syscall {call}" for call in calls) + " & wait")
        gdb.interrupt()
        assert guest.hits(gdb) == {"zero": 30, "negative": 20, "never": 0}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_stop_gives_the_prompt_at_the_probe_and_a_hit_is_counted_once(
    probed: Boot, handler: Any, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    calls = 10
    first = insns_of(guest, "__do_sys_getpriority")[0]
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(guest, gdb, "kprobe.add('p:here __do_sys_getpriority', lambda hit: hit.stop())")
        gdb.console("set scheduler-locking step")  # else the other vCPU's hit may end a step
        gdb.cont()
        jobs = [guest.guest.spawn(f"workload syscall 140 {calls} 0 0", wait=False) for _ in range(vcpus)]
        stops = hits = 0
        while hits < calls * vcpus:
            gdb.wait_stop()
            stops += 1
            assert gdb.pc == first.addr
            hits = guest.hits(gdb)["here"]
            assert stops <= hits <= stops * vcpus
            if stops % 3 == 0:
                # A step executes the instruction that is probed, and is no other hit.
                gdb.console("stepi")
                if gdb.pc == first.addr:
                    gdb.console("stepi")  # QEMU reports a step now and then that executed nothing
                assert gdb.pc == first.end
            gdb.cont()
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        with pytest.raises(GdbTimeoutError):
            gdb.wait_stop(1)
        gdb.interrupt()
        assert guest.hits(gdb) == {"here": calls * vcpus}
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_probe_that_stops_asks_the_host_for_the_calls_of_its_condition_alone(
    probed: Boot, handler: Any, vcpus: int, rung: str
) -> None:
    guest = probed(GuestSpec(vcpus=vcpus))
    first = insns_of(guest, "__do_sys_getpriority")[0]
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(guest, gdb, "kprobe.add('p:here __do_sys_getpriority if s32(si) == 77', stop=True)")
        asked = int(gdb.console("python print(kprobe.attachment().stops)"))
        gdb.cont()
        others = " & ".join(["workload syscall 140 500 0 0"] * vcpus)
        jobs = [guest.guest.spawn(f"{others} & workload syscall 140 3 0 77; wait", wait=False)]
        for stop in range(3):
            gdb.wait_stop()
            assert gdb.pc == first.addr
            assert gdb.evaluate("$rsi") & 0xFFFF_FFFF == 77
            assert guest.hits(gdb) == {"here": stop + 1}
            gdb.cont()
        for job in jobs:
            assert guest.guest.finish(job)[0] == 0
        gdb.interrupt()
        assert guest.hits(gdb) == {"here": 3}
        told = int(gdb.console("python print(kprobe.attachment().stops)")) - asked
        assert told == 3 if rung != "single-step" else told >= 3
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", RUNGS)
def test_several_probes_at_one_address(probed: Boot, handler: Any, rung: str) -> None:
    guest = probed(GuestSpec(vcpus=2))
    run = "workload syscall 140 10 0 0 & workload syscall 140 10 0 0 & wait"
    with guest.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        handler(
            guest,
            gdb,
            """
kprobe.add("p:one __do_sys_getpriority", lambda hit: seen.append("one"))
kprobe.add("p:two __do_sys_getpriority if si == 1", lambda hit: seen.append("two"))
kprobe.add("p:three __do_sys_getpriority", lambda hit: seen.append("three"))
""",
        )
        assert len({probe["addr"] for probe in gdb.command("-kprobe-list")["probes"]}) == 1
        gdb.cont()
        guest.guest.check_output(run)
        gdb.interrupt()
        assert guest.hits(gdb) == {"one": 20, "two": 0, "three": 20}
        assert printed(gdb, "seen == ['one', 'three'] * 20") == "True"
        gdb.console("kprobe delete one")
        gdb.cont()
        guest.guest.check_output(run)
        gdb.interrupt()
        assert guest.hits(gdb) == {"two": 0, "three": 40}
        gdb.console("kprobe disable three")
        gdb.cont()
        guest.guest.check_output("workload syscall 140 10 0 1")
        gdb.interrupt()
        assert guest.hits(gdb) == {"two": 10, "three": 40}
        gdb.console("kprobe delete all")
        assert guest.snapshot.leftovers(guest.touched) == []
        gdb.cont()
        guest.guest.check_output(run)
        gdb.interrupt()
        gdb.console("kprobe detach")
