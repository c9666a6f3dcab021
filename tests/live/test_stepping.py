"""The user's own steps over probes: each executes what it would without them, and each executed probe is one hit.

The oracle is a gdb without the plugin, at the same task of the same guest. It makes the same call again and again, with
the same registers each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from gdb_kprobe.session.hits.stepping import MOST_PLACES
from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import ENTRY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

FUNCTION = ENTRY
STEPS = 12
NOP_SIZE = 5
"""Of ftrace, at a function's entry: a probe there is behind it."""
NR_GETPRIORITY = 140

State = tuple[int, ...]
REGISTERS = (
    "rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "eflags",
)  # fmt: skip


def state(gdb: GdbMi) -> State:
    numbers = " ".join(str(number(gdb, name)) for name in REGISTERS)
    values = gdb.command(f"-data-list-register-values x {numbers}")["register-values"]
    by_number = {int(value["number"]): int(value["value"], 16) for value in values}
    return tuple(by_number[number(gdb, name)] for name in REGISTERS)


_numbers: dict[str, int] = {}


def number(gdb: GdbMi, name: str) -> int:
    if not _numbers:
        names = gdb.command("-data-list-register-names")["register-names"]
        _numbers.update({register: index for index, register in enumerate(names) if register})
    return _numbers[name]


def step(gdb: GdbMi, command: str = "stepi") -> State:
    """One step that went on: QEMU reports one now and then that executed nothing."""
    before = state(gdb)
    for _ in range(4):
        gdb.console(command)
        gdb.wait_stop()
        after = state(gdb)
        if after != before:
            break
    return after


def stop_at_entry(gdb: GdbMi, entry: int) -> None:
    if state(gdb)[0] == entry:  # gdb would go on from here, to a breakpoint that is behind it
        return
    gdb.console(f"tbreak *{entry:#x}")
    gdb.cont()
    gdb.wait_stop()
    assert state(gdb)[0] == entry


@pytest.fixture
def calling(probed: Boot) -> Iterator[Any]:
    """A guest with a task that makes the call for ever."""
    guest = probed(GuestSpec(extra_cmdline=("randomize_kstack_offset=off",)))
    job = guest.guest.spawn(f"workload syscall {NR_GETPRIORITY} -1 0 0")
    yield guest
    guest.guest.finish(job, kill=True)


@pytest.fixture
def plain(calling: Any) -> list[State]:
    """The states of a gdb without the plugin, from the entry on; the same at two calls."""
    entry = entry_of(calling)
    runs = []
    with GdbMi(load=False) as gdb:
        gdb.console(f"target remote {calling.guest.gdb_address}")
        for _ in range(2):
            stop_at_entry(gdb, entry)
            runs.append([state(gdb), *(step(gdb) for _ in range(STEPS))])
        gdb.console("detach")
    assert runs[0] == runs[1], "the oracle is not the same at each call"
    return runs[0]


def entry_of(guest: Probed) -> int:
    return int(guest.snapshot.guest.kallsyms.lookup(FUNCTION)[0].addr)


def first_visits(plain: list[State]) -> list[int]:
    """The instructions that were executed, each once, in their order: of the function and of what it jumps to."""
    return list(dict.fromkeys(found[0] for found in plain[:-1]))


def of_the_body(guest: Probed, plain: list[State]) -> int:
    """The index of the state at the first instruction behind landing pad and nop."""
    pad = guest.pad(plain[0][0])
    return [found[0] for found in plain].index(plain[0][0] + pad + NOP_SIZE)


@pytest.mark.parametrize("rung", ["single-step", "boosted", "auto"])
def test_ten_steps_over_each_probed_place_are_those_of_a_plain_gdb(calling: Any, plain: list[State], rung: str) -> None:
    with calling.gdb() as gdb:
        for visited in first_visits(plain)[1:8:2]:
            # Behind the nop of ftrace, where that is named.
            place = int(calling.add(gdb, f"p:one {visited:#x}", rung)["addr"], 16)
            stop_at_entry(gdb, plain[0][0])
            before = calling.hits(gdb)["one"]
            seen = [state(gdb)]
            counts = [0]
            for _ in range(STEPS):
                seen.append(step(gdb))
                counts.append(calling.hits(gdb)["one"] - before)
            assert seen == plain, hex(place)
            assert counts == [sum(found[0] == place for found in plain[:at]) for at in range(STEPS + 1)], hex(place)
            gdb.console("kprobe delete one")
        gdb.console("kprobe detach")


def test_a_jump_is_stepped_with_breakpoints_of_the_users_at_and_in_it(calling: Any, plain: list[State]) -> None:
    places = first_visits(plain)
    with calling.gdb() as gdb:
        probe = calling.add(gdb, f"p:one {places[1]:#x}")
        assert probe["rung"] == "optimized"
        for at in range(1, 4):
            gdb.console(f"break *{places[at]:#x}")
            stop_at_entry(gdb, plain[0][0])
            before = calling.hits(gdb)["one"]
            seen = [state(gdb), *(step(gdb) for _ in range(STEPS))]
            assert seen == plain
            assert calling.hits(gdb)["one"] == before + 1
        gdb.console("delete")
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", ["boosted", "auto"])
def test_several_steps_of_one_command_count_as_several(calling: Any, plain: list[State], rung: str) -> None:
    places = first_visits(plain)
    with calling.gdb() as gdb:
        for index in (1, 3):
            calling.add(gdb, f"p:at{index} {places[index]:#x}", rung)
        # Without symbols gdb takes what the function jumps to for one that it calls: nexti stays in front of that.
        for command, steps in (("stepi 6", 6), ("nexti 3", 3)):
            stop_at_entry(gdb, plain[0][0])
            before = calling.hits(gdb)
            gdb.console(command)
            gdb.wait_stop()
            found = state(gdb)
            if found == plain[steps - 1]:
                found = step(gdb)  # gdb has counted one that executed nothing
            assert found == plain[steps], command
            executed = [found[0] for found in plain[:steps]]
            expected = {f"at{index}": before[f"at{index}"] + executed.count(places[index]) for index in (1, 3)}
            assert calling.hits(gdb) == expected, command
        gdb.console("kprobe detach")


@pytest.mark.parametrize("command", ["until *", "advance *", "tbreak *"])
def test_a_place_inside_a_jump_is_come_to(calling: Any, plain: list[State], command: str) -> None:
    with calling.gdb() as gdb:
        at = of_the_body(calling, plain)
        calling.add(gdb, f"p:one {plain[at][0]:#x}")
        stop_at_entry(gdb, plain[0][0])
        before = calling.hits(gdb)["one"]
        gdb.console(f"{command}{plain[at + 1][0]:#x}")
        if command.startswith("tbreak"):
            gdb.cont()
        gdb.wait_stop()
        assert state(gdb) == plain[at + 1]
        assert calling.hits(gdb)["one"] == before + 1
        gdb.console("kprobe detach")


def test_a_handler_runs_once_for_a_place_that_is_stepped_to_and_from(calling: Any, plain: list[State]) -> None:
    with calling.gdb() as gdb:
        gdb.console("python from gdb_kprobe.gdbext import api; seen = []")
        gdb.console(f'python api.add("p:one {first_visits(plain)[2]:#x}", lambda hit: seen.append(hit.regs.ip))')
        stop_at_entry(gdb, plain[0][0])
        gdb.console("python seen.clear()")
        assert [state(gdb), *(step(gdb) for _ in range(STEPS))] == plain
        assert re.findall(r"\d+", gdb.console("python print(len(seen))")) == ["1"]
        gdb.console("kprobe detach")


@pytest.mark.parametrize("rung", ["boosted", "auto"])
def test_with_very_many_places_single_steps_are_exact_and_several_lose_no_hit(
    calling: Any, plain: list[State], rung: str
) -> None:
    """Of several steps in one command some are of our code, where the functions are others than at the beginning."""
    inner = calling.snapshot.guest.kallsyms.address("__do_sys_getpriority")
    [first] = [at for at, found in enumerate(plain) if found[0] == inner]
    with calling.gdb() as gdb:
        gdb.console(f"set kprobe strategy {rung}")
        assert int(gdb.console("kprobe add 'vfs_*'", timeout=120).split()[0]) > MOST_PLACES
        one = calling.add(gdb, f"p:one {plain[first + 1][0]:#x}", rung)
        assert one["rung"] == ("optimized" if rung == "auto" else rung)
        calling.touched |= calling.patched(gdb)
        stop_at_entry(gdb, plain[0][0])
        before = calling.hits(gdb)["one"]
        assert [state(gdb), *(step(gdb) for _ in range(STEPS))] == plain
        assert calling.hits(gdb)["one"] == before + 1
        for steps in (first + 2, first + 3, first + 6, 1000):
            stop_at_entry(gdb, plain[0][0])
            before = calling.hits(gdb)["one"]
            gdb.console(f"stepi {steps}")
            gdb.wait_stop(300)
            pc = state(gdb)[0]
            assert pc < 1 << 63 or any(pc in text for text in calling.snapshot.guest.text_ranges()), hex(pc)
            hits = calling.hits(gdb)["one"] - before
            assert hits == 1 if steps < 1000 else hits > 1
        gdb.console("kprobe detach", timeout=120)
