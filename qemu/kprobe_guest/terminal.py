"""Join a terminal and a guest's serial console: all keys are the guest's, as with QEMU's own ``-serial mon:stdio``."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator

from kprobe_guest.vm import TICK, GuestVm

ESCAPE = 0x01
"""Ctrl-A. What follows is for us: QEMU's own escape character (qemu(1), "mux")."""

_END = frozenset(b"xX")
_HELP = b"\r\nCtrl-A x       end the guest\r\nCtrl-A Ctrl-A  send a Ctrl-A to the guest\r\nCtrl-A h       this help\r\n"


class Keys:
    """What was typed, sorted into what is the guest's and what is ours."""

    def __init__(self) -> None:
        self._escaped = False
        self.ended = False
        """Ctrl-A x was typed."""

    def sort(self, typed: bytes) -> tuple[bytes, bytes]:
        """What of *typed* goes to the guest, and what is to be shown to the user instead."""
        for_guest, shown = bytearray(), bytearray()
        for key in typed:
            if not self._escaped:
                self._escaped = key == ESCAPE
                if not self._escaped:
                    for_guest.append(key)
                continue
            self._escaped = False
            if key in _END:
                self.ended = True
                break
            if key in (ESCAPE, ord("a"), ord("A")):
                for_guest.append(ESCAPE)
            else:
                shown += _HELP
        return bytes(for_guest), bytes(shown)


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C at the end of the block, and none within it.

    The client of QEMU's monitor runs an event loop, in which an exception from outside gets lost or takes another form.
    """
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if not came:  # else it may be that a program just started has got the same Ctrl-C
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def how_to_end() -> str:
    """What the user is told before the console follows."""
    if sys.stdin.isatty():
        return "The guest's console follows. All keys are the guest's, Ctrl-C too; Ctrl-A x ends it, Ctrl-A h helps."
    return "The guest's console follows; Ctrl-C ends the guest."


def open_console(guest: GuestVm) -> socket.socket:
    """Connect to the guest's console: what it writes from now on is kept until it is read."""
    console = socket.socket(socket.AF_UNIX)
    console.connect(str(guest.paths.console))
    return console


def join_console(guest: GuestVm, console: socket.socket) -> None:
    """Show *console* until the guest ends, Ctrl-A x is typed, or a signal ends us.

    :raises KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    terminal = sys.stdin.fileno() if sys.stdin.isatty() else None
    keys = Keys()
    with contextlib.nullcontext() if terminal is None else _raw(terminal):
        while guest.alive() and not keys.ended:
            inputs = [console.fileno()] if terminal is None else [console.fileno(), terminal]
            ready = select.select(inputs, [], [], TICK)[0]
            if console.fileno() in ready:
                data = console.recv(1 << 16)
                if not data:
                    return
                os.write(sys.stdout.fileno(), data)
            if terminal in ready:
                typed = os.read(sys.stdin.fileno(), 1 << 12)
                if not typed:
                    return
                for_guest, shown = keys.sort(typed)
                console.sendall(for_guest)
                os.write(sys.stdout.fileno(), shown)


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """The terminal without echo, line editing and signals of its own: the guest's does all that."""
    saved = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, saved)
        os.write(sys.stdout.fileno(), b"\r\n")
