"""A gdb process with the plugin loaded, driven over GDB/MI through pygdbmi.

Every command carries a token and is answered by the record with that token: pygdbmi's own ``write()`` returns when gdb
was silent for a while, which says nothing about the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from pygdbmi.gdbcontroller import GdbController

from gdb_kprobe.config.installation import LOADER
from kprobe_guest.patience import patient, slowness

_POLL = 0.05
"""Seconds of one look for output; a bound on how late the end of gdb is noticed."""

REMOTE_TIMEOUT = 2
"""Seconds that gdb waits for an answer of the stub, if it is told nothing else."""


class GdbCommandError(Exception):
    """gdb answered a command with an error; ``str()`` is its message, word for word."""


class GdbTimeoutError(Exception):
    """gdb did not answer in time."""


class GdbDiedError(Exception):
    """The gdb process is gone."""


class GdbMi:
    """A gdb with the plugin; a context manager, which ends gdb by ``-gdb-exit``.

    *environment* is added to the process's own (profiles may refer to it). Time limits are those of a usual machine
    (:mod:`kprobe_guest.patience`).
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, load: bool = True) -> None:
        saved = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        try:
            self._controller = GdbController(
                command=["gdb", "-nx", "-q", "--interpreter=mi3"], time_to_check_for_additional_output_sec=0.001
            )
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        self._token = 0
        self._stops: deque[dict[str, Any]] = deque()
        self._results: dict[int, dict[str, Any]] = {}
        self._output: list[str] = []
        self.transcript: list[str] = []
        """All that was sent and received, for the report of a failed test."""
        self.command("-gdb-set mi-async on")
        self.command("-gdb-set pagination off")
        self.command("-gdb-set confirm off")
        if slowness() > 1:
            self.command(f"-gdb-set remotetimeout {patient(REMOTE_TIMEOUT):.0f}")
        if load:
            self.console(f"source {LOADER}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        process = self._controller.gdb_process
        assert isinstance(process, subprocess.Popen)
        return process

    # -- commands -----------------------------------------------------------------------------------------------

    def command(self, command: str, timeout: float = 30) -> dict[str, Any]:
        """Send an MI command and return the payload of its result.

        :raises GdbCommandError: gdb answered ``^error``.
        """
        payload, _ = self._exchange(command, timeout)
        return payload

    def console(self, command: str, timeout: float = 30) -> str:
        """Run a CLI command and return what it printed."""
        return self.finish(self.start(command), timeout)

    def start(self, command: str) -> int:
        """Send a CLI command that may take long; :meth:`finish` waits for its end."""
        return self._send(f'-interpreter-exec console "{_quoted(command)}"')

    def finish(self, token: int, timeout: float = 30) -> str:
        """Wait for the end of a command that :meth:`start` sent; returns what was printed."""
        _, output = self._wait(token, timeout)
        return output

    @property
    def output(self) -> str:
        """What gdb has printed since the last command was sent, as far as it was read."""
        return "".join(self._output)

    def evaluate(self, expression: str) -> int:
        """The value of a C expression as an integer."""
        return int(self.command(f'-data-evaluate-expression "(unsigned long)({expression})"')["value"].split()[0], 0)

    @property
    def pc(self) -> int:
        return self.evaluate("$pc")

    # -- running ------------------------------------------------------------------------------------------------

    def cont(self) -> None:
        """Let the guest run."""
        self.command("-exec-continue")

    def interrupt(self, timeout: float = 30) -> dict[str, Any]:
        """Stop the running guest as the user's Ctrl-C does, and return the stop's record.

        Not by ``-exec-interrupt``: gdb loses that when the stub has just stopped at a breakpoint by itself.
        """
        self.signal(signal.SIGINT)
        return self.wait_stop(timeout)

    def wait_stop(self, timeout: float = 30) -> dict[str, Any]:
        """Wait until the guest has stopped, and return the record that says why."""
        deadline = time.monotonic() + patient(timeout)
        while not self._stops:
            self._read(deadline, "the guest to stop")
        return self._stops.popleft()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to gdb (SIGINT is the user's Ctrl-C)."""
        os.kill(self.pid, number)

    def wait_exit(self, timeout: float = 30) -> int:
        """Wait for the end of gdb; returns its exit status."""
        with contextlib.suppress(GdbDiedError, GdbTimeoutError):
            deadline = time.monotonic() + patient(timeout)
            while True:
                self._read(deadline, "gdb to end")
        return self._process.wait(patient(timeout))

    def close(self) -> None:
        """End gdb, by force if it does not want to."""
        if self._process.poll() is None:
            with contextlib.suppress(
                OSError, subprocess.TimeoutExpired, GdbTimeoutError, GdbDiedError, GdbCommandError
            ):
                self._send("-gdb-exit")
                self.wait_exit(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    # -- private ------------------------------------------------------------------------------------------------

    def _exchange(self, command: str, timeout: float) -> tuple[dict[str, Any], str]:
        return self._wait(self._send(command), timeout)

    def _send(self, command: str) -> int:
        self._token += 1
        self.transcript.append(f"-> {self._token}{command}")
        self._output.clear()
        try:
            self._controller.write(f"{self._token}{command}", read_response=False)
        except OSError as error:
            raise GdbDiedError(f"gdb is gone: {error}\n{self._tail()}") from error
        return self._token

    def _wait(self, token: int, timeout: float) -> tuple[dict[str, Any], str]:
        deadline = time.monotonic() + patient(timeout)
        while token not in self._results:
            self._read(deadline, f"the answer to command {token}")
        record = self._results.pop(token)
        output = "".join(self._output)
        if record["message"] == "error":
            raise GdbCommandError((record["payload"] or {}).get("msg", "no message"))
        return record["payload"] or {}, output

    def _read(self, deadline: float, what: str) -> None:
        records = self._controller.get_gdb_response(timeout_sec=_POLL, raise_error_on_timeout=False)
        for record in records:
            self.transcript.append(f"<- {record['type']} {record['message']} {record['payload']}")
            if record["type"] == "result" and record["token"] is not None:
                self._results[record["token"]] = record
                if record["message"] == "running":
                    # "*running" comes later, maybe after the caller waits for the next stop
                    self._stops.clear()
            elif record["type"] == "notify" and record["message"] == "stopped":
                self._stops.append(record["payload"] or {})
            elif record["type"] == "notify" and record["message"] == "running":
                self._stops.clear()
            elif record["type"] in ("console", "target", "output"):
                self._output.append(str(record["payload"]))
        if records:
            return
        if self._process.poll() is not None:
            raise GdbDiedError(
                f"gdb ended with status {self._process.returncode} while waiting for {what}\n{self._tail()}"
            )
        if time.monotonic() > deadline:
            raise GdbTimeoutError(f"waited in vain for {what}\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.transcript[-40:])


def _quoted(command: str) -> str:
    return command.replace("\\", "\\\\").replace('"', '\\"')
