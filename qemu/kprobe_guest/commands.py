"""What a Linux guest can be asked: commands, background jobs, and its own view of itself for comparison."""

from __future__ import annotations

import gzip
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kprobe_guest.channel import CommandChannel
from kprobe_guest.console import SUSPICIOUS, find_problems
from kprobe_guest.errors import GuestError, GuestTimeoutError, SilentGuestError
from kprobe_guest.patience import patient

_SETTINGS = (
    "/sys/devices/system/cpu/online",
    "/sys/kernel/debug/kprobes/enabled",
    "/proc/sys/debug/kprobes-optimization",
    *(f"/proc/sys/kernel/{name}" for name in ("ftrace_enabled", "kptr_restrict", "nmi_watchdog", "sched_schedstats")),
    *(f"/sys/kernel/tracing/{name}" for name in ("current_tracer", "tracing_on", "kprobe_events", "set_event")),
    *(f"/sys/kernel/tracing/{name}" for name in ("set_ftrace_filter", "set_ftrace_notrace", "options/record-cmd")),
)
"""What tests and torture runs switch."""


class GuestCommands(ABC):
    """Commands over the channel of a guest; a subclass has the channel and looks after the guest."""

    def __init__(self) -> None:
        self._jobs = 0
        self._interrupted = False

    @property
    @abstractmethod
    def channel(self) -> CommandChannel:
        """The command channel.

        :raises GuestError: this guest has none (any more).
        """

    @abstractmethod
    def check(self) -> None:
        """Raise when the guest has failed."""

    @abstractmethod
    def _tick(self, deadline: float, waiting_for: str) -> None:
        """Wait a moment for the channel, looking after the guest meanwhile."""

    def run(self, command: str, timeout: float = 60) -> tuple[int, str]:
        """Run a shell command in the guest; exit status and output (stdout and stderr).

        :raises GuestFailedError: the guest failed meanwhile.
        :raises GuestTimeoutError: no end of the command within *timeout* seconds; it has been interrupted.
        """
        status, output = self._run(command, timeout)
        return status, output.decode(errors="replace")

    def _run(self, command: str, timeout: float) -> tuple[int, bytes]:
        deadline = time.monotonic() + patient(timeout)
        markers = self._send(command, deadline)
        while (result := self.channel.take_result(markers)) is None:
            try:
                self._tick(deadline, f"the end of: {command}")
            except GuestTimeoutError:
                self.channel.interrupt()
                self._interrupted = True
                raise
        self.check()
        return result

    def _send(self, command: str, deadline: float) -> tuple[bytes, bytes]:
        """Have the shell run *command* when it comes to it; returns what its output will be between."""
        self.check()
        while self._interrupted and not self.channel.take_ready():
            self._tick(deadline, "a new shell")
        self._interrupted = False
        return self.channel.send(command)

    @contextmanager
    def dialogue(self, command: str, timeout: float = 60) -> Iterator[Callable[[str], str]]:
        """Run *command*, which answers each line of its input with one line; the function given asks it.

        Between two questions the command waits, and nothing else of ours runs in the guest. No other command can be
        run meanwhile. An exception ends the command by an interrupt.

        :raises GuestError: its status, at the end of its input, is not 0.
        """

        def take_line() -> str:
            deadline = time.monotonic() + patient(timeout)
            while (line := channel.take_line()) is None:
                self._tick(deadline, f"an answer of: {command}")
            return line

        def ask(line: str) -> str:
            channel.send_line(line)
            return take_line()

        self.check_output("true")
        channel = self.channel
        begin, end = channel.send(command, asks=True)
        try:
            assert take_line().encode() + b"\n" == begin
            yield ask
        except BaseException:
            channel.interrupt()
            self._interrupted = True
            raise
        channel.send_end()
        last = take_line().encode()
        assert last.startswith(end), last
        if int(last.removeprefix(end)):
            raise GuestError(f"in the guest: {command}: status {last.removeprefix(end).decode()}")

    def follow(self, command: str, say: Callable[[str], None], timeout: float = 60, first: float | None = None) -> int:
        """Run a shell command in the guest, and *say* each line of its output when it comes; returns its exit status.

        :param first: seconds within which the first line has come, if they are fewer than *timeout*.
        :raises GuestFailedError: the guest failed meanwhile.
        :raises GuestTimeoutError: no end of the command within *timeout* seconds; it has been interrupted.
        :raises SilentGuestError: the same, with no line of it.
        """
        started = time.monotonic()
        deadline = started + patient(timeout)
        first_by = deadline if first is None else min(deadline, started + patient(first))
        begun = said = False
        channel, (begin, end) = self.channel, (mark.decode() for mark in self._send(command, deadline))
        try:
            while True:
                while (line := channel.take_line()) is None:
                    self._tick(deadline if said else first_by, f"the end of: {command}")
                text, found, status = line.partition(end)
                if not begun:  # what an interrupted command has left
                    begun = f"{text}\n".endswith(begin)
                elif text or not found:
                    said = True
                    say(text)
                if found:
                    return int(status)
        except BaseException as error:
            channel.interrupt()
            self._interrupted = True
            if isinstance(error, GuestTimeoutError) and not said:
                raise SilentGuestError(str(error)) from error
            raise

    def check_output(self, command: str, timeout: float = 60) -> str:
        """Like :meth:`run`, for a command that must succeed.

        :raises GuestError: its status was not 0.
        """
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"in the guest, status {status}: {command}\n{output}")
        return output

    def spawn(self, command: str, timeout: float = 60, *, wait: bool = True) -> int:
        """Start *command* in the background; returns the job's number for :meth:`finish`.

        Without *wait* it may not have been started yet, and *timeout* is for a shell that was interrupted before. So it
        is for one that has a debugger stop the machine: stopped at once, the shell could not say that it has done so.
        """
        self._jobs += 1
        base = f"/tmp/job{self._jobs}"
        # A session of its own: its process group can be killed as a whole.
        script = f"trap 'echo $? > {base}.status' EXIT\n{command}"
        start = f"setsid sh -c {shlex.quote(script)} > {base}.output 2>&1 & echo $! > {base}.pid"
        if wait:
            self.check_output(start, timeout)
        else:
            self._send(start, time.monotonic() + patient(timeout))
        return self._jobs

    def finish(self, job: int, timeout: float = 60, *, kill: bool = False) -> tuple[int, str]:
        """Wait for a background job (after killing it, with *kill*); exit status and output.

        A job that was killed has the status 137.
        """
        base = f"/tmp/job{job}"
        if kill:
            self.run(f"kill -9 -$(cat {base}.pid) && [ -s {base}.status ] || echo 137 > {base}.status", timeout)
        self.check_output(f"while [ ! -s {base}.status ]; do sleep 0.1; done", timeout)
        output = self.check_output(f"cat {base}.status {base}.output; rm -f {base}.*", timeout)
        status, _, rest = output.partition("\n")
        return int(status), rest

    def dmesg_problems(self) -> list[str]:
        """Lines of the guest's kernel log that look like a failure; empty when it is clean."""
        return find_problems(
            self.check_output(f"dmesg > /tmp/dmesg && {{ grep -iE '{SUSPICIOUS}' /tmp/dmesg; true; }}")
        )

    def dmesg_clean(self) -> bool:
        """Whether the guest's kernel log shows no failure."""
        return not self.dmesg_problems()

    def read_file(self, path: str, timeout: float = 60) -> bytes:
        """A file of the guest's. Compressed on the way: the channel carries some 0.5 MB a second."""
        return gzip.decompress(self._run(f"gzip -c < {shlex.quote(path)}", timeout)[1])

    def kallsyms(self) -> str:
        """The guest's own /proc/kallsyms, as root sees it."""
        return self.read_file("/proc/kallsyms").decode()

    def condition(self) -> tuple[str, ...]:
        """What work in the guest may leave changed: settings, modules, programs that run; a line each, in order.

        As it was after boot means that nobody needs to know what the guest was used for since.
        """
        # Almost all by the shell itself: starting a program is what takes time.
        lines = self.check_output(
            f"grep -H '' {' '.join(_SETTINGS)}; "
            "while read -r name rest; do echo module $name; done < /proc/modules; "
            "for process in /proc/[1-9]*; do program=; read -r program < $process/cmdline; "
            '[ -z "$program" ] || [ $process = /proc/$$ ] || echo program $program; done 2> /dev/null; true'
        )
        return tuple(sorted(lines.splitlines()))

    def modules(self) -> dict[str, int]:
        """The guest's loaded modules: name and address of the core section. None of a kernel that can have none."""
        lines = self.check_output("[ ! -e /proc/modules ] || cat /proc/modules").splitlines()
        return {(fields := line.split())[0]: int(fields[5], 16) for line in lines}
