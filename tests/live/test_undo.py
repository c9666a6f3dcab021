"""However a session ends, the guest goes on with its original text.

Each test arms probes of both rungs, lets them be hit, ends the session in one way, and then has the workload come to
its full count. That the text is as it was, the log clean and the guest running is checked by the fixture.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbDiedError, GdbMi, GdbTerminal, GdbTimeoutError
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.inside import CUT
from tests.support.probed import Boot, Booted, MakeProbed, Probed

pytestmark = pytest.mark.live


CALLS = 100_000
"""Calls of a workload: for the most part made at full speed, after the probes are gone."""

PROBES = (
    ("p:boosted __x64_sys_getpriority", "boosted"),
    ("p:stepped __x64_sys_getpriority+behind", "single-step"),
    ("p:inner __do_sys_getpriority", "boosted"),
)
COUNTING = (("p:boosted __x64_sys_getpriority", "boosted"), ("p:inner __do_sys_getpriority", "boosted"))
"""Probes that the guest's own dispatcher handles alone."""

Probes = tuple[tuple[str, str], ...]


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.full), 2], ids=["1cpu", "2cpu"])
def guest(probed: Boot, request: pytest.FixtureRequest) -> Any:
    return probed(GuestSpec(vcpus=request.param))


on_both = pytest.mark.parametrize("guest", [1, 2], ids=["1cpu", "2cpu"], indirect=True)


class Load:
    """One workload for each vCPU, in the background of the guest."""

    def __init__(self, guest: Probed) -> None:
        self._vm = guest.guest
        # One command: the guest is slow once the first workload hits probes.
        call = f"workload syscall {GETPRIORITY} {CALLS}"
        self._job = self._vm.spawn(" & ".join([call] * self._vm.spec.vcpus) + " & wait")

    def finish(self) -> None:
        """All of them come to their full count."""
        status, output = self._vm.finish(self._job)
        assert status == 0
        assert output.count(f"workload: {CALLS} calls done") == self._vm.spec.vcpus, output


def arm(guest: Probed, gdb: GdbMi, probes: Probes = PROBES) -> None:
    for definition, strategy in probes:
        guest.add(gdb, definition, strategy)


def a_moment() -> None:
    """Let hits come for a time that is another at each run."""
    time.sleep(random.uniform(0.1, 0.4))


def wait_until_all_are_hit(gdb: GdbMi) -> None:
    """While the guest runs: the counters are in memory that it shares with the host."""
    wait_for(lambda: all(probe["hits"] != "0" for probe in gdb.command("-kprobe-list")["probes"]), seconds=30)


def text_of(gdb: GdbMi) -> str:
    return "\n".join(gdb.transcript)


@contextlib.contextmanager
def under_load(
    guest: Probed, *, stop: bool, dispatch: str = "auto", probes: Probes = PROBES, watchdog: bool = True
) -> Iterator[tuple[GdbMi, Load]]:
    """A gdb with armed probes that are being hit; stopped by Ctrl-C, or running in the background."""
    with guest.gdb(dispatch=dispatch, watchdog=watchdog) as gdb:
        arm(guest, gdb, probes)
        gdb.cont()
        load = Load(guest)
        wait_until_all_are_hit(gdb)
        a_moment()
        if stop:
            gdb.interrupt()
            assert all(guest.hits(gdb).values())
        yield gdb, load


@contextlib.contextmanager
def at_terminal(guest: Probed, command: str) -> Iterator[tuple[GdbTerminal, Load]]:
    """A gdb at a terminal with armed probes that are being hit, in a foreground *command*."""
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        for definition, strategy in PROBES:
            gdb.command(f"set kprobe strategy {strategy}")
            assert "armed" in gdb.command(guest.spelled(f"kprobe {definition}"))
        guest.touched |= {int(line.split()[0], 16) for line in gdb.command("kprobe list").splitlines()[1:]}
        gdb.type(command)
        gdb.wait_text("Tracing" if "trace" in command else "Continuing")
        load = Load(guest)
        a_moment()
        try:
            yield gdb, load
        except BaseException:
            print(gdb.transcript[-6000:])
            raise


# -- commands ---------------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("command", ["kprobe detach", "detach"])
def test_a_command_that_detaches(guest: Probed, command: str) -> None:
    with under_load(guest, stop=True) as (gdb, load):
        assert "3 site(s) restored" in gdb.console(command)
        load.finish()


@on_both
def test_detach_over_mi(guest: Probed) -> None:
    # gdb 13 gives no notice of -target-detach before it is done. But a stopped guest has its own text.
    with under_load(guest, stop=True) as (gdb, load):
        gdb.command("-target-detach")
        load.finish()


def test_disconnect_leaves_the_guest_stopped_with_its_own_text(guest: Probed) -> None:
    # gdb's disconnect does not resume the machine: that is what tells it from detach.
    with under_load(guest, stop=True) as (gdb, load):
        assert "3 site(s) restored" in gdb.console("disconnect")
        guest.guest.cont()
        load.finish()


def test_kill_restores_the_text_before_qemu_ends(booted_guest: Booted, make_probed: MakeProbed) -> None:
    guest = make_probed(booted_guest(GuestSpec(vcpus=2)))
    with under_load(guest, stop=True) as (gdb, _):
        with contextlib.suppress(GdbCommandError):  # QEMU may be gone before gdb has hung up
            gdb.console("kill")
        assert "3 site(s) restored" in text_of(gdb)
    wait_for(lambda: not guest.guest.alive())  # QEMU ends at gdb's kill, right after its answer
    assert guest.snapshot.leftovers(guest.touched) == []


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "running"])
@pytest.mark.parametrize("command", ["-gdb-exit", '-interpreter-exec console "quit"'])
def test_gdb_ends_by_a_command(guest: Probed, command: str, stop: bool) -> None:
    with under_load(guest, stop=stop) as (gdb, load):
        with contextlib.suppress(GdbDiedError):
            gdb.command(command)
        assert gdb.wait_exit() == 0
        load.finish()


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "running"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_gdb_ends_by_a_signal(guest: Probed, number: signal.Signals, stop: bool) -> None:
    with under_load(guest, stop=stop) as (gdb, load):
        gdb.signal(number)
        gdb.wait_exit()
        load.finish()


@pytest.mark.parametrize("command", ["continue", "kprobe trace", "continue &"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_gdb_ends_by_a_signal_at_a_terminal(guest: Probed, number: signal.Signals, command: str) -> None:
    with at_terminal(guest, command) as (gdb, load):
        gdb.signal(number)
        gdb.wait_exit()
        load.finish()


def quit_at_the_prompt(gdb: GdbTerminal) -> None:
    """Press Ctrl-C until gdb answers: it forgets one that comes while it gets ready to read after the last."""
    for _ in range(5):
        gdb.press_ctrl_c()
        with contextlib.suppress(GdbTimeoutError):
            assert "Quit" in gdb.wait_prompt(2)
            return
    raise AssertionError(f"gdb does not answer a Ctrl-C: {gdb.transcript[-200:]}")


def test_ctrl_c_at_the_prompt_then_quit(guest: Probed) -> None:
    with at_terminal(guest, "continue") as (gdb, load):
        gdb.press_ctrl_c()
        gdb.wait_prompt()
        for _ in range(3):
            quit_at_the_prompt(gdb)
        gdb.type("quit")
        assert gdb.wait_exit() == 0
        load.finish()


def test_quit_while_running_in_the_background(guest: Probed) -> None:
    with at_terminal(guest, "continue &") as (gdb, load):
        gdb.type("quit")
        assert gdb.wait_exit() == 0
        load.finish()


def test_the_terminal_goes_away(guest: Probed) -> None:
    with at_terminal(guest, "continue") as (gdb, load):
        gdb.hang_up()
        gdb.wait_exit()
        load.finish()


# -- handlers ---------------------------------------------------------------------------------------------------------


def source(gdb: GdbMi | GdbTerminal, path: Path, text: str) -> None:
    path.write_text(f"from gdb_kprobe.gdbext import api as kprobe\n{text}")
    gdb.console(f"source {path}") if isinstance(gdb, GdbMi) else gdb.command(f"source {path}")


@on_both
def test_an_exception_in_a_handler_takes_its_probe_away(guest: Probed, tmp_path: Path) -> None:
    with guest.gdb() as gdb:
        source(
            gdb,
            tmp_path / "handlers.py",
            guest.spelled("""
@kprobe.probe("p:bad __x64_sys_getpriority")
def bad(hit):
    if hit.hit == 5:
        raise ValueError("five is too many")

@kprobe.probe("p:good __x64_sys_getpriority+behind")
def good(hit):
    pass
"""),
        )
        guest.touched |= {int(probe["addr"], 16) for probe in gdb.command("-kprobe-list")["probes"]}
        gdb.cont()
        job = guest.guest.spawn(f"workload syscall {GETPRIORITY} 20")
        assert guest.guest.finish(job)[0] == 0
        # Its text is back already: what is left of differences is the other probe's instruction.
        differing = guest.probed_bytes()
        gdb.interrupt()
        probes = {probe["name"]: probe for probe in gdb.command("-kprobe-list")["probes"]}
        assert (probes["bad"]["state"], probes["bad"]["hits"], probes["bad"]["missed"]) == ("disabled", "5", "1")
        assert (probes["good"]["state"], probes["good"]["hits"]) == ("armed", "20")
        assert "five is too many" in probes["bad"]["error"]
        # Told when it happened, not only on request.
        told = text_of(gdb)
        assert "bad" in told
        assert "five is too many" in told.split("-kprobe-list")[1]
        good = int(probes["good"]["addr"], 16)
        # A jump is there, in place of the function's own: not all of its bytes are others.
        assert set() < differing <= set(range(good, good + int(probes["good"]["bytes"])))
        gdb.console("kprobe detach")


def test_ctrl_c_interrupts_a_handler(guest: Probed, tmp_path: Path) -> None:
    with GdbTerminal(guest.environment) as gdb:
        gdb.command(f"kprobe attach {guest.profile}")
        source(
            gdb,
            tmp_path / "handlers.py",
            """
@kprobe.probe("p:slow __x64_sys_getpriority")
def slow(hit):
    if hit.hit == 3:
        print("looping")
        while True:
            pass
""",
        )
        guest.touched |= {int(line.split()[0], 16) for line in gdb.command("kprobe list").splitlines()[1:]}
        gdb.type("continue")
        gdb.wait_text("Continuing.")
        job = guest.guest.spawn(f"workload syscall {GETPRIORITY} 50", wait=False)
        gdb.wait_text("looping")
        gdb.press_ctrl_c()
        gdb.wait_prompt()
        assert (
            gdb.command("python print(kprobe.get('slow').place.at == int(gdb.parse_and_eval('(unsigned long)$pc')))")
            == "True"
        )
        gdb.type("continue")
        gdb.wait_text("Continuing.")
        assert guest.guest.finish(job)[0] == 0
        gdb.press_ctrl_c()
        gdb.wait_prompt()
        assert gdb.command("python print(kprobe.get('slow').hits)") == "50"
        gdb.command("kprobe detach")


# -- the connection ---------------------------------------------------------------------------------------------------


def touch_the_guest(gdb: GdbMi) -> None:
    """Have gdb find out that its connection is gone."""
    with contextlib.suppress(GdbCommandError):
        gdb.console("maintenance flush register-cache")
        gdb.console("info registers rip")


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "running"])
def test_a_lost_connection_is_made_again_and_the_guest_restored(guest: Probed, stop: bool) -> None:
    with under_load(guest, stop=stop) as (gdb, load):
        gdb.console(CUT)
        if stop:
            touch_the_guest(gdb)
        load.finish()
        gdb.console("echo")
        assert "3 site(s) restored, the guest runs" in text_of(gdb)
        gdb.console(f"kprobe attach {guest.profile}")
        gdb.console("kprobe detach")


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "running"])
def test_a_connection_that_cannot_be_made_again_names_the_sites_and_attach_restores(guest: Probed, stop: bool) -> None:
    path = Path(guest.guest.gdb_address)
    hidden = path.with_name("hidden")
    with under_load(guest, stop=stop) as (gdb, load):
        path.rename(hidden)
        try:
            gdb.console(CUT)
            if stop:
                touch_the_guest(gdb)
            else:
                wait_for(lambda: "still armed" in text_of(gdb) or gdb.console("echo"))
        finally:
            hidden.rename(path)
        told = text_of(gdb)
        assert "cannot be restored: cannot connect" in told
        places = "__x64_sys_getpriority+entry __x64_sys_getpriority+behind __do_sys_getpriority+entry"
        for name in guest.spelled(places).split():
            assert name in told.split("still armed")[1], name
        answer = gdb.console(f"kprobe attach {guest.profile}")
        assert ("stopped with its own text" if stop else "3 site(s) armed; their text is restored") in answer
        gdb.console("kprobe detach")
        load.finish()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- a gdb that is killed ---------------------------------------------------------------------------------------------


def kill_gdb(guest: Probed, *, stop: bool) -> Load:
    """End gdb, whose stub dispatches, and that has no watchdog, in a way that it cannot notice.

    When it was stopped, the guest has its own text. Else the probes are armed with nobody to dispatch them, and the
    guest stops at the next hit.
    """
    with under_load(guest, stop=stop, dispatch="stub", watchdog=False) as (gdb, load):
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    wait_for(lambda: not guest.guest.is_running())
    patched = guest.probed_bytes()
    assert sum(addr - 1 not in patched for addr in patched) == (0 if stop else 3)
    return load


@on_both
@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "running"])
def test_attach_restores_what_a_killed_gdb_left(guest: Probed, stop: bool) -> None:
    load = kill_gdb(guest, stop=stop)
    with guest.gdb(attach=False) as gdb:
        told = gdb.console(f"kprobe attach {guest.profile}")
        if stop:
            assert "an earlier session ended without a detach, while the guest was stopped with its own text" in told
        else:
            assert "an earlier session left 3 site(s) armed; their text is restored" in told
        # The session is a good one: probes can be armed again, at the very same places.
        arm(guest, gdb)
        gdb.cont()
        wait_until_all_are_hit(gdb)
        gdb.interrupt()
        assert all(guest.hits(gdb).values())
        gdb.console("kprobe detach")
        load.finish()


@pytest.mark.parametrize("watchdog", [True, False], ids=["watchdog", "alone"])
def test_a_guest_that_dispatches_by_itself_runs_on_without_gdb(guest: Probed, watchdog: bool) -> None:
    with under_load(guest, stop=False, probes=COUNTING, watchdog=watchdog) as (gdb, load):
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    load.finish()
    assert guest.guest.is_running()
    assert guest.probed_bytes() == guest.touched
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        assert "left 2 site(s) armed in this guest, which dispatches their hits by itself" in text_of(gdb)
        gdb.console("detach")
    again = Load(guest)
    again.finish()
    assert guest.probed_bytes() == guest.touched, "who only looked has left the probes alone"
    with guest.gdb() as gdb:
        assert "an earlier session left 2 site(s) armed; their text is restored" in text_of(gdb)
        gdb.console("kprobe detach")


def test_hits_that_need_a_host_are_missed_without_one(guest: Probed) -> None:
    with under_load(guest, stop=False, watchdog=False) as (gdb, load):
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    # The breakpoint of the killed gdb is still in QEMU, and stops the machine at the next hit for the host.
    wait_for(lambda: not guest.guest.is_running())
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        gdb.console("detach")
    load.finish()
    assert guest.probed_bytes() == guest.touched
    with guest.gdb() as gdb:
        assert "an earlier session left 3 site(s) armed; their text is restored" in text_of(gdb)
        gdb.console("kprobe detach")


@pytest.mark.parametrize("by_mi", [True, False], ids=["mi", "cli"])
def test_connecting_by_hand_guards_what_a_killed_gdb_left(guest: Probed, by_mi: bool) -> None:
    load = kill_gdb(guest, stop=False)
    address = guest.guest.gdb_address
    with guest.gdb(attach=False) as gdb:
        gdb.command(f"-target-select remote {address}") if by_mi else gdb.console(f"target remote {address}")
        assert "an earlier session left 3 site(s) armed in this guest" in text_of(gdb)
        gdb.cont()
        # The next hit stops to the prompt instead of killing the guest.
        gdb.wait_stop()
        assert "the guest ran into a probe of an earlier session" in text_of(gdb)
        assert "3 site(s) armed; their text is restored" in gdb.console(f"kprobe attach {guest.profile}")
        gdb.console("kprobe detach")
        load.finish()


@pytest.mark.parametrize("way", ["detach", "quit", "SIGTERM", "lost connection"])
def test_a_gdb_that_only_looked_does_not_leave_the_probes_behind(guest: Probed, way: str) -> None:
    load = kill_gdb(guest, stop=False)
    with guest.gdb(attach=False) as gdb:
        gdb.console(f"target remote {guest.guest.gdb_address}")
        match way:
            case "detach":
                assert "3 site(s) of an earlier session restored" in gdb.console("detach")
            case "quit":
                with contextlib.suppress(GdbDiedError):
                    gdb.console("quit")
            case "SIGTERM":
                gdb.signal(signal.SIGTERM)
                gdb.wait_exit()
            case _:
                gdb.console(CUT)
                touch_the_guest(gdb)
        load.finish()
    # The region is still mapped, and empty: the next attach takes it over.
    with guest.gdb() as gdb:
        gdb.console("kprobe detach")


def test_a_header_of_an_earlier_boot_is_cleared_and_no_text_touched(
    booted_guest: Booted, make_probed: MakeProbed
) -> None:
    vm = booted_guest(GuestSpec(vcpus=2))
    assert vm.reserved_base is not None
    guest = make_probed(vm)
    with contextlib.suppress(GdbDiedError):
        kill_gdb(guest, stop=False)
    magic = vm.read_ram(vm.reserved_base, 8)
    vm.reset(wait=False)
    vm.cont()
    vm.wait_ready()
    assert vm.read_ram(vm.reserved_base, 8) == magic == b"GDBKPROB", "reserved memory survives a reset"
    again = make_probed(vm)
    with again.gdb() as gdb:
        assert "a header of an earlier boot; it was cleared, no text was touched" in text_of(gdb)
        assert again.snapshot.leftovers() == []
        gdb.console("kprobe detach")
    again.check_untouched()
