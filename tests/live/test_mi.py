"""Every MI command of the plugin answers with data, and every failure with a message of ours."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from gdb_kprobe.testing import GdbCommandError, GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

CALLS = 7

PROBE = {
    *("name", "definition", "addr", "asked", "bytes", "place", "state", "rung", "family", "insn"),
    *("hits", "missed", "saved", "redirected", "error"),
}
ANSWERS = {
    "attach": {"guest", "region", "messages", "refused", "seconds"},
    "adopt": {"probes", "refused"},
    "detach": {"restored", "unmapped", "problems", "notes"},
    "add": {"probe"},
    "list": {"probes"},
    "plan": {"plan"},
    "delete": {"deleted"},
    "enable": {"probes"},
    "disable": {"probes"},
    "stats": {"tables"},
}
"""The keys of each command's answer."""

MISTAKES = {
    "attach": [
        ("nosuch", "no profile named"),
        ("--dispatch never", "invalid choice"),
        ("a b", "unrecognized arguments"),
    ],
    "adopt": [("nosuch", "no profile named"), ("a b", "unrecognized arguments")],
    "detach": [("", "not attached"), ("now", "unrecognized arguments")],
    "add": [("", "where? nothing was given"), ('"p:x vfs_read a=%rdi"', "Invalid register name")],
    "list": [("all", "unrecognized arguments")],
    "plan": [("", "where? nothing was given"), ("vfs_read", "not attached")],
    "delete": [("", "which probe?"), ("nobody", "there is no probe named nobody")],
    "enable": [("", "which probe?"), ("nobody", "there is no probe named nobody")],
    "disable": [("", "which probe?"), ("nobody", "there is no probe named nobody")],
    "stats": [("", "not attached"), ("--interval nan", "not a number of seconds")],
}
"""Arguments of each command that are wrong while nothing is attached, and what is said."""


def answer(gdb: GdbMi, command: str, arguments: str = "") -> Any:
    found = gdb.command(f"-kprobe-{command} {arguments}", timeout=60)
    assert set(found) == ANSWERS[command], command
    return found


def refused(gdb: GdbMi, command: str, arguments: str) -> str:
    with pytest.raises(GdbCommandError) as caught:
        gdb.command(f"-kprobe-{command} {arguments}")
    assert "Python" not in str(caught.value)
    return str(caught.value)


def registered(gdb: GdbMi) -> set[str]:
    return set(gdb.console("python from gdb_kprobe.gdbext.commands import mi; print(*mi.COMMANDS)").split())


def test_every_mistake_is_told_of() -> None:
    with GdbMi() as gdb:
        assert registered(gdb) == set(ANSWERS) == set(MISTAKES)
        for command, mistakes in MISTAKES.items():
            for arguments, said in mistakes:
                assert said in refused(gdb, command, arguments), (command, arguments)
        assert gdb.command("-kprobe-list")["probes"] == []


def test_every_command_answers(probed: Boot) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    asked: set[str] = set()

    def ask(command: str, arguments: str = "") -> Any:
        asked.add(command)
        return answer(gdb, command, arguments)

    with guest.gdb(attach=False) as gdb:
        noted = ask("add", '"p:first __x64_sys_getpriority"')["probe"]
        assert set(noted) == PROBE
        assert noted["state"] == "pending"
        ask("add", '"p:wrong no_such_function"')
        attached = ask("attach", f"--dispatch guest {guest.profile}")
        assert attached["guest"].startswith("Linux ")
        assert [one["definition"] for one in attached["refused"]] == ["p:kprobes/wrong no_such_function"]
        assert ask("delete", "wrong") == {"deleted": ["wrong"]}
        assert "attached already" in refused(gdb, "attach", guest.profile)
        assert "attached already" in refused(gdb, "adopt", guest.profile)
        second = ask("add", '"p:second __do_sys_getpriority"')["probe"]
        assert set(second) == PROBE
        assert second["state"] == "armed"
        assert "there is a probe named second already" in refused(gdb, "add", '"p:second vfs_read"')
        assert "no such symbol" in refused(gdb, "add", "no_such_function")
        plan = ask("plan", guest.spelled("__x64_sys_getpriority+entry"))["plan"]
        assert plan["rung"] == "boosted" or plan["rung"] == "optimized"
        assert "not an instruction boundary" in refused(gdb, "plan", "__x64_sys_getpriority+1")
        listed = ask("list")["probes"]
        assert [probe["name"] for probe in listed] == ["first", "second"]
        guest.touched |= guest.patched(gdb)
        gdb.cont()
        assert vm.run(f"workload syscall {GETPRIORITY} {CALLS}")[0] == 0
        (table,) = ask("stats", "--interval 0.1")["tables"]
        assert {row["hits"] for row in table["probes"]} == {str(CALLS)}
        for command in ("add", "plan", "delete", "detach"):
            arguments = {"add": "vfs_read", "plan": "vfs_read", "delete": "first", "detach": ""}[command]
            assert "the guest is running" in refused(gdb, command, arguments), command
        gdb.interrupt()
        (probe,) = ask("disable", "second")["probes"]
        assert probe["state"] == "disabled"
        (probe,) = ask("enable", "second")["probes"]
        assert probe["state"] == "armed"
        # Armed, as all are that somebody deletes.
        assert ask("delete", "second") == {"deleted": ["second"]}
        assert "there is no probe named second" in refused(gdb, "delete", "second")
        assert [probe["name"] for probe in ask("list")["probes"]] == ["first"]
        assert ask("detach")["restored"] == "1"
        gdb.console("detach")

    with guest.gdb(watchdog=False) as gdb:
        guest.add(gdb, "p:left __x64_sys_getpriority")
        gdb.cont()
        assert vm.run(f"workload syscall {GETPRIORITY} {CALLS}")[0] == 0
        gdb.signal(signal.SIGKILL)
        gdb.wait_exit()
    with guest.gdb(attach=False) as gdb:
        (adopted,) = ask("adopt", guest.profile)["probes"]
        assert set(adopted) == PROBE
        assert (adopted["name"], adopted["hits"]) == ("left", str(CALLS))
        assert asked == registered(gdb) == set(ANSWERS)
        assert ask("delete", "all") == {"deleted": ["left"]}
        gdb.console("kprobe detach")
