"""gdb's connection to a gdbstub: whether there is one, and how one is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import gdb

from gdb_kprobe.config.profile import Profile
from gdb_kprobe.errors import ConnectionLostError
from gdb_kprobe.target.rsp import is_served
from gdb_kprobe.target.socket_peer import clients_of

PATIENCE = 0.5
"""Seconds in which a client of the stub that is leaving is gone, and a QEMU that is ending has ended."""
_MOST_PATIENCE = 10.0
"""The same where no process is known to be the client: QEMU may be busy."""


def is_connected() -> bool:
    """Whether gdb is connected to a stub."""
    return isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection)


def connect(profile: Profile) -> None:
    """Connect gdb to the profile's gdbstub, if it is not connected already.

    :raises ConnectionLostError: no stub answers there.
    """
    if is_connected():
        return
    # A connection that was ended a moment ago, perhaps our own, is QEMU's until it has looked.
    started = time.monotonic()
    while is_served(profile.gdbstub):
        waited = time.monotonic() - started
        who = _named_clients(profile.gdbstub) if waited > PATIENCE else ""
        if who or waited > _MOST_PATIENCE:
            raise ConnectionLostError(
                f"the gdbstub at {profile.gdbstub} has a client already, and serves only one{who}",
                "detach the other gdb first",
            )
        time.sleep(0.01 if waited < PATIENCE else 0.1)  # to look for clients is to look at all processes
    try:
        with _one_try():
            gdb.execute(f"target remote {profile.gdbstub}", to_string=True)
    except gdb.error as error:
        raise ConnectionLostError(
            f"cannot connect to the gdbstub at {profile.gdbstub}: {error}",
            "is QEMU running with -gdb, and no other gdb connected (the stub serves one client)? The address is "
            f"'gdbstub' in {profile.path}",
        ) from error


def _named_clients(address: str) -> str:
    """Who they are, as far as /proc tells: for the end of a message."""
    clients = [f"{command[:60] or 'a process'} (pid {pid})" for pid, command in clients_of(address)]
    return f": {', '.join(clients)}" if clients else ""


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """Have gdb ask a TCP port once: it asks one that refuses again and again for 15 seconds."""
    again = gdb.parameter("tcp auto-retry")
    gdb.execute("set tcp auto-retry off", to_string=True)
    try:
        yield
    finally:
        gdb.execute(f"set tcp auto-retry {'on' if again else 'off'}", to_string=True)
