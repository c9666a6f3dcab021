"""Undo a session over a connection of our own, when gdb's is lost or can no longer be used."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from gdb_kprobe.errors import GuestResetError, ReportedError, TargetError
from gdb_kprobe.session.recovery.orphans import Leftover
from gdb_kprobe.session.session import Session
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub

ENDED = "kprobe: QEMU has ended, and the guest with it: there is nothing to restore."
"""What :func:`rescue` says of a guest that is no more."""


def cut(descriptor: int) -> None:
    """Shut the socket *descriptor* down for both sides, so that the stub takes another client."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def rescue(session: Session, stub: QemuStub, address: str, has_ended: Callable[[], bool] = lambda: False) -> str:
    """Connect to *address* anew, restore the guest, let it run; returns what to tell the user.

    *has_ended* tells whether QEMU is no more, which is asked when it does not answer. Never raises for a guest that
    cannot be reached: then the answer names every site that is left armed.
    """
    sites = session.table.armed()
    places = ", ".join(str(session.guest.place_of(site.addr)) for site in sites)
    try:
        # Left by an error, the socket is just closed: the machine stays stopped, at no hit that nobody handles.
        with RspSocket(address) as channel:
            stub.use_channel(channel)
            try:
                done = session.detach()
            except GuestResetError as error:
                channel.detach()
                return f"kprobe: {error.message}; the guest runs."
            if done.still_armed:
                raise TargetError("; ".join(done.problems))
            channel.detach()
    except (ReportedError, TimeoutError) as error:
        if has_ended():
            return ENDED
        if not sites:
            return f"kprobe: the connection is lost and cannot be made again ({error}); no probe was armed."
        return (
            f"kprobe: the guest cannot be restored: {error}\n"
            f"kprobe: these sites are still armed in it: {places}\n"
            "kprobe: it stops, or dies, at the next hit. 'kprobe attach' restores them once the stub answers."
        )
    lines = [f"kprobe: connected to {address} again: {done.restored} site(s) restored, the guest runs."]
    lines += [f"kprobe: left alone: {problem}" for problem in done.problems]
    lines += [f"kprobe: {note}" for note in done.notes]
    return "\n".join(lines)


def rescue_leftover(leftover: Leftover, stub: QemuStub, address: str) -> str:
    """The same for a guest that another session has left armed."""
    try:
        with RspSocket(address) as channel:
            stub.use_channel(channel)
            notes = leftover.restore(stub)
            channel.detach()
    except (ReportedError, TimeoutError) as error:
        return (
            f"kprobe: the guest cannot be restored: {error}\n"
            f"kprobe: {leftover.sites} site(s) of an earlier session are still armed in it; 'kprobe attach' "
            "restores them once the stub answers."
        )
    lines = [f"kprobe: connected to {address} again: {leftover.sites} site(s) restored, the guest runs."]
    lines += [f"kprobe: {note}" for note in notes]
    return "\n".join(lines)
