"""gdb's end of the pipe."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from gdb_kprobe.config.installation import find_interpreter
from gdb_kprobe.watchdog.states import State

_PATIENCE = 2.0
"""Seconds that it has to end in: it may just have been started."""


class Watchdog:
    """The watchdog of one attachment to the stub at *address*; ``None``: there is to be none.

    None of the methods raises when it cannot be had or is gone: gdb works without it, unless gdb is killed. Then
    :attr:`problem` says so.
    """

    def __init__(self, address: str | None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: State | None = None
        self.problem = ""
        if address is not None:
            try:
                self._process = _start(address)
            except OSError as error:
                self._lose(f"cannot be started: {error}")
        self.tell(State.STOPPED)

    @property
    def pid(self) -> int | None:
        """Its process; ``None`` when there is none."""
        return None if self._process is None else self._process.pid

    def tell(self, state: State) -> None:
        """Say what gdb is about from now on."""
        if self._process is None or state is self._told:
            return
        assert self._process.stdin is not None
        self._told = state
        try:
            os.write(self._process.stdin.fileno(), state.value)
        except OSError:
            self._lose("has ended")

    def end(self) -> None:
        """Send it home."""
        self.tell(State.DONE)
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _lose(self, how: str) -> None:
        self.problem = f"the watchdog {how}; should gdb be killed, the guest stops at the next hit that needs gdb"


def _start(address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: what happens to lie in the current directory is not for it.
        [find_interpreter(), "-P", "-m", "gdb_kprobe.watchdog.process", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # A pipe would look open to its reader until the watchdog ends.
        stderr=None if os.isatty(2) else subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # Neither a Ctrl-C nor the end of the terminal is for it.
        start_new_session=True,
    )
