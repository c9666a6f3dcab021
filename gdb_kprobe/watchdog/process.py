"""The watchdog itself: ``python -m gdb_kprobe.watchdog.process ADDRESS``, with the pipe as its input."""

from __future__ import annotations

import os
import sys
import time

from gdb_kprobe.errors import ReportedError
from gdb_kprobe.session.recovery.orphans import find_leftover
from gdb_kprobe.target.rsp import RspSocket, is_served
from gdb_kprobe.target.stub import QemuStub
from gdb_kprobe.watchdog.states import State

_PATIENCE = 5.0
"""Seconds in which QEMU has seen that gdb is gone; a client that it serves then is another gdb."""
_QUEUED = 1e6
"""Seconds to wait for an answer: a connection that was given up while another is served would stop the machine, for
nobody, as soon as that one ends.
"""
_TRIES = 3


def main() -> int:
    """Wait for the end of gdb, and see to the guest; returns the exit status."""
    state = last_state(sys.stdin.fileno())
    if state is not State.WATCHED:
        return 0
    told = ""
    for _ in range(_TRIES):
        try:
            told = see_to(sys.argv[1])
            break
        except Exception as error:  # whatever it is, a second try may do, and nothing else will
            told = f"gdb is gone, and the guest could not be seen to: {error}"
    if told:
        print(f"kprobe: {told}.", file=sys.stderr, flush=True)
    return 0


def last_state(pipe: int) -> State:
    """What gdb said last before it ended, or before all was done."""
    state = State.DONE
    while heard := os.read(pipe, 4096):
        state = State(heard[-1:])
        if state is State.DONE:
            break
    return state


def see_to(address: str) -> str:
    """Have the guest at *address* run on without gdb; returns what to tell the user.

    What gdb was doing with a vCPU is undone or finished, and QEMU's breakpoints go. Probes that only gdb can step get
    their text back, all that are an int3 where the guest has no dispatcher of its own; hits of others that need gdb are
    missed, and the rest goes on.

    :raises ReportedError: the stub does not do as asked, or answers no more.
    """
    deadline = time.monotonic() + _PATIENCE
    while is_served(address):
        if time.monotonic() > deadline:
            return ""  # another gdb was quicker: it is told what there is, and may be at it already
        time.sleep(0.01)
    problems: tuple[str, ...] = ()
    with RspSocket(address, _QUEUED) as channel:
        machine = QemuStub(channel)
        machine.drop_breakpoints()
        leftover = find_leftover(machine)
        if leftover is not None:
            try:
                problems = leftover.let_go(machine)
            except ReportedError as error:
                if not leftover.dispatches_itself:
                    raise
                problems = (str(error),)  # a vCPU goes on from anywhere by itself
        channel.detach()
    if leftover is None:
        return "gdb is gone; the guest runs on"
    return "; ".join(
        (
            f"gdb is gone; the guest runs on with {leftover.sites} site(s) that were probed: what needs gdb is missed, "
            "or restored; 'kprobe adopt' goes on with all",
            *problems,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
