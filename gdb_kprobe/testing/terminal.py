"""A gdb with the plugin at a real terminal, typed to as a person does: the prompt, a foreground ``continue``, Ctrl-C.

What GDB/MI cannot show: there gdb never has the terminal, and Ctrl-C is a signal that a process sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from gdb_kprobe.config.installation import LOADER
from gdb_kprobe.testing.mi import REMOTE_TIMEOUT, GdbDiedError, GdbTimeoutError
from kprobe_guest.patience import patient, slowness

PROMPT = "(gdb) "
_CTRL_C = b"\x03"
_POLL = 0.05


class GdbTerminal:
    """A gdb at a pseudo-terminal of its own; a context manager, which ends gdb by ``quit``.

    *environment* is added to the process's own (profiles may refer to it).
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, load: bool = True) -> None:
        self._master, slave = pty.openpty()
        # Wide enough that neither readline nor gdb breaks a line.
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("<HHHH", 50, 2000, 0, 0))
        settings: tuple[str, ...] = ("pagination off", "confirm off", "width 0", "history size 0")
        if slowness() > 1:
            settings += (f"remotetimeout {patient(REMOTE_TIMEOUT):.0f}",)
        options = [word for setting in settings for word in ("-iex", f"set {setting}")]
        try:
            self._process = subprocess.Popen(
                ["setsid", "--ctty", "gdb", "-nx", "-q", *options],
                # setsid makes the terminal gdb's own: Ctrl-C goes to gdb alone.
                stdin=slave, stdout=slave, stderr=slave,
                env={**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null", **(environment or {})},
            )  # fmt: skip
        finally:
            os.close(slave)
        self._unread = ""
        self.transcript = ""
        """All that appeared on the terminal, what was typed included."""
        self._appeared = threading.Condition()
        self._hung_up = False
        # A terminal that is not read fills up, and gdb stands still at its next word.
        self._reader = threading.Thread(target=self._show, name="terminal", daemon=True)
        self._reader.start()
        self.wait_prompt()
        if load:
            self.command(f"source {LOADER}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def type(self, line: str) -> None:
        """Type *line* and the return key."""
        os.write(self._master, line.encode() + b"\n")

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C: the terminal makes a SIGINT of it, as for a person."""
        os.write(self._master, _CTRL_C)

    def command(self, line: str, timeout: float = 30) -> str:
        """Type a command, wait for the prompt, and return what was printed in between."""
        self.type(line)
        self.wait_text(line, timeout)
        return self.wait_prompt(timeout).strip()

    def wait_prompt(self, timeout: float = 30) -> str:
        """Wait until the prompt is the last thing on the terminal; returns what was printed before it."""
        with self._appeared:
            self._wait(lambda: re.search(rf"(^|\n){re.escape(PROMPT)}$", self._unread), "the prompt", timeout)
            printed, self._unread = self._unread.removesuffix(PROMPT), ""
        return printed

    def wait_text(self, text: str, timeout: float = 30) -> str:
        """Wait for *text* to appear; returns what was printed before it."""
        with self._appeared:
            self._wait(lambda: text in self._unread, repr(text), timeout)
            before, _, self._unread = self._unread.partition(text)
        return before

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to gdb."""
        os.kill(self.pid, number)

    def wait_exit(self, timeout: float = 30) -> int:
        """Wait for the end of gdb; returns its exit status (negative: the signal that ended it)."""
        try:
            return self._process.wait(patient(timeout))
        except subprocess.TimeoutExpired as error:
            raise GdbTimeoutError(f"gdb does not end; the terminal shows\n{self.transcript[-4000:]}") from error

    def hang_up(self) -> None:
        """Close the terminal, as when its window is closed."""
        self._hung_up = True
        self._reader.join()
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        """End gdb, by force if it does not want to."""
        if self._process.poll() is None and self._master >= 0:
            with contextlib.suppress(OSError, GdbTimeoutError):
                self.type("quit")
                self.wait_exit(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._master >= 0:
            self.hang_up()

    def _wait(self, condition: Callable[[], object], what: str, timeout: float) -> None:
        deadline = time.monotonic() + patient(timeout)
        while not condition():
            self._appeared.wait(_POLL)
            if self._process.poll() is not None and not self._reader.is_alive() and not condition():
                raise GdbDiedError(f"gdb ended with status {self._process.returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise GdbTimeoutError(f"waited in vain for {what}; the terminal shows\n{self.transcript[-4000:]}")

    def _show(self) -> None:
        while not self._hung_up:
            if not select.select([self._master], [], [], _POLL)[0]:
                continue
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # EIO: gdb has ended, no process has the terminal open any more
                return
            with self._appeared:
                text = data.decode(errors="replace").replace("\r", "")
                self.transcript += text
                self._unread += text
                self._appeared.notify_all()
