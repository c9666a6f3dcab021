"""A Ctrl-C in any moment of a callback."""

from __future__ import annotations

import _thread
import dis
import os
import subprocess
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import pytest

from gdb_kprobe.gdbext.signals import InterruptWatch, sigint_takers, uninterrupted, uninterruptible

NOWHERE = ("NOP", "NOT_TAKEN")
"""Instructions that do nothing: no signal is looked for there, and some are in no row of the exception table."""


class InterruptAt:
    """Raises a KeyboardInterrupt at the instruction number *at* that the callback itself executes, from 0 on."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_name != "run":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and dis.opname[frame.f_code.co_code[frame.f_lasti]] not in NOWHERE:
            if not self.left:
                self.left = -1
                raise KeyboardInterrupt
            self.left -= 1
        return self


def test_an_interrupt_at_any_instruction_is_told_and_loses_no_event() -> None:
    at = 0
    while True:
        told: list[bool] = []
        callback = uninterruptible(told.append)
        trace = InterruptAt(at)
        sys.settrace(trace)
        try:
            callback("event")
        finally:
            sys.settrace(None)
        if trace.left >= 0:
            break  # it does not execute so many
        assert told in ([True], [False, True]), f"at instruction {at}"
        told.clear()
        callback("another one")
        assert told == [False], f"after an interrupt at instruction {at}"
        at += 1
    assert at > 8
    assert told == [False]


def test_an_interrupt_that_is_pending_is_told() -> None:
    told: list[bool] = []

    def note(interrupted: bool) -> None:
        told.append(interrupted)
        if len(told) == 1:
            _thread.interrupt_main()  # raised when this returns, or before
            for _ in range(10):
                pass

    uninterruptible(note)("event")
    assert told == [False, True]


def test_an_exception_is_printed_and_the_next_event_served(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[bool] = []

    def fail(interrupted: bool) -> None:
        told.append(interrupted)
        raise ValueError("once" if len(told) == 1 else "again")

    callback = uninterruptible(fail)
    callback("event")
    callback("event")
    assert told == [False, False]
    printed = capsys.readouterr().err
    assert "ValueError: once" in printed
    assert "ValueError: again" in printed


def test_an_interrupt_while_an_exception_is_printed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def fail(interrupted: bool) -> None:
        told.append(interrupted)
        if len(told) == 1:
            raise ValueError("once")

    def interrupted_print(error: Exception) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(traceback, "print_exception", interrupted_print)
    callback = uninterruptible(fail)
    callback("event")
    assert told == [False, True]
    callback("another one")
    assert told == [False, True, False]


HELD = """
import os, signal, socket, time
from gdb_kprobe.gdbext.signals import InterruptWatch, ctrl_c_is_pending, raise_ctrl_c, uninterrupted
ours, stub = socket.socketpair()
watch = InterruptWatch(ours.fileno())
with uninterrupted():
    {resume}
    os.kill(os.getpid(), signal.SIGINT)
    stub.settimeout({seconds})
    try:
        print("asked", stub.recv(1))
    except TimeoutError:
        print("pending", ctrl_c_is_pending())
    try:
        raise_ctrl_c()
    except KeyboardInterrupt:
        print("raised")
watch.close()
"""


# The loop is in a function: CPython 3.13 has the jump back of `while CONDITION` outside of the exception table, so
# that a KeyboardInterrupt there would pass the `except` around it.
IN_A_HANDLER = """
import os, signal, socket, time
from gdb_kprobe.gdbext.signals import InterruptWatch, uninterrupted
ours, stub = socket.socketpair()
stub.settimeout({seconds})
watch = InterruptWatch(ours.fileno())
def spin():
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pass
with uninterrupted():
    watch.resumed()
    for _ in range(2):
        try:
            with watch.handed_over():
                os.kill(os.getpid(), signal.SIGINT)
                spin()
        except KeyboardInterrupt:
            print("raised")
    try:
        print("asked", stub.recv(1))
    except TimeoutError:
        print("not asked")
    {behind}
watch.close()
"""


def run(script: str) -> list[str]:
    done = subprocess.run(
        ["env", "--default-signal=INT", sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def heard(resume: str, seconds: float) -> list[str]:
    """What becomes of a SIGINT that comes while a command holds it back."""
    return run(HELD.format(resume=resume, seconds=seconds))


def test_in_a_handler_a_ctrl_c_is_raised_there_and_asks_the_stub_for_nothing() -> None:
    assert run(IN_A_HANDLER.format(seconds=0.3, behind="pass")) == ["raised", "raised", "not asked"]


def test_behind_a_handler_it_asks_the_stub_again() -> None:
    behind = "os.kill(os.getpid(), signal.SIGINT); stub.settimeout(30); print('asked', stub.recv(1))"
    assert run(IN_A_HANDLER.format(seconds=0.1, behind=behind))[-1] == "asked b'\\x03'"


def test_while_the_guest_is_stopped_a_ctrl_c_is_the_commands() -> None:
    assert heard("pass", 0.3) == ["pending True", "raised"]


def test_while_the_guest_runs_it_is_the_watchs_which_asks_the_stub() -> None:
    assert heard("watch.resumed()", 30) == ["asked b'\\x03'"]


def test_once_it_is_given_back_it_is_the_commands_again() -> None:
    gives_back = "watch.resumed(); watch.stopped(); watch.release(); signal.pthread_sigmask(signal.SIG_BLOCK, [2])"
    assert heard(gives_back, 0.3) == ["pending True", "raised"]


def test_threads_that_may_be_given_a_ctrl_c_are_found() -> None:
    over = threading.Event()
    before = sigint_takers()
    taker = threading.Thread(target=over.wait, name="taker")
    other = threading.Thread(target=over.wait, name="other")
    reading, writing = os.pipe()
    watch = InterruptWatch(writing)
    try:
        taker.start()
        with uninterrupted():
            other.start()
        found = sigint_takers()
        assert {number: name for number, name in found.items() if number not in before} == {taker.native_id: "taker"}
        watch.resumed()  # now our own thread waits for it
        assert sigint_takers() == found
    finally:
        over.set()
        watch.close()
        for thread in (taker, other):
            thread.join()
        os.close(reading)
        os.close(writing)
    assert sigint_takers() == before
