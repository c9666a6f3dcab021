"""Run a program that may take long: its output goes to a file, and a line says from time to time that it is at work."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from gdb_kprobe.errors import KprobeError

_SAY_EVERY = 60.0
"""Seconds between two lines."""
_PATIENCE = 10.0
"""Seconds that a program has to end itself."""


class OverdueError(KprobeError):
    """A program took longer than it may."""


def run_logged(command: Sequence[str], log: Path, what: str, timeout: float, *, cwd: Path | None = None) -> int:
    """Run *command* with its stdout and stderr in *log*; returns its exit status.

    *what* is what it does, for the lines.

    :raises OverdueError: it took more than *timeout* seconds; it and its children in its process group are ended.
    :raises KprobeError: it cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, start_new_session=True
            )
        except OSError as error:
            raise KprobeError(f"{command[0]} cannot be started: {error.strerror}", "install it") from error
        try:
            while True:
                left = timeout - (time.monotonic() - started)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(max(0.0, min(_SAY_EVERY, left)))
                elapsed = time.monotonic() - started
                if elapsed >= timeout:
                    raise OverdueError(f"{what} took more than {timeout:.0f} s", f"its output is in {log}")
                print(f"    {what}: for {elapsed:.0f} s; {last_line(log)}", flush=True)
        finally:
            if process.poll() is None:
                _end(process)


def last_line(log: Path) -> str:
    """Return the last line of *log* that is not empty."""
    with contextlib.suppress(OSError):
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if line.strip():
                return line.strip()[:100]
    return "no output yet"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End *process* and all of its process group, by force what does not want to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if process.poll() is not None and not _has_members(process.pid):
                return
            time.sleep(0.05)


def _has_members(group: int) -> bool:
    """Whether anyone is in the process group; one that has ended is, until its parent has asked how."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
